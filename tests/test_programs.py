"""The study in examples/programs: its tasks, models, training, rows, verdicts, and what it refuses."""

import csv
import itertools
import math
import multiprocessing
import re
import shutil
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import last_maps, the
from rich.console import Console
from torch import Tensor, nn

import adadepth as ad
from examples.programs import __main__ as command
from examples.programs import evaluate, mixture, ranks, report, study, train, verdicts, workers
from examples.programs.expressions import EXPRESSIONS
from examples.programs.model import Interpreter, Layer, Layers, Prediction, Shape
from examples.programs.models import FULL, ORACLE, RANDOM, SHUFFLED, Model, models, wide
from examples.programs.plan import Plan, judged, stream
from examples.programs.policies import (
    GUIDED,
    GUIDED_EARLY,
    PAPER,
    READOUTS,
    SURVIVAL,
    TRAINED,
    Gains,
    Policy,
    Training,
)
from examples.programs.programs import PROGRAMS, Programs
from examples.programs.report import Seed
from examples.programs.store import OtherSettings, Row, Store
from examples.programs.study import Now
from examples.programs.task import Sample, Task
from examples.programs.tasks import TASKS

STEPS = 6
TINY = Plan(steps_1=2, steps_2=2, judged=24, fitted=16, rounds=1)
SMALL = Programs("small", lines=8, deepest=3, steps=3, fixed=(1, 2, 3), dense=2)
ROWS = [
    "guided gates",
    "guided gates, depths shuffled",
    "guided gates, random depths",
    "guided gates, needed depth",
    "guided gates, early",
    "survival gates",
    "entropy late, trained",
    "paper's gates",
    "trained at depth 1",
    "trained at depth 2",
    "trained at depth 3",
    "at most 2, by kind and place",
    "at most 3, by kind and place",
    "2 distinct layers",
    "2 distinct layers, longer",
    "one layer, 88 wide",
    "prior, top probability",
    "prior, entropy",
    "prior, entropy late",
    "prior, KL",
    "needed depth, trained in",
]
OURS = {
    "guided gates",
    "guided gates, early",
    "survival gates",
    "entropy late, trained",
    "paper's gates",
}
VALUE: dict[str, Callable[[int], int]] = {
    "x+1": lambda x: (x + 1) % 5,
    "2x": lambda x: 2 * x % 5,
    "-x": lambda x: -x % 5,
    "swap01": lambda x: {0: 1, 1: 0}.get(x, x),
}
OPERATOR: dict[str, Callable[[int, int], int]] = {
    "a+b": lambda a, b: (a + b) % 5,
    "a-b": lambda a, b: (a - b) % 5,
    "a+1": lambda a, b: (a + 1) % 5,
    "swap(b)": lambda a, b: {0: 1, 1: 0}.get(b, b),
}
Said = Generator[tuple[int, Now | Row]]  # what a run says


def some(count: int, seed: int = 0, task: Task = PROGRAMS) -> Sample:
    return task.draw(count, torch.Generator().manual_seed(seed))


def part_of(sample: Sample, rows: slice) -> Sample:
    return Sample(*(part[rows] for part in sample))


def uneven(policy: Policy = SURVIVAL, tau: float = 0.3) -> Interpreter:
    """An untrained model whose lines exit at all depths."""
    torch.manual_seed(0)
    model = Interpreter(PROGRAMS.sizes)
    policy.attach(model, tau)
    for last in last_maps(model.looped.gate) if hasattr(model.looped.gate, "mlps") else []:
        last.weight.data.normal_(std=20.0)
        last.bias.data.fill_(1.0)
    return model.eval()


def stage(model: Interpreter, number: int, steps: int, policy: Policy | None = None) -> Iterator[train.Progress]:
    """A stage on programs; with exits, if a policy is given."""
    if policy is not None:
        policy.attach(model, policy.tau)
    objective = train.at_exits if policy is None else train.objective_of(policy, steps)
    samples = train.batches(PROGRAMS, torch.Generator().manual_seed(number - 1))
    return train.stage(model, number, steps, samples, objective)


@cache
def trained() -> Interpreter:
    """A model after a few steps of both stages."""
    torch.manual_seed(0)
    model = Interpreter(PROGRAMS.sizes)
    for _ in stage(model, 1, 5):
        pass
    for _ in stage(model, 2, 5, SURVIVAL):
        pass
    return model.eval()


