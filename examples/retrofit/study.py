"""One model: trained and kept, then judged at its depths; and the seconds of all models of one seed."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import adadepth as ad
from adadepth.hf import flops

from .model import ARMS, GATES, PLAIN, build, is_looped, learned, load, merge, opened
from .prepare import Prepared, read
from .train import Plan, nats, rule_for, train

UNTOUCHED = "as downloaded"
MEANS = (1.5, 2.0, 2.5)  # iterations to which thresholds are fitted


class Job(NamedTuple):
    """A model to train, the `arm`-th of all; `base` by name or path, None for the one of the package.

    `out` is the folder, `layers` those that are looped, `mark` that of the text and the settings.
    """

    arm: int
    seed: int
    base: str | None
    layers: tuple[int, int]
    plan: Plan
    out: str
    mark: str

    def prepared(self) -> Prepared:
        """The text of the folder."""
        kept = read(Path(self.out))
        assert kept is not None
        return kept[1]

    def model(self) -> Any:
        """The model before training."""
        return build(load(self.base), ARMS[self.arm], self.layers, self.seed)

    @property
    def kept(self) -> Path:
        """Where what it learned is."""
        return Path(self.out) / f"{self.mark}-arm-{self.arm}-seed-{self.seed}.pt"


class Row(NamedTuple):
    """A line of the table: nats per token of each window, mean iterations of the looped layers, and relative FLOPs."""

    name: str
    losses: list[float]
    depth: float
    flops: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return mean(self.losses)


def run(job: Job) -> dict[str, Any]:
    """Train the model of a job, keep what it learned, and judge it."""
    arm, plan, windows = ARMS[job.arm], job.plan, job.prepared().windows
    model, rows, shown = job.model(), [], None
    if arm == PLAIN:
        rows.append(judge(UNTOUCHED, model, windows.judged, plan.batch))  # LoRA begins as nothing
    start = time.perf_counter()
    losses = train(model, arm, windows.train, plan, job.seed)
    minutes = (time.perf_counter() - start) / 60
    torch.save({name: parameter.detach() for name, parameter in learned(model).items()}, job.kept)
    merge(model)
    model.eval()
    if arm == GATES:
        for name, exits in ways(model, windows.fitted, windows.judged, job):
            rows.append(judge(f"gates: {name}", model, windows.judged, plan.batch, exits))
        with torch.inference_mode():
            shown = model(input_ids=windows.judged[:1]).trace.depth[0].tolist()
    else:
        rows.append(judge(arm.name, model, windows.judged, plan.batch))
    return {"rows": rows, "losses": losses, "minutes": minutes, "shown": shown, "opened": opened(model)}


def ways(model: Any, fitted: Tensor, judged: Tensor, job: Job) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """How tokens may exit from one trained loop: a name, and the depths, `(rows, 1 or seq)`, if they are given.

    Between two of them the loop's gate and rule change; at last they are those of a mean of two iterations.
    """
    steps, batch, gate = model.loop.steps, job.plan.batch, model.loop.gate
    model.loop.rule = None
    for depth in range(1, steps + 1):
        yield f"held at {depth}", {"max_depth": torch.full((len(judged), 1), depth)}
    drawn = ad.uniform_depths(tuple(judged.shape), steps, 2.0, torch.Generator().manual_seed(job.seed))
    yield "random, mean 2", {"min_depth": drawn, "max_depth": drawn}
    model.loop.gate = ad.ConvergenceGate()
    model.loop.rule = rule_for(model, fitted, batch, 2.0)
    yield "convergence, mean 2", {}
    model.loop.gate = gate
    for goal in MEANS:
        model.loop.rule = rule_for(model, fitted, batch, goal)
        yield f"exits, mean {goal:g}", {}
    model.loop.rule = rule_for(model, fitted, batch, 2.0)


@torch.inference_mode()
def judge(name: str, model: nn.Module, windows: Tensor, batch: int, exits: dict[str, Tensor] | None = None) -> Row:
    """The mean loss and depth over windows, whose depths `exits` may hold."""
    model.eval()
    losses, depths = list[float](), []
    given = {name: depth.split(batch) for name, depth in (exits or {}).items()}
    for i, rows in enumerate(windows.split(batch)):
        out = model(input_ids=rows, **{name: parts[i] for name, parts in given.items()})
        losses += nats(out.logits, rows).mean(1).tolist()
        depths.append(out.trace.depth.double().flatten() if is_looped(model) else torch.ones(rows.numel()))
    depth = torch.cat(depths).mean().item()
    cost = flops.relative(model, depth) if is_looped(model) else 1.0  # type: ignore[arg-type]
    return Row(name, losses, depth, cost)


@torch.inference_mode()
def seconds(jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
    """Milliseconds a token of each model, in prefill of a batch and in decoding of one row: the best of some rounds."""
    runs: dict[tuple[str, str], Callable[[], float]] = {}
    for job in jobs:
        model, windows, arm = trained(job), job.prepared().windows, ARMS[job.arm]
        runs[arm.name, "prefill"] = partial(prefill, model, windows.judged[: job.plan.batch])
        runs[arm.name, "decode"] = partial(decode, model, windows.judged[:1])
    rounds = [{each: once() for each, once in runs.items()} for _ in range(jobs[0].plan.rounds)]
    found: dict[str, dict[str, float]] = {name: {} for name, _ in runs}
    for name, what in runs:
        found[name][what] = min(times[name, what] for times in rounds)
    return found


def trained(job: Job) -> Any:
    """The model of a job as one would use it."""
    model = job.model()
    model.load_state_dict(torch.load(job.kept), strict=False)
    merge(model)
    model.eval()
    if ARMS[job.arm] == GATES:
        model.loop.rule = rule_for(model, job.prepared().windows.fitted, job.plan.batch, 2.0)
    return model


def prefill(model: Any, rows: Tensor) -> float:
    """Milliseconds for each token of a pass."""
    start = time.perf_counter()
    model(input_ids=rows, logits_to_keep=1)
    return 1000 * (time.perf_counter() - start) / rows.numel()


def decode(model: Any, rows: Tensor, new: int = 8) -> float:
    """Milliseconds for each new token behind a prompt."""

    def generate(number: int) -> float:
        start = time.perf_counter()
        mask = torch.ones_like(rows)
        model.generate(
            input_ids=rows, attention_mask=mask, max_new_tokens=number, min_new_tokens=number, do_sample=False
        )
        return time.perf_counter() - start

    return 1000 * (generate(1 + new) - generate(1)) / new
