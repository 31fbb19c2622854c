"""One model of one seed: trained or taken from the store, then judged, one row after the other."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import adadepth as ad

from .evaluate import BATCH, Measured, flops, highest, measure, seconds
from .model import Interpreter
from .models import FULL, NEEDED, ORACLE, PRIOR, RANDOM, SHUFFLED, Model, models, readout_name
from .plan import Plan, judged, settings, stream
from .policies import GUIDED, READOUTS, Policy
from .ranks import rank_correlation
from .store import Row, Store
from .task import Sample, Task
from .train import batches, stage

SHOWN = 3  # sequences in the picture
TIMES = "times"  # the unit of work that measures them, after all others


class Now(NamedTuple):
    """One step of training: of which model, and the step's loss and mean depth."""

    doing: str
    loss: float
    depth: float


def units(task: Task) -> dict[str, set[str]]:
    """The units of one seed's work, by name, each with those that must come before it."""
    needed = {model.name: {model.begins, model.after} - {""} for model in models(task).values()}
    return needed | {TIMES: set(needed)}


def row_names(task: Task) -> list[str]:
    """All rows of the table, in its order."""
    return [name for model in models(task).values() for name in model.rows]


def store_of(out: Path, task: Task, seed: int, plan: Plan) -> Store:
    """Where a seed's results are."""
    return Store(out / task.name / f"seed-{seed}", settings(task, seed, plan))


def left(task: Task, unit: str, plan: Plan, store: Store) -> int:
    """Steps of training that a unit has yet to do."""
    if unit == TIMES or store.weights(unit) is not None:
        return 0
    return sum(models(task)[unit].stages(plan).values())


def work(task: Task, seed: int, unit: str, plan: Plan, store: Store) -> Iterator[Now | Row]:
    """Do one unit, as far as it is not done; says every step of training and every row."""
    if unit == TIMES:
        if store.seconds() is None:
            store.keep_seconds(timed(task, seed, plan, store))
        return
    model = models(task)[unit]
    if store.weights(unit) is None:
        yield from _train(task, seed, model, plan, store)
    rows = {name: store.row(name) for name in model.rows}
    if None in rows.values():
        trained, sample = load(task, seed, model, store), judged(task, seed, plan)
        for row in judge(task, seed, model, trained, sample, plan, store):
            store.keep_row(row)
            rows[row.name] = row
    yield from (row for row in rows.values() if row is not None)


def _train(task: Task, seed: int, model: Model, plan: Plan, store: Store) -> Iterator[Now]:
    trained = model.build(task, seed)
    if model.begins:
        trained.load_state_dict(_there(store, model.begins))
    if model.policy is not None:
        model.policy.attach(trained, model.policy.tau)
    for number, steps in model.stages(plan).items():
        samples = batches(task, stream(seed, number - 1))
        for done in stage(trained, number, steps, samples, model.objective(steps)):
            yield Now(model.name, *done)
    store.keep_weights(model.name, trained.state_dict())


def _there(store: Store, name: str) -> dict[str, Tensor]:
    weights = store.weights(name)
    assert weights is not None, f"{name} comes first"
    return weights


def load(task: Task, seed: int, model: Model, store: Store) -> Interpreter:
    """A model of the store, with its exits."""
    trained = model.build(task, seed)
    if model.policy is not None:
        model.policy.attach(trained, model.policy.tau)
    trained.load_state_dict(_there(store, model.name))
    return trained.eval()


def judge(
    task: Task, seed: int, model: Model, trained: Interpreter, sample: Sample, plan: Plan, store: Store
) -> Iterator[Row]:
    """The rows of a model."""
    if model.name == PRIOR:
        yield from _read(trained, sample, task.draw(plan.fitted, stream(seed, 3)), store)
        return
    if not model.rows:
        return
    exits = measure(trained, sample, given_depth(model, sample))
    yield row_of(model.rows[0], trained, sample, exits, task.steps)
    if model.policy is GUIDED:
        trained.looped.gate = trained.looped.rule = None  # depths are given
        for name, depth in _instead(sample, exits, task.steps, stream(seed, 4)).items():
            yield row_of(name, trained, sample, measure(trained, sample, depth), task.steps)


def given_depth(model: Model, sample: Sample) -> Tensor | int | None:
    """The depth at which tokens of this model must exit; None if its exits are its own, or it has none."""
    return None if model.depth is None else model.depth(sample)


def _instead(sample: Sample, exits: Measured, steps: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Other depths for the weights of the gates: their own, in another order in each sequence; random; needed."""
    order = torch.rand(exits.depth.shape, generator=generator).argsort(1)
    drawn = ad.uniform_depths(tuple(exits.depth.shape), steps, exits.mean_depth, generator)
    return {SHUFFLED: exits.depth.gather(1, order), RANDOM: drawn, ORACLE: sample.needed}


def _read(trained: Interpreter, sample: Sample, others: Sample, store: Store) -> Iterator[Row]:
    """Exits by criteria that were not trained in, each at the lowest mean depth that is at least that of the gates."""
    gates = store.row(GUIDED.name)
    assert gates is not None, "the gates come first"
    for policy in READOUTS:
        policy.attach(trained, 0.0)
        tau = highest(trained, policy, others, lambda exits: exits.mean_depth >= gates.depth) or 0.0
        trained.looped.rule = policy.rule(tau)
        row = row_of(readout_name(policy), trained, sample, measure(trained, sample), trained.shape.steps)
        yield row._replace(tau=tau)


def row_of(name: str, model: Interpreter, sample: Sample, exits: Measured, steps: int) -> Row:
    """All that is said of exits on these weights; `steps` are those of the task."""
    needed, used, right = (part[sample.counted] for part in (sample.needed, exits.depth, exits.right))
    counts = ((needed - 1) * steps + used - 1).bincount(minlength=steps**2).view(steps, steps)
    shares = [right[needed == n].double().mean().item() if counts[n - 1].any() else None for n in range(1, steps + 1)]
    rank = rank_correlation(needed, used)
    return Row(
        name=name,
        accuracy=exits.accuracy,
        loss=exits.loss,
        depth=exits.mean_depth,
        flops=flops(model, exits.depth),
        rank=None if rank != rank else rank,
        tau=None,
        right=shares,
        matrix=counts.tolist(),
        shown=exits.depth[:SHOWN].tolist(),
    )


@torch.inference_mode()
def timed(task: Task, seed: int, plan: Plan, store: Store) -> dict[str, float]:
    """Seconds per 1,000 sequences of all rows whose exits do not look at answers: a batch at a time, packed."""
    sample = Sample(*(part[:BATCH] for part in judged(task, seed, plan)))
    runs = {}
    for model in models(task).values():
        if model.name in (FULL, NEEDED):
            continue
        for name, policy in _timed_rows(model).items():
            trained = load(task, seed, model, store)
            if policy is not None:
                policy.attach(trained, _threshold(store, name))
            runs[name] = partial(trained, sample.ids, depth=given_depth(model, sample))
    return {name: 1000 * best / len(sample.ids) for name, best in seconds(runs, plan.rounds).items()}


def _threshold(store: Store, name: str) -> float:
    row = store.row(name)
    assert row is not None, f"{name} comes first"
    assert row.tau is not None
    return row.tau


def _timed_rows(model: Model) -> Mapping[str, Policy | None]:
    if model.name == PRIOR:
        return {readout_name(policy): policy for policy in READOUTS}
    return {model.rows[0]: None}