def done(task: Task, plan: Plan, store: Store, seed: int = 0) -> list[Now | Row]:
    """All that the units of one seed say."""
    return [said for unit in study.units(task) for said in study.work(task, seed, unit, plan, store)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A study of a small task, run once."""
    store = study.store_of(tmp_path_factory.mktemp("small"), SMALL, 0, TINY)
    done(SMALL, TINY, store)
    return store


# The tasks


@pytest.mark.parametrize("task", [PROGRAMS, Programs(lines=30, deepest=11, steps=12), SMALL], ids=repr)
def test_values_and_levels_are_those_of_an_interpreter_that_reads_the_text(task: Programs) -> None:
    programs = some(200, task=task)
    assert programs.counted.all()
    for ids, values, needed in zip(*(part.tolist() for part in programs[:3]), strict=True):
        lines = dict(line.split(": ") for line in task.text(ids))

        def run(line: str, lines: dict[str, str] = lines) -> tuple[int, int]:
            if lines[line].isdigit():
                return int(lines[line]), 0
            function, source = the(re.Match, re.fullmatch(r"(.+)\((\d+)\)", lines[line])).groups()
            assert int(source) < int(line)
            value, level = run(source)
            return VALUE[function](value), level + 1

        assert list(lines) == [str(i) for i in range(task.lines)]
        run_all = [run(line) for line in lines]
        assert [value for value, _ in run_all] == values
        assert [min(level + 1, task.steps) for _, level in run_all] == needed


def test_a_line_is_written_as_one_writes_it() -> None:
    lines = PROGRAMS.text([4, 0, 5, 5 + 1, 5 + 24 + 3, 5 + 2 * 24, 5 + 3 * 24 + 23])
    assert lines == ["0: 4", "1: 0", "2: x+1(0)", "3: x+1(1)", "4: 2x(3)", "5: -x(0)", "6: swap01(23)"]


def test_programs_begin_with_constants_and_reach_every_level() -> None:
    programs = some(2000)
    assert {part.shape for part in programs} == {(2000, 24)}
    assert (programs.ids[:, :4] < 5).all() and (programs.ids[:, 4:] >= 5).all()
    assert programs.ids.max() < PROGRAMS.sizes.vocabulary == 101
    shares = programs.needed.flatten().bincount(minlength=7)[1:] / programs.needed.numel()
    assert shares.min() > 0.07
    assert programs.needed.double().mean().item() == pytest.approx(3.53, abs=0.02)


def test_programs_are_repeatable() -> None:
    assert all(a.equal(b) for a, b in zip(some(5), some(5), strict=True))
    assert not some(5).ids.equal(some(5, seed=1).ids)


def test_a_line_alone_says_nothing_of_its_value() -> None:
    a, b = some(4000), some(1000, seed=1)
    seen = torch.zeros(24, 101, 5)
    places = torch.arange(24).expand_as(a.ids)
    seen.index_put_((places, a.ids, a.values), torch.ones(()), accumulate=True)
    guess = seen.argmax(-1)[places[:1000], b.ids]
    right = (guess == b.values).double().mean(0)
    assert (right[:4] == 1).all()  # constants
    assert right[4:].mean().item() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_no_token_needs_more_than_its_kind_and_place_allow_and_some_need_as_much(task: Task) -> None:
    sample = some(4000, task=task)
    most = task.most(sample.ids)
    assert (sample.needed <= most).all()
    reached = torch.zeros(2, *sample.ids.shape[1:], dtype=torch.bool)
    for kind, of_kind in enumerate((sample.ids < 5, sample.ids >= 5)):  # constants or digits; functions or brackets
        bounds = [{*most[of_kind[:, place], place].tolist()} for place in range(sample.ids.shape[1])]
        assert all(len(bound) <= 1 for bound in bounds)  # of nothing else
        reached[kind] = ((sample.needed == most) & of_kind).any(0) | ~of_kind.any(0)
    assert reached.all() or task.steps == 12  # levels of ten and eleven are rare
    assert reached[:, :12].all()


def evaluated(ids: Sequence[int]) -> list[tuple[int, int]]:
    """The value and height of the expression that ends with each token, by recursion over the text."""
    words = dict(word.split(": ") for word in EXPRESSIONS.text(ids))

    def run(place: int) -> tuple[int, int, int]:
        """And the place where it begins."""
        if words[str(place)].isdigit():
            return int(words[str(place)]), 0, place
        matched = the(re.Match, re.fullmatch(r"(.+)\((\d+), (\d+)\)", words[str(place)]))
        (a, left, start), (b, right, middle) = run(int(matched[2])), run(int(matched[3]))
        assert int(matched[3]) == place - 1 and int(matched[2]) == middle - 1  # arguments stand side by side
        looked_at = {"a+1": left, "swap(b)": right}.get(matched[1], max(left, right))
        assert looked_at == max(left, right)  # never at the shorter argument alone
        return OPERATOR[matched[1]](a, b), 1 + looked_at, start

    return [run(place)[:2] for place in range(len(ids))]


def test_values_and_heights_are_those_of_nested_expressions() -> None:
    sample = some(200, task=EXPRESSIONS)
    for ids, values, needed, counted in zip(*(part.tolist() for part in sample), strict=True):
        found = evaluated(ids)
        assert [value for value, _ in found] == values
        assert [height + 1 for _, height in found] == needed
        assert [height > 0 for _, height in found] == counted


def test_every_sequence_of_expressions_mixes_heights() -> None:
    sample = some(500, task=EXPRESSIONS)
    assert sample.ids.max() < EXPRESSIONS.sizes.vocabulary == 101
    assert (sample.needed[sample.counted].bincount()[2:] / sample.counted.sum()).min() > 0.1
    kinds = [len(set(row.tolist())) for row in sample.needed]
    assert min(kinds) >= 3 and statistics.mean(kinds) > 4.8  # of five


def test_a_bracket_alone_says_nothing_of_its_value() -> None:
    sample = some(4000, task=EXPRESSIONS)
    ids, values = sample.ids[sample.counted], sample.values[sample.counted]
    operators = (ids - 5) // 24
    seen = torch.zeros(4, 5).index_put_((operators, values), torch.ones(()), accumulate=True)
    assert (seen / seen.sum(-1, keepdim=True) - 0.2).abs().max() < 0.02 and seen.min() > 700
    before = sample.values.roll(1, 1)[sample.counted]  # the second argument
    seen = torch.zeros(2, 5, 5).index_put_((operators - 2, before, values), operators.ge(2).float(), accumulate=True)
    assert (seen / seen.sum(-1, keepdim=True)).max() < 0.24  # one argument of a sum


# The model


def test_forced_depths_are_those_of_a_loop_by_hand() -> None:
    model, ids = uneven().double(), some(3).ids
    layer = the(Layer, model.looped.block)
    x = model.tokens(ids) + model.positions.weight
    every = model(ids, depth=STEPS, every=True).logits
    given = torch.randint(1, STEPS + 1, ids.shape)
    assert not model(ids).trace.depth.equal(given)
    assert model(ids, depth=given).trace.depth.equal(given)
    assert (model(ids, depth=4).trace.depth == 4).all()
    model.looped.gate = None  # nothing to scale by
    plain = model(ids, depth=STEPS, every=True).logits
    assert not torch.allclose(plain, every)
    for depth in range(1, STEPS + 1):
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in layer.qkv(layer.norm1(x)).chunk(3, -1))
        x = x + layer.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + layer.down(F.gelu(layer.up(layer.norm2(x))))
        torch.testing.assert_close(model(ids, depth=depth).logits, model.head(x), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(plain[:, :, depth - 1], model.head(x), rtol=1e-10, atol=1e-12)


def test_distinct_layers_follow_each_other() -> None:
    torch.manual_seed(0)
    model, ids = Interpreter(PROGRAMS.sizes, Shape(1, 32, 2)).eval(), some(3).ids
    first, second = (Interpreter(PROGRAMS.sizes, Shape(1, 32)).eval() for _ in range(2))
    layers = the(Layers, model.looped.block).layers
    for alone, layer in zip((first, second), layers, strict=True):
        the(Layer, alone.looped.block).load_state_dict(layer.state_dict())
    x = model.tokens(ids) + model.positions.weight
    expected = model.head(second.looped(first.looped(x).hidden).hidden)
    torch.testing.assert_close(model(ids).logits, expected)


def test_a_line_is_not_told_what_comes_later() -> None:
    model, ids = uneven(), some(2).ids
    changed = ids.clone()
    changed[:, 12:] = some(2, seed=1).ids[:, 12:]
    torch.testing.assert_close(model(ids).logits[:, :12], model(changed).logits[:, :12])
    assert not torch.allclose(model(ids).logits[:, 12:], model(changed).logits[:, 12:])


@pytest.mark.parametrize("policy", [*TRAINED, *READOUTS], ids=lambda policy: policy.name)
def test_packed_equals_dense(policy: Policy) -> None:
    model, programs = deepcopy(trained()), some(8)
    if policy is not SURVIVAL:
        policy.attach(model, 0.0)
    model.double()
    values = evaluate.thresholds(model, policy, programs)
    model.looped.rule = policy.rule((values[256] + values[257]) / 2)
    outs = []
    for model.looped.skip in (True, False):
        out = model(programs.ids, every=True)
        outs.append((out.logits, out.trace.scores, out.trace.depth))
    packed, dense = outs
    assert packed[2].equal(dense[2]) and len(packed[2].unique()) > 1
    for a, b in zip(packed[:2], dense[:2], strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


# Training


def losses(steps: Callable[[Interpreter], Iterable[train.Progress]]) -> list[train.Progress]:
    torch.manual_seed(0)
    return list(steps(Interpreter(PROGRAMS.sizes)))


def test_training_is_repeatable_and_never_told_of_needed_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(model: Interpreter) -> Iterator[train.Progress]:
        yield from stage(model, 1, 3)
        yield from stage(model, 2, 3, SURVIVAL)

    first = losses(both)
    assert [progress.depth for progress in first] == [6.0] * 6  # gates start open
    drawn = Programs.draw

    def untold(self: Programs, count: int, generator: torch.Generator) -> Sample:
        return drawn(self, count, generator)._replace(needed=torch.zeros(count, 24))

    monkeypatch.setattr(Programs, "draw", untold)
    assert losses(both) == first


def test_batches_are_drawn_many_at_a_time_and_all_differ() -> None:
    samples = train.batches(PROGRAMS, torch.Generator().manual_seed(0))
    drawn = [next(samples) for _ in range(train.CHUNK + 1)]
    assert {sample.ids.shape for sample in drawn} == {(64, 24)}
    assert torch.cat([sample.ids for sample in drawn[:-1]]).equal(some(64 * train.CHUNK).ids)
    assert not drawn[-1].ids.equal(drawn[0].ids)


def test_the_first_step_is_the_cross_entropy_of_the_last_iteration() -> None:
    (first,) = losses(lambda model: stage(model, 1, 1))
    torch.manual_seed(0)
    model, sample = Interpreter(PROGRAMS.sizes), part_of(some(64 * train.CHUNK), slice(64))
    picked = model(sample.ids).logits.log_softmax(-1).gather(-1, sample.values.unsqueeze(-1))
    assert first.loss == pytest.approx(-picked.mean().item(), rel=1e-5)


def test_a_prior_over_depths_is_the_last_answer_and_the_mean_of_all() -> None:
    torch.manual_seed(0)
    model, sample = Interpreter(PROGRAMS.sizes).double(), some(4)
    each = [train.cross_entropy(model(sample.ids, depth=d), sample.values).item() for d in range(1, STEPS + 1)]
    got = train.prior(model, sample, 0)
    assert got.at_exit.item() == pytest.approx(each[-1])
    assert got.total.item() == pytest.approx(each[-1] + train.PRIOR * sum(each) / 6)


def test_a_model_is_trained_at_the_depth_it_is_given() -> None:
    torch.manual_seed(0)
    model, sample = Interpreter(PROGRAMS.sizes), some(4)
    for depth in (2, sample.needed):
        got = train.at_depth(lambda _, depth=depth: depth)(model, sample, 0)  # type: ignore[misc]
        out = model(sample.ids, depth=depth)
        assert got.total.item() == pytest.approx(train.cross_entropy(out, sample.values).item())
        assert got.trace.depth.equal(torch.as_tensor(depth).expand(4, 24))


def test_exits_are_trained_in() -> None:
    model = uneven()
    weights = the(nn.Module, model.looped.gate).state_dict()
    model.looped.gate = None
    policy = SURVIVAL._replace(training=the(Training, SURVIVAL.training)._replace(tau=0.99))  # fresh gates are at 0.98
    steps = stage(model, 2, 2, policy)
    assert next(steps).depth == 1.0
    assert the(nn.Module, model.looped.gate).state_dict().keys() == weights.keys()


@pytest.mark.parametrize("policy", [PAPER, SURVIVAL], ids=lambda policy: policy.name)
def test_the_penalty_is_on_what_the_rule_reads_and_grows_from_nothing(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    penalty = ad.BottomKPenalty

    class Watched:
        def __init__(self, k_max: float, warmup: tuple[int, int]) -> None:
            self.penalty = penalty(k_max, warmup)

        def __call__(self, values: Tensor, live: Tensor, at: int) -> Tensor:
            seen.append((values, at))
            return self.penalty(values, live, at)

    monkeypatch.setattr(ad, "BottomKPenalty", Watched)
    monkeypatch.setattr(train, "BATCH", 8)
    traces: list[Prediction] = []
    model = uneven()
    model.register_forward_hook(lambda model, args, out: traces.append(out))
    for _ in stage(model, 2, 10, policy):
        pass
    assert [at for _, at in seen] == list(range(10))
    for (values, _), out in zip(seen, traces, strict=True):
        assert values.equal(out.trace.survival if policy is SURVIVAL else out.trace.gates)
    assert [round(penalty(0.5, (1, 6)).k(at), 2) for at in range(8)] == [0, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5]


def guided_by_hand(model: Interpreter, programs: Sample, before: bool) -> tuple[Tensor, Tensor]:
    """What guidance minimises without the gates' own loss, and that loss; one program and one depth at a time."""
    deep, foretold, at_exit = [], [], []
    for ids, values in zip(programs.ids[:3].split(1), programs.values[:3], strict=True):
        logits = [model(ids, depth=d).logits[0] for d in range(1, STEPS + 1)]
        if before:
            logits = [model.head(model.tokens(ids[0]) + model.positions.weight), *logits]
        each = [F.cross_entropy(prediction, values, reduction="none") for prediction in logits]
        deep.append(each[-1].mean() + 0.3 * torch.stack(each[:-1]).mean())
        scores = model(ids, depth=STEPS).trace.scores[0]
        errors = [scores[:, i] - (each[i] - each[-1]).detach() for i in range(STEPS - 1)]
        foretold.append(torch.stack([error.square().mean() for error in errors]).mean())
    for ids, values in zip(programs.ids[3:].split(1), programs.values[3:], strict=True):
        at_exit.append(F.cross_entropy(model(ids).logits[0], values))
    return torch.stack(deep + at_exit).sum() / 6, torch.stack(foretold).sum() / 6


@pytest.mark.parametrize("policy", [GUIDED, GUIDED_EARLY], ids=lambda policy: policy.name)
def test_guidance_is_every_answer_of_one_half_and_the_exits_of_the_other(policy: Policy) -> None:
    model, programs = uneven(policy, tau=0.2).double(), some(6)
    losses = train.objective_of(policy, 10)(model, programs, 0)
    answers, foretold = guided_by_hand(model, programs, before=policy is GUIDED_EARLY)
    assert losses.total.item() == pytest.approx((answers + foretold).item(), rel=1e-9)
    out = model(programs.ids[3:])
    assert len(out.trace.depth.unique()) > 2
    assert losses.trace.depth.equal(out.trace.depth)
    assert losses.at_exit.item() == pytest.approx(train.cross_entropy(out, programs.values[3:]).item(), rel=1e-9)
    names, weights = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad(losses.total, weights)
    of_answers = torch.autograd.grad(answers, weights, allow_unused=True)
    of_gates = torch.autograd.grad(foretold, weights, allow_unused=True)
    for name, grad, *parts in zip(names, got, of_answers, of_gates, strict=True):
        mine, other = parts[::-1] if name.startswith("looped.gate.") else parts
        torch.testing.assert_close(grad, mine, rtol=1e-8, atol=1e-12)
        assert other is None  # the gates learn from states that they do not shape


def test_guided_gates_start_at_what_a_guess_has_to_gain_and_leave_one_iteration_late() -> None:
    model, programs = Interpreter(PROGRAMS.sizes), some(4)
    GUIDED.attach(model, 0.2)
    assert model(programs.ids).trace.scores.mean().item() == pytest.approx(math.log(5), abs=0.2)
    for i, last in enumerate(last_maps(model.looped.gate)):
        nn.init.zeros_(last.weight)
        last.bias.data.fill_(0.3 if i < 2 else 0.1)
    assert (model(programs.ids).trace.depth == 4).all()  # the third score says so; the fourth iteration shows it


def test_gates_that_read_the_state_before_score_the_input_first() -> None:
    model, programs = Interpreter(PROGRAMS.sizes), some(4)
    GUIDED_EARLY.attach(model, 0.2)
    out, x = model(programs.ids, depth=STEPS, every=True), model.embed(programs.ids)
    states = [x, *the(Tensor, model.looped(x, min_depth=STEPS, states=True).states).unbind(2)]
    for i, mlp in enumerate(the(Gains, model.looped.gate).mlps):
        torch.testing.assert_close(out.trace.scores[..., i], mlp(states[i]).squeeze(-1))
    for last in last_maps(model.looped.gate):
        nn.init.zeros_(last.weight)
        last.bias.data.fill_(0.1)
    assert (model(programs.ids).trace.depth == 1).all()


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [train.schedule(step, 2500) for step in range(2500)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[99] == max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert [train.schedule(step, 1) for step in range(1)] == [1.0]


# The mixture


def test_prose_and_programs_share_no_ids_and_no_answers() -> None:
    text = b"Not a program; 7: 2x(3)" * 5
    windows = torch.tensor([list(text[i : i + 97]) for i in (0, 3)])
    prose = mixture.prose_of(windows)
    assert prose.ids.shape == prose.values.shape == (2, 96)
    assert bytes((prose.ids[1] - 101).tolist()) == text[3:99]
    assert bytes((prose.values[1] - 5).tolist()) == text[4:100]
    model = mixture.mixed()
    assert model.tokens.num_embeddings == 101 + 256 and model.head[-1].out_features == 5 + 256
    assert model.positions.num_embeddings == 96


def test_a_step_sees_prose_and_programs_and_weighs_them_alike() -> None:
    data = torch.arange(40).repeat(10).to(torch.uint8)  # each byte is one more than the last
    seen = []

    def objective(model: Interpreter, programs: train.Lines, step: int) -> train.Losses:
        seen.append((programs, step))
        trace: Any = len(seen)
        return train.Losses(torch.tensor(float(len(seen))), torch.tensor(7.0 * len(seen)), trace)

    nobody: Any = None
    losses: object = mixture.on_both(objective, nobody, data, torch.Generator().manual_seed(3), 9)
    prose, programs = sorted((part for part, _ in seen), key=lambda part: -part.ids.max())
    assert prose.ids.shape == (8, 96) and programs.ids.shape == (64, 24)
    assert ((prose.ids - 101 + 1) % 40).equal(prose.values - 5)
    assert programs.ids.max() < 101 and [step for _, step in seen] == [9, 9]
    assert losses == (1.5, 7.0, 1)  # half and half; and what is shown is the programs'


def test_the_mixture_is_judged_at_each_price_by_the_same_weights() -> None:
    torch.manual_seed(0)
    model, programs = mixture.mixed(), some(12)
    GUIDED.attach(model, 0.0)
    for last in last_maps(model.eval().looped.gate):
        last.weight.data.normal_(std=0.5)
        last.bias.data.fill_(0.1)
    text = torch.randint(256, (5, 97), generator=torch.Generator().manual_seed(0))
    prose = mixture.prose_of(text)
    rows = mixture.judge(model, programs, prose)
    assert list(rows) == list(mixture.PRICES) and len({row.nats_depth for row in rows.values()}) == 5
    for price, row in rows.items():
        model.looped.rule = ad.Lookahead(ad.Threshold(price))
        out = model(programs.ids)
        assert row.right == pytest.approx((out.logits.argmax(-1) == programs.values).double().mean().item())
        pairs = (programs.needed.flatten().tolist(), out.trace.depth.flatten().tolist())
        assert row.depth == pytest.approx(statistics.mean(pairs[1]))
        assert row.rank == pytest.approx(slow_correlation(*pairs))
        full = model(programs.ids, depth=6).logits.argmax(-1) == programs.values
        assert row.right_full == pytest.approx(full.double().mean().item())

        def nats(depth: int | None = None) -> float:
            logits = model(text[:, :-1] + 101, depth=depth).logits
            return -logits.log_softmax(-1).gather(-1, text[:, 1:, None] + 5).mean().item()

        mean = model(text[:, :-1] + 101).trace.depth.double().mean().item()
        low = int(mean)
        assert row.nats_depth == pytest.approx(mean) and 2 <= mean < 6
        assert row.nats == pytest.approx(nats(), rel=1e-5)
        assert row.nats_full == pytest.approx(nats(6), rel=1e-5)
        assert row.nats_fixed == pytest.approx((1 - mean + low) * nats(low) + (mean - low) * nats(low + 1), rel=1e-5)


def test_a_quick_mixture_says_what_it_read_and_what_came_of_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("Some prose, and some more of it. " * 300)
    mixture.main(["--quick", "--seeds", "1", "--text", str(tmp_path / "a.txt")])
    output = capsys.readouterr().out
    assert "Prose: a.txt, the last tenth held out.\n" in output
    assert max(map(len, output.splitlines())) <= 80
    rows = cells(output)
    assert [row[0] for row in rows] == ["0.02", "0.05", "0.1", "0.2", "0.4"] * 2
    assert {row[3] for row in rows[:5]} == {row[4] for row in rows[5:]} == {"6.00"}  # four steps close no gate
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(SystemExit) as e:
        mixture.main(["--text", str(tmp_path / "b.txt")])
    assert str(e.value) == "error: the text is empty"


# Spearman


def slow_ranks(values: Sequence[int]) -> list[float]:
    return [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]


def slow_correlation(a: Sequence[int], b: Sequence[int]) -> float:
    x, y = slow_ranks(a), slow_ranks(b)
    return statistics.correlation(x, y)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=30))
def test_rank_correlation_is_that_of_mean_ranks(pairs: list[tuple[int, int]]) -> None:
    a, b = map(list, zip(*pairs, strict=True))
    got = ranks.rank_correlation(torch.tensor(a), torch.tensor(b))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(got)
    else:
        assert got == pytest.approx(slow_correlation(a, b), abs=1e-12)


def test_tied_ranks_are_shared() -> None:
    assert ranks.ranks(torch.tensor([3, 1, 3, 2, 3])).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]
    assert ranks.rank_correlation(torch.tensor([1, 2, 3]), torch.tensor([30, 20, 10])) == pytest.approx(-1)


def test_rank_correlation_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randint(1, 7, (2, 500), generator=torch.Generator().manual_seed(0))
    assert ranks.rank_correlation(a, b) == pytest.approx(stats.spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-12)


# Rows


def slow(model: Interpreter, sample: Sample, depth: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What is right, its nats and its depth, sequence by sequence."""
    outs = [
        model(sample.ids[i : i + 1], depth=None if depth is None else depth[i : i + 1]) for i in range(len(sample.ids))
    ]
    logits = torch.cat([out.logits for out in outs])
    nats = -logits.log_softmax(-1).gather(-1, sample.values.unsqueeze(-1)).squeeze(-1)
    return logits.argmax(-1) == sample.values, nats, torch.cat([out.trace.depth for out in outs])


def test_a_row_is_what_the_policy_does_to_the_tokens_that_count() -> None:
    model, sample = uneven(tau=0.4), some(40)
    counted = torch.rand(40, 24, generator=torch.Generator().manual_seed(5)) < 0.7
    sample = sample._replace(counted=counted)
    row = study.row_of("some", model, sample, evaluate.measure(model, sample), 6)
    right, nats, depth = slow(model, sample)
    assert set(depth.flatten().tolist()) == {1, 2, 3, 4, 5, 6}
    pairs = list(zip(sample.needed[counted].tolist(), depth[counted].tolist(), strict=True))
    assert (row.name, row.tau) == ("some", None)
    assert row.accuracy == pytest.approx(right[counted].double().mean().item())
    assert row.loss == pytest.approx(nats[counted].mean().item(), rel=1e-5)
    assert row.depth == pytest.approx(depth.double().mean().item())  # of all
    assert row.rank == pytest.approx(slow_correlation(*zip(*pairs, strict=True)))
    assert row.matrix == [[pairs.count((n, u)) for u in range(1, 7)] for n in range(1, 7)]
    by_needed = [right[counted & (sample.needed == n)].double().mean().item() for n in range(1, 7)]
    assert row.right == pytest.approx(by_needed)
    assert row.shown == depth[:3].tolist()


def test_flops_are_those_of_a_hand_count() -> None:
    """A product of `(n, a)` and `(a, b)` is 2·n·a·b; attention multiplies each query with all 24 keys, twice."""

    def layer(dim: int) -> int:
        return 2 * dim * 12 * dim + 2 * 2 * 24 * dim

    head = 2 * 64 * 5
    depth = torch.tensor([[1, 3, 6] * 8] * 2)  # 1, 3 and 5 of them have a score
    model = Interpreter(PROGRAMS.sizes)
    assert evaluate.flops(model, depth) == pytest.approx(layer(64) * 10 / 3 + head)
    narrow = 2 * 64 * 16 + 2 * 16
    narrow_gates = ("guided gates", "guided gates, early", "survival gates")
    gates = {**dict.fromkeys(narrow_gates, narrow), "entropy late, trained": head}
    for policy in TRAINED:
        policy.attach(model, policy.tau)
        gate = gates.get(policy.name, 2 * 64 * 256 + 2 * 256)
        assert evaluate.flops(model, depth) == pytest.approx(layer(64) * 10 / 3 + head + gate * (1 + 3 + 5) / 3)
    ones = torch.ones(2, 24, dtype=torch.int64)
    assert evaluate.flops(Interpreter(PROGRAMS.sizes, Shape(1, layers=4)), ones) == 4 * layer(64) + head
    assert evaluate.flops(Interpreter(PROGRAMS.sizes, Shape(1, dim=128)), ones) == layer(128) + 2 * head
    assert wide(PROGRAMS) == 128  # 4 layers of 64 hold as many weights


def test_cut_at_each_depth_is_every_token_at_that_depth() -> None:
    model, sample = uneven(), some(6)
    for depth, got in enumerate(evaluate.cut(model, sample), 1):
        right, nats, used = slow(model, sample, torch.full_like(sample.ids, depth))
        assert got.right.equal(right) and got.depth.equal(used)
        torch.testing.assert_close(got.nats, nats)


def test_the_mean_depth_of_a_readout_is_fitted() -> None:
    model, others = uneven(), some(40)
    values = evaluate.thresholds(model, SURVIVAL, others)
    assert values == sorted(values) and len(values) == 513
    tau = the(float, evaluate.highest(model, SURVIVAL, others, lambda exits: exits.mean_depth >= 3.5))
    means = []
    for model.looped.rule in map(ad.SurvivalThreshold, (tau, values[values.index(tau) + 1])):
        means.append(evaluate.measure(model, others).mean_depth)
    assert means[0] >= 3.5 > means[1] > 3.3
    assert evaluate.highest(model, SURVIVAL, others, lambda exits: False) is None
    assert evaluate.highest(model, SURVIVAL, others, lambda exits: True) == values[-1]


@pytest.mark.parametrize(("depth", "expected"), [(1.0, 0.1), (2.5, 0.35), (5.0, 0.8), (5.75, 0.95), (6.0, 1.0)])
def test_between_two_depths_is_a_straight_line(depth: float, expected: float) -> None:
    assert evaluate.between([0.1, 0.3, 0.4, 0.5, 0.8, 1.0], depth) == pytest.approx(expected)


def test_times_are_the_best_of_rounds_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    clock = iter([0, 5, 10, 11, 20, 22, 30, 39])  # 5, 1; then 2, 9
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    runs = {name: partial(ran.append, name) for name in "ab"}
    assert evaluate.seconds(runs, 2) == {"a": 2, "b": 1}
    assert ran == ["a", "b", "a", "b"]


# The study


def test_every_row_appears_once_and_from_the_same_weights(small: Store) -> None:
    assert study.row_names(SMALL) == ROWS
    assert all(small.row(name) is not None for name in ROWS)
    full, deepest = (the(dict, small.weights(name)) for name in (FULL, "trained at depth 3"))
    assert not full["head.1.weight"].equal(deepest["head.1.weight"])
    torch.manual_seed(0)
    model = Interpreter(SMALL.sizes, Shape(3))
    for number in (1, 2):
        samples = train.batches(SMALL, stream(0, number - 1))
        assert len(list(train.stage(model, number, 2, samples, train.at_exits))) == 2
        if number == 1:
            assert all(full[name].equal(weight) for name, weight in model.state_dict().items())
    assert all(deepest[name].equal(weight) for name, weight in model.state_dict().items())
    timed = set(ROWS) - {SHUFFLED, RANDOM, ORACLE, "needed depth, trained in"}
    assert set(the(dict, small.seconds())) == timed and min(the(dict, small.seconds()).values()) > 0


def test_all_models_see_the_same_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, list[Tensor]] = {}
    model = ""
    optimise = train.optimise

    def watched(*args: Any) -> Iterator[train.Progress]:
        interpreter = args[0]
        handle = interpreter.register_forward_pre_hook(lambda module, given: seen[model].append(given[0]))
        yield from optimise(*args)
        handle.remove()

    monkeypatch.setattr(train, "optimise", watched)
    store = study.store_of(tmp_path, SMALL, 0, TINY)
    for model, what in models(SMALL).items():
        seen[model] = []
        assert len(list(study._train(SMALL, 0, what, TINY, store))) == sum(what.stages(TINY).values())
        if model in (GUIDED.name, GUIDED_EARLY.name):  # half with and half without exits
            halves = seen[model]
            seen[model] = [torch.cat(halves[i : i + 2]) for i in (0, 2)]
    first, second = seen[FULL], seen[SURVIVAL.name]
    assert len(first) == len(second) == 2
    for model, what in models(SMALL).items():
        taken = iter(seen[model])
        for number, steps in what.stages(TINY).items():
            assert steps == (3 if "longer" in model else 2)  # as many FLOPs as three iterations
            each = list(itertools.islice(taken, steps))
            assert len(each) == steps
            assert all(a.equal(b) for a, b in zip(each, {1: first, 2: second}[number], strict=False)), model
        assert not list(taken)


def test_what_is_done_is_not_done_again_and_gives_the_same(small: Store, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in small.folder.iterdir()}
    said = done(SMALL, TINY, small)
    assert [row.name for row in said if isinstance(row, Row)] == ROWS
    assert not [now for now in said if isinstance(now, Now)]
    assert {path: path.stat().st_mtime_ns for path in small.folder.iterdir()} == before
    assert [study.left(SMALL, unit, TINY, small) for unit in study.units(SMALL)] == [0] * 17
    fresh = study.store_of(tmp_path, SMALL, 0, TINY)
    expected = [*[2] * 6, 4, 4, 2, 4, 2, 4, 6, 4, 2, 2, 0]
    assert [study.left(SMALL, unit, TINY, fresh) for unit in study.units(SMALL)] == expected


def test_an_interrupted_study_goes_on_with_the_same_rows(small: Store, tmp_path: Path) -> None:
    store = study.store_of(tmp_path, SMALL, 0, TINY)
    steps = study.work(SMALL, 0, FULL, TINY, store)
    assert isinstance(next(steps), Now)  # and no more: it begins again
    assert store.weights(FULL) is None
    for unit in (FULL, GUIDED.name):
        list(study.work(SMALL, 0, unit, TINY, store))
    for name in (SHUFFLED, GUIDED.name):
        next(store.folder.glob(re.sub(r"\W+", "-", name) + ".json")).unlink()
    said = list(study.work(SMALL, 0, GUIDED.name, TINY, store))
    assert [row.name for row in said if isinstance(row, Row)] == ROWS[:4] and len(said) == 4
    assert [store.row(name) for name in ROWS[:4]] == [small.row(name) for name in ROWS[:4]]
    assert not list(store.folder.glob("*.part"))


@pytest.mark.parametrize(
    ("task", "plan", "what"),
    [
        (SMALL, TINY._replace(steps_2=3), "steps_2 2, this run has 3"),
        (SMALL, TINY._replace(judged=25), "judged 24, this run has 25"),
        (Programs("small", 8, 3, 3, (1, 3), 2), TINY, "task fixed [1, 2, 3], this run has [1, 3]"),
    ],
)
def test_rows_of_other_settings_are_refused(small: Store, task: Task, plan: Plan, what: str) -> None:
    other = study.store_of(small.folder.parent.parent, task, 0, plan)
    for read, path in (
        (lambda: other.row(GUIDED.name), "guided-gates.json"),
        (lambda: other.weights(FULL), "full-depth.pt"),
        (other.seconds, "seconds.json"),
    ):
        with pytest.raises(OtherSettings) as e:
            read()
        expected = f"{small.folder / path} was made with {what}. Give it another --out, or remove the file."
        assert str(e.value) == expected


def test_a_recipe_that_changes_is_noticed(small: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "K_MAX", 0.7)
    with pytest.raises(OtherSettings, match=r"K_MAX 0\.5, this run has 0\.7"):
        study.store_of(small.folder.parent.parent, SMALL, 0, TINY).row(GUIDED.name)


def test_shuffled_depths_are_each_sequences_own_in_another_order() -> None:
    model, sample = uneven(), some(40)
    exits = evaluate.measure(model, sample)
    depths = study._instead(sample, exits, STEPS, torch.Generator().manual_seed(3))
    shuffled = depths[SHUFFLED]
    assert shuffled.sort(1).values.equal(exits.depth.sort(1).values)
    moved = (shuffled != exits.depth).any(1)
    assert moved[(exits.depth.amax(1) > exits.depth.amin(1))].double().mean() > 0.9
    assert len({tuple(row.argsort(stable=True).tolist()) for row in shuffled}) > 20  # not one order for all
    assert depths[RANDOM].double().mean().item() == pytest.approx(exits.mean_depth, abs=0.2)
    assert depths[ORACLE].equal(sample.needed)


def test_the_rows_of_given_depths_are_those_weights_at_those_depths(small: Store) -> None:
    by_name: dict[str, Model] = models(SMALL)
    sample = judged(SMALL, 0, TINY)
    needed = study.load(SMALL, 0, by_name["needed depth, trained in"], small)
    right, nats, depth = slow(needed, sample, sample.needed)
    row = the(Row, small.row("needed depth, trained in"))
    assert row.accuracy == pytest.approx(right.double().mean().item())
    assert row.loss == pytest.approx(nats.mean().item(), rel=1e-5)
    assert row.rank == pytest.approx(1) and row.shown == depth[:3].tolist() == sample.needed[:3].tolist()
    for fixed in (1, 2, 3):
        row = the(Row, small.row(f"trained at depth {fixed}"))
        assert row.depth == fixed and row.rank is None
    assert the(Row, small.row(ORACLE)).depth == row_mean(sample.needed)
    bounded = study.load(SMALL, 0, by_name["at most 2, by kind and place"], small)
    right, nats, depth = slow(bounded, sample, torch.where(sample.ids < 5, 1, 2))  # constants, and functions
    row = the(Row, small.row("at most 2, by kind and place"))
    assert (row.accuracy, row.loss) == pytest.approx((right.double().mean().item(), nats.mean().item()), rel=1e-5)
    assert row.depth == row_mean(depth)


def test_the_model_of_needed_depths_is_trained_at_them(small: Store) -> None:
    model = Interpreter(SMALL.sizes, Shape(3))
    model.load_state_dict(the(dict, small.weights(FULL)))
    samples = train.batches(SMALL, stream(0, 1))

    def step(_: int) -> train.Losses:
        sample = next(samples)
        out = model(sample.ids, depth=sample.needed)
        loss = train.cross_entropy(out, sample.values)
        return train.Losses(loss, loss, out.trace)

    assert len(list(train.optimise(model, 2, train.RATES[2], step))) == 2
    weights = the(dict, small.weights("needed depth, trained in"))
    assert all(weights[name].equal(weight) for name, weight in model.state_dict().items())


def row_mean(depth: Tensor) -> float:
    return depth.double().mean().item()


def test_readouts_are_not_fitted_on_what_they_are_judged_on(small: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def read(*args: Any) -> Iterator[Row]:
        given.extend(args)
        return iter(())

    monkeypatch.setattr(study, "_read", read)
    model, sample = models(SMALL)["prior over depths"], judged(SMALL, 0, TINY)
    assert not list(study.judge(SMALL, 0, model, study.load(SMALL, 0, model, small), sample, TINY, small))
    assert given[1] is sample and given[2].ids.equal(SMALL.draw(16, stream(0, 3)).ids)
    assert not given[2].ids.equal(sample.ids[:16])


def test_readouts_are_fitted_on_other_sequences_to_the_depth_of_the_gates(small: Store, tmp_path: Path) -> None:
    store = study.store_of(tmp_path, SMALL, 0, TINY)
    store.keep_row(the(Row, small.row(GUIDED.name))._replace(depth=1.7))
    torch.manual_seed(1)
    model, others = Interpreter(SMALL.sizes, Shape(3)).eval(), some(100, seed=1, task=SMALL)
    sample = some(100, seed=2, task=SMALL)
    rows = list(study._read(model, sample, others, store))
    assert [row.name for row in rows] == [name for name in ROWS if name.startswith("prior, ")]
    for row, policy in zip(rows, READOUTS, strict=True):
        policy.attach(model, the(float, row.tau))
        assert evaluate.measure(model, others).mean_depth >= 1.7
        if policy.name != "entropy late":  # which goes at least 2 deep
            assert row.depth == pytest.approx(1.7, abs=0.15)


# Verdicts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=5), st.integers(0, 20))
def test_the_mixture_is_the_best_of_all_shares(places: list[tuple[int, int]], twice: int) -> None:
    cost, rows = twice / 2, [some_row(0, "a")._replace(flops=f, accuracy=a, loss=-a) for f, a in places]
    got = verdicts.mixture(rows, cost)
    shares = [i / 360 for i in range(361)]
    tried = [
        (1 - share) * a + share * b
        for f, a in places
        for g, b in places
        for share in shares
        if (1 - share) * f + share * g <= cost + 1e-9
    ]
    best = max(tried) if tried else max(a for f, a in places if f == min(places)[0])
    if tried:
        assert best - 1e-9 <= got.accuracy <= best + 9 / 360
        assert got.loss == pytest.approx(-got.accuracy)
    else:
        assert got.accuracy in [a for f, a in places if f == min(places)[0]]


def test_the_mixture_is_not_of_neighbours_alone() -> None:
    rows = [some_row(0, "a")._replace(flops=f, accuracy=a, loss=1 - a) for f, a in ((1, 0.2), (2, 0.3), (3, 0.8))]
    assert verdicts.mixture(rows, 2) == pytest.approx((0.5, 0.5))
    assert verdicts.mixture(rows, 9) == pytest.approx((0.8, 0.2))
    assert verdicts.mixture(rows, 0.5) == pytest.approx((0.2, 0.8))


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([(2.0, 1.0), (3.0, 1.9), (4.0, 3.1)], "+1.00 ± 0.06, above by 17.3 standard errors"),
        ([(1.0, 2.0), (1.9, 3.0), (3.1, 4.0)], "-1.00 ± 0.06, below by 17.3 standard errors"),
        ([(1.0, 2.0), (3.0, 1.0), (1.0, 1.5)], "+0.17 ± 0.93, no difference seen"),
        ([(1.0, 1.0), (2.0, 2.0)], "+0.00 ± 0.00, no difference seen"),
        ([(2.0, 1.0), (3.0, 2.0)], "+1.00 ± 0.00, above by inf standard errors"),
        ([(2.0, 1.0)], "+1.00 (one seed)"),
    ],
)
def test_a_difference_is_said_in_words(pairs: list[tuple[float, float]], words: str) -> None:
    assert verdicts.said(verdicts.difference(pairs), ".2f") == words


def test_verdicts_are_of_pairs_at_equal_flops() -> None:
    def rows(seed: int) -> dict[str, Row]:
        fixed = [(1, 0.5), (2, 0.7), (3, 0.99 + seed / 100)]
        made = [some_row(seed, f"trained at depth {d}")._replace(flops=d, accuracy=a, loss=1 - a) for d, a in fixed]
        names = ["at most 2, by kind and place", "at most 3, by kind and place"]
        made += [some_row(seed, name)._replace(flops=2.5, accuracy=0.6, loss=0.4) for name in names]
        gates = some_row(seed, GUIDED.name)._replace(flops=2.0, accuracy=0.9 + seed / 100, loss=0.1)
        return {row.name: row for row in [*made, gates]}

    said = [each.sentence for each in verdicts.verdicts(SMALL, [rows(0), rows(1), rows(2)])]
    assert said == [
        "guided gates − best mixture of two without gates (FLOPs × 1.00): accuracy, points +16.00 ± 0.29, above by "
        "55.4 standard errors; loss -0.1500 ± 0.0029, below by 52.0 standard errors.",
        "guided gates − trained at depth 3 (FLOPs × 0.67): accuracy, points -9.00 ± 0.00, below by inf standard errors"
        "; loss +0.1000 ± 0.0058, above by 17.3 standard errors.",
        *(
            f"guided gates − {name} (FLOPs × 0.80): accuracy, points +31.00 ± 0.58, above by 53.7 standard errors; "
            "loss -0.3000 ± 0.0000, below by inf standard errors."
            for name in ("at most 2, by kind and place", "at most 3, by kind and place")
        ),
    ]


# The command


def cells(output: str) -> list[list[str]]:
    """The cells of every table row; what stands on a second line is joined to the first."""
    found: list[list[str]] = []
    for line in output.splitlines():
        for part in re.split("(?<=│) {4}(?=│)", line.strip()) if line.startswith("│") else ():
            row = [cell.strip() for cell in part.split("│")[1:-1]]
            if found and (not row[0] or not row[1] or row[1].startswith("±")):
                found[-1] = [f"{above} {below}".strip() for above, below in zip(found[-1], row, strict=True)]
            else:
                found.append(row)
    return found


def number(cell: str) -> float:
    return float(cell.removesuffix("%")) / (100 if cell.endswith("%") else 1)


def some_row(seed: int, name: str, steps: int = 3) -> Row:
    generator = torch.Generator().manual_seed(100 * seed + len(name))
    matrix = torch.randint(1, 50, (steps, steps), generator=generator)
    needed, used = (matrix.nonzero() + 1).repeat_interleave(matrix.flatten(), 0).unbind(1)
    shares = torch.rand(3 + steps, generator=generator).tolist()
    return Row(
        name=name,
        accuracy=shares[0],
        loss=shares[1],
        depth=used.double().mean().item(),
        flops=1000 * (100 + 300 * shares[2]),
        rank=ranks.rank_correlation(needed, used),
        tau=None,
        right=[*shares[4:], None],
        matrix=matrix.tolist(),
        shown=[[1 + seed % 3] * 8] * 3,
    )


def some_seed(seed: int) -> Seed:
    rows = {name: some_row(seed, name) for name in ROWS}
    return Seed(rows, {name: (1 + seed) / (1 + len(name)) for name in ROWS[:-1]})


def test_every_printed_figure_is_that_of_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    results = {seed: some_seed(seed) for seed in (0, 3, 4)}
    report.show(Console(width=80), SMALL, results, "a note")
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80 and output.startswith("a note\n")
    rows = cells(output)
    for name in ROWS:
        said, *printed = rows.pop(0)
        assert said == name
        figures = [
            [getattr(seed.rows[name], key) for seed in results.values()] for key in ("accuracy", "loss", "depth")
        ]
        figures.append([seed.rows[name].flops / 1000 for seed in results.values()])
        mixed = [verdicts.mixture_of(SMALL, seed.rows, name) for seed in results.values()]
        gateless = name.startswith("trained at") or name.endswith("place")
        figures.append([] if gateless else [the(verdicts.Mixture, each).accuracy for each in mixed])
        figures.append([the(float, seed.rows[name].rank) for seed in results.values()])
        figures.append([seed.seconds[name] for seed in results.values() if name in seed.seconds])
        for cell, values, near in zip(printed, figures, (1e-4, 1e-4, 6e-3, 0.6, 1e-4, 6e-4, 6e-3), strict=True):
            if not values:
                assert cell == "–"
                continue
            mean, spread = cell.split(" ±")
            assert number(mean) == pytest.approx(statistics.mean(values), abs=near), name
            error = statistics.stdev(values) / len(values) ** 0.5
            assert number(spread) == pytest.approx(error, abs=near), name
    for name in ROWS:
        means = [statistics.mean(the(float, seed.rows[name].right[i]) for seed in results.values()) for i in range(2)]
        assert rows.pop(0) == [name, *(f"{mean:.0%}" for mean in means), "–"]
    expected = []
    for name, needed in itertools.product([name for name in ROWS if name in OURS], range(3)):
        counts = [sum(seed.rows[name].matrix[needed][u] for seed in results.values()) for u in range(3)]
        expected.append([str(needed + 1), *(f"{count / sum(counts):.0%}" for count in counts)])
    assert sorted(rows) == sorted(expected)  # side by side


def test_figures_of_one_seed_and_figures_that_are_none() -> None:
    assert report.figure([0.12345], ".2%") == "12.35%"
    assert report.figure([0.5, None], ".3f") == "–"
    assert report.figure([1.0, 3.0], ".2f") == "2.00\n±1.00"


def run_here(job: workers.Job, seeds: Sequence[int], processes: int) -> Said:
    """All units, without processes."""
    task = TASKS[job.task]
    for seed in seeds:
        for unit in study.units(task):
            for said in study.work(task, seed, unit, job.plan, study.store_of(job.out, task, seed, job.plan)):
                yield seed, said


@pytest.fixture
def small_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command knows the small task, and does its work here."""
    monkeypatch.setitem(TASKS, "small", SMALL)
    monkeypatch.setattr(command, "QUICK", TINY)
    monkeypatch.setattr(command, "run", run_here)


@pytest.mark.usefixtures("small_command")
def test_a_quick_run_has_a_page_and_says_that_it_means_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: Store
) -> None:
    shutil.copytree(small.folder, tmp_path / "small" / "seed-0")  # nothing is left to do
    command.main(["--task", "small", "--quick", "--seeds", "0", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert f"{command.CAVEAT}\n" in output
    assert [row[0] for row in cells(output)[: len(ROWS)]] == ROWS
    path = tmp_path / "small.html"
    assert output.splitlines()[-1] == str(path)
    page = path.read_text()
    assert "http" not in page.replace("http://www.w3.org", "") and command.CAVEAT in page
    lines = [line.replace(" ", "\u00a0") for line in SMALL.text(judged(SMALL, 0, TINY).ids[0].tolist())]
    assert all(f"{line} " in page for line in lines) and page.count("<svg") == 6
    with (tmp_path / "small.csv").open(encoding="utf-8") as file:
        numbers = {line["policy"]: line for line in csv.DictReader(file)}
    assert list(numbers) == ROWS and {line["seed"] for line in numbers.values()} == {"0"}
    for name, line in numbers.items():
        row = the(Row, small.row(name))
        read = [line["right"], line["nats"], line["depth"], line["rank"]]
        assert read == [str(row.accuracy), str(row.loss), str(row.depth), "" if row.rank is None else str(row.rank)]
        assert float(line["kFLOPs"]) == row.flops / 1000
        assert line["s"] == str(the(dict, small.seconds()).get(name, ""))
    with pytest.raises(SystemExit) as e:
        command.main(["--task", "small", "--quick", "--steps1", "9", "--seeds", "0", "--out", str(tmp_path)])
    assert str(e.value).startswith(f"error: {tmp_path / 'small' / 'seed-0'}")
    assert str(e.value).endswith("steps_1 2, this run has 9. Give it another --out, or remove the file.")


ERRORS = {
    "--steps1 0": "error: --steps1 expected at least 1, got 0",
    "--steps2 -3": "error: --steps2 expected at least 1, got -3",
    "--processes 0": "error: --processes expected at least 1, got 0",
    "--seeds 1 2 1": "error: --seeds expected different numbers from 0 to 2**32 - 1, got 1 2 1",
    "--seeds -1": "error: --seeds expected different numbers from 0 to 2**32 - 1, got -1",
    "--seeds 4294967296": "error: --seeds expected different numbers from 0 to 2**32 - 1, got 4294967296",
}


@pytest.mark.parametrize("args", ERRORS)
def test_bad_numbers_are_refused_in_one_line(args: str) -> None:
    with pytest.raises(SystemExit) as e:
        command.main(args.split())
    assert str(e.value) == ERRORS[args]


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as e:
        command.main(["--out", str(tmp_path / "file")])
    assert str(e.value) == f"error: cannot write to {tmp_path / 'file'}: Not a directory"


def interrupted(*units: str, fails: bool = False) -> Callable[..., Said]:
    def run(job: workers.Job, seeds: Sequence[int], processes: int) -> Said:
        store = study.store_of(job.out, SMALL, seeds[-1], job.plan)
        for unit in units:
            for said in study.work(SMALL, seeds[-1], unit, job.plan, store):
                yield seeds[-1], said
        if fails:
            raise workers.Failed("seed 1, KL ended with exit code 1")
        raise KeyboardInterrupt

    return run


STOPPED = "this is what is complete. The same command goes on from here."


@pytest.mark.usefixtures("small_command")
def test_an_interrupt_shows_what_is_complete(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "run", interrupted(FULL, "trained at depth 1"))
    command.main(["--task", "small", "--quick", "--seeds", "0", "2", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert f"Stopped; {STOPPED}" in " ".join(output.split()) and "seed 2, trained at depth 1: " in output
    assert cells(output)[0][0] == "trained at depth 1"
    assert output.splitlines()[-1] == str(tmp_path / "small.html")
    monkeypatch.setattr(command, "run", interrupted("trained at depth 2", fails=True))
    with pytest.raises(SystemExit) as e:
        command.main(["--task", "small", "--quick", "--seeds", "0", "2", "--out", str(tmp_path)])
    assert e.value.code == 1
    output = capsys.readouterr().out
    assert f"error: seed 1, KL ended with exit code 1; {STOPPED}" in " ".join(output.split())
    assert [row[0] for row in cells(output)[:2]] == ["trained at depth 1", "trained at depth 2"]


@pytest.mark.usefixtures("small_command")
def test_an_interrupt_before_anything_is_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "run", interrupted())
    with pytest.raises(SystemExit) as e:
        command.main(["--task", "small", "--quick", "--out", str(tmp_path)])
    assert str(e.value) == "Stopped before any row was complete."


def test_the_command_runs_fresh_seeds_and_a_quick_run_one() -> None:
    parsed = command.arguments([])
    assert (parsed.task, parsed.seeds, parsed.out) == ("programs", [20, 21, 22, 23, 24], Path("out/programs"))
    assert command.plan_of(parsed) == Plan(2500, 1500)
    assert command.plan_of(command.arguments(["--task", "deep", "--steps2", "9"])) == Plan(5000, 9)
    quick = command.arguments(["--quick"])
    assert (quick.seeds, quick.out) == ([20], Path("out/programs-quick"))
    assert command.plan_of(quick).steps_1 < 10


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.every)])
def test_units_run_after_those_they_need_and_a_process_that_fails_is_named(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forked: bool
) -> None:
    if forked and not torch.cuda.is_available():  # copies of this process, which has imported everything
        fork = multiprocessing.get_context("fork")
        monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    after = study.units(PROGRAMS)
    assert after["guided gates"] == {FULL} and after["prior over depths"] == {FULL, "guided gates"}
    assert after["trained at depth 1"] == set() and after["trained at depth 6"] == {FULL}
    assert after["times"] == set(after) - {"times"}
    assert workers._ready((0, "guided gates"), after, {(0, FULL)})
    assert not workers._ready((0, "guided gates"), after, {(1, FULL)})
    running = workers.run(workers.Job("programs", Plan(10**6, 10**6), tmp_path), [0, 1], processes=1)
    seed, now = next(running)
    assert isinstance(now, Now) and (seed, now.doing) == (0, FULL)
    assert len(multiprocessing.active_children()) == 1
    running.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(workers.Failed) as e:
        list(workers.run(workers.Job("programs", TINY, tmp_path), [2**70], processes=1))
    assert str(e.value) == f"seed {2**70}, full depth ended with exit code 1"
    assert "Overflow" in capfd.readouterr().err
