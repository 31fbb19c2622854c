"""The algorithmic task in examples/programs: the task, its model, its training, its figures, and what it refuses."""

import itertools
import math
import multiprocessing
import re
import statistics
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import cache
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
from examples.programs import evaluate, mixture, ranks, report, study, task, train, workers
from examples.programs.model import STEPS, Block, Interpreter, Prediction
from examples.programs.policies import GUIDED, PAPER, SURVIVAL, TRAINED, UNTRAINED, Policy, Training
from examples.programs.study import GIVEN, Now, Plan, Row

TINY = Plan(steps_1=3, steps_2=3, judged=24, fitted=16)
NAMES = [*(policy.name for policy in (*TRAINED, *UNTRAINED)), GIVEN]
VALUE: dict[str, Callable[[int], int]] = {
    "x+1": lambda x: (x + 1) % 5,
    "2x": lambda x: 2 * x % 5,
    "-x": lambda x: -x % 5,
    "swap01": lambda x: {0: 1, 1: 0}.get(x, x),
}
Said = Generator[tuple[int, Now | Row]]  # what a run says


def some(count: int, seed: int = 0) -> task.Programs:
    return task.draw(count, torch.Generator().manual_seed(seed))


def uneven(policy: Policy = SURVIVAL, tau: float = 0.3) -> Interpreter:
    """An untrained model whose lines leave at all depths."""
    torch.manual_seed(0)
    model = Interpreter()
    policy.attach(model, tau)
    for last in last_maps(model.looped.gate) if hasattr(model.looped.gate, "mlps") else []:
        last.weight.data.normal_(std=20.0)
        last.bias.data.fill_(1.0)
    return model.eval()


@cache
def trained() -> Interpreter:
    """A model after a few steps of both stages."""
    torch.manual_seed(0)
    model = Interpreter()
    for _ in train.stage_1(model, 5, torch.Generator().manual_seed(0)):
        pass
    for _ in train.stage_2(model, SURVIVAL, 5, torch.Generator().manual_seed(1)):
        pass
    return model.eval()


# The task


def test_values_and_levels_are_those_of_an_interpreter_that_reads_the_text() -> None:
    programs = some(200)
    for ids, values, levels in zip(*(part.tolist() for part in programs), strict=True):
        lines = dict(line.split(": ") for line in task.text(ids))

        def run(line: str, lines: dict[str, str] = lines) -> tuple[int, int]:
            if lines[line].isdigit():
                return int(lines[line]), 0
            function, source = the(re.Match, re.fullmatch(r"(.+)\((\d+)\)", lines[line])).groups()
            assert int(source) < int(line)
            value, level = run(source)
            return VALUE[function](value), level + 1

        assert list(lines) == [str(i) for i in range(24)]
        assert [run(line) for line in lines] == list(zip(values, levels, strict=True))


def test_a_line_is_written_as_one_writes_it() -> None:
    lines = task.text([4, 0, 5, 5 + 1, 5 + 24 + 3, 5 + 2 * 24, 5 + 3 * 24 + 23])
    assert lines == ["0: 4", "1: 0", "2: x+1(0)", "3: x+1(1)", "4: 2x(3)", "5: -x(0)", "6: swap01(23)"]


def test_programs_begin_with_constants_and_reach_every_level() -> None:
    programs = some(2000)
    assert programs.ids.shape == programs.values.shape == programs.levels.shape == (2000, 24)
    assert (programs.ids[:, :4] < 5).all() and (programs.ids[:, 4:] >= 5).all()
    assert programs.ids.max() < task.VOCABULARY == 101
    shares = programs.levels.flatten().bincount() / programs.levels.numel()
    assert len(shares) == 7 and shares.min() > 0.07
    assert programs.needed(6).double().mean().item() == pytest.approx(3.53, abs=0.02)
    assert programs.needed(6).equal(torch.minimum(programs.levels + 1, torch.tensor(6)))
    assert programs.needed(3).max() == 3


def test_programs_are_repeatable() -> None:
    assert all(a.equal(b) for a, b in zip(some(5), some(5), strict=True))
    assert not some(5).ids.equal(some(5, seed=1).ids)


def test_a_line_alone_says_nothing_of_its_value() -> None:
    a, b = some(4000), some(1000, seed=1)
    seen = torch.zeros(24, task.VOCABULARY, 5)
    places = torch.arange(24).expand_as(a.ids)
    seen.index_put_((places, a.ids, a.values), torch.ones(()), accumulate=True)
    guess = seen.argmax(-1)[places[:1000], b.ids]
    right = (guess == b.values).double().mean(0)
    assert (right[:4] == 1).all()  # constants
    assert right[4:].mean().item() == pytest.approx(0.2, abs=0.01)


# The model


def test_forced_depths_are_those_of_a_loop_by_hand() -> None:
    model, ids = uneven().double(), some(3).ids
    layer = the(Block, model.looped.block)
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


def test_a_line_is_not_told_what_comes_later() -> None:
    model, ids = uneven(), some(2).ids
    changed = ids.clone()
    changed[:, 12:] = some(2, seed=1).ids[:, 12:]
    torch.testing.assert_close(model(ids).logits[:, :12], model(changed).logits[:, :12])
    assert not torch.allclose(model(ids).logits[:, 12:], model(changed).logits[:, 12:])


@pytest.mark.parametrize("policy", [*TRAINED, *UNTRAINED], ids=lambda policy: policy.name)
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


def losses(steps: Callable[[Interpreter, torch.Generator], Iterable[train.Progress]]) -> list[train.Progress]:
    torch.manual_seed(0)
    model, generator = Interpreter(), torch.Generator().manual_seed(0)
    return list(steps(model, generator))


def test_training_is_repeatable_and_never_told_of_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(model: Interpreter, generator: torch.Generator) -> Iterator[train.Progress]:
        yield from train.stage_1(model, 3, generator)
        yield from train.stage_2(model, SURVIVAL, 3, generator)

    done = losses(both)
    assert [progress.depth for progress in done] == [6.0] * 6  # gates start open
    untold: Any = None
    monkeypatch.setattr(train, "draw", lambda *args: task.draw(*args)._replace(levels=untold))
    assert losses(both) == done


def test_the_first_step_is_the_cross_entropy_of_the_last_iteration() -> None:
    (first,) = losses(lambda model, generator: train.stage_1(model, 1, generator))
    torch.manual_seed(0)
    model, programs = Interpreter(), task.draw(64, torch.Generator().manual_seed(0))
    picked = model(programs.ids).logits.log_softmax(-1).gather(-1, programs.values.unsqueeze(-1))
    assert first.loss == pytest.approx(-picked.mean().item(), rel=1e-5)


def test_exits_are_trained_in() -> None:
    model = uneven()
    weights = the(nn.Module, model.looped.gate).state_dict()
    model.looped.gate = None
    policy = SURVIVAL._replace(training=the(Training, SURVIVAL.training)._replace(tau=0.99))  # fresh gates are at 0.98
    steps = train.stage_2(model, policy, 2, torch.Generator())
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
    traces: list[Prediction] = []
    model = uneven()
    model.register_forward_hook(lambda model, args, out: traces.append(out))
    for _ in train.stage_2(model, policy, 10, torch.Generator()):
        pass
    assert [at for _, at in seen] == list(range(10))
    for (values, _), out in zip(seen, traces, strict=True):
        assert values.equal(out.trace.survival if policy is SURVIVAL else out.trace.gates)
    assert [round(penalty(0.5, (1, 6)).k(at), 2) for at in range(8)] == [0, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5]


def guided_by_hand(model: Interpreter, programs: task.Programs) -> tuple[Tensor, Tensor]:
    """What guidance minimises without the gates' own loss, and that loss; one program and one depth at a time."""
    deep, foretold, at_exit = [], [], []
    for ids, values in zip(programs.ids[:3].split(1), programs.values[:3], strict=True):
        each = [F.cross_entropy(model(ids, depth=d).logits[0], values, reduction="none") for d in range(1, STEPS + 1)]
        deep.append(each[-1].mean() + 0.3 * sum(loss.mean() for loss in each[:-1]) / (STEPS - 1))
        scores = model(ids, depth=STEPS).trace.scores[0]
        errors = [scores[:, i] - (each[i] - each[-1]).detach() for i in range(STEPS - 1)]
        foretold.append(torch.stack([error.square().mean() for error in errors]).mean())
    for ids, values in zip(programs.ids[3:].split(1), programs.values[3:], strict=True):
        at_exit.append(F.cross_entropy(model(ids).logits[0], values))
    return torch.stack(deep + at_exit).sum() / 6, torch.stack(foretold).sum() / 6


def test_guidance_is_every_answer_of_one_half_and_the_exits_of_the_other() -> None:
    model, programs = uneven(GUIDED, tau=0.2).double(), some(6)
    losses = train.objective_of(GUIDED, 10)(model, programs, 0)
    answers, foretold = guided_by_hand(model, programs)
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
    model, programs = Interpreter(), some(4)
    GUIDED.attach(model, 0.2)
    assert model(programs.ids).trace.scores.mean().item() == pytest.approx(math.log(5), abs=0.2)
    for i, last in enumerate(last_maps(model.looped.gate)):
        nn.init.zeros_(last.weight)
        last.bias.data.fill_(0.3 if i < 2 else 0.1)
    assert (model(programs.ids).trace.depth == 4).all()  # the third score says so; the fourth iteration shows it


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
        pairs = (programs.needed(6).flatten().tolist(), out.trace.depth.flatten().tolist())
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


# Figures


def test_a_row_is_what_the_policy_does() -> None:
    model, programs = uneven(), some(40)
    tau, generator = 0.4, torch.Generator().manual_seed(7)
    row = study.judge(model, SURVIVAL, tau, programs, some(20, seed=1), generator)
    model.looped.rule = ad.SurvivalThreshold(tau)

    def run(depth: Tensor | None = None) -> tuple[float, Tensor]:
        """Program by program."""
        parts = [model(programs.ids[i : i + 1], depth=None if depth is None else depth[i : i + 1]) for i in range(40)]
        right = torch.cat([part.logits.argmax(-1) for part in parts]) == programs.values
        return right.double().mean().item(), torch.cat([part.trace.depth for part in parts])

    accuracy, depth = run()
    assert set(depth.flatten().tolist()) == {1, 2, 3, 4, 5, 6}
    fixed = [run(torch.full_like(programs.ids, d))[0] for d in range(1, 7)]
    mean = depth.double().mean().item()
    low = int(mean)
    needed = programs.needed(6)
    pairs = list(zip(needed.flatten().tolist(), depth.flatten().tolist(), strict=True))
    drawn = ad.uniform_depths((40, 24), 6, mean, torch.Generator().manual_seed(7))
    assert row.policy == "survival gates"
    assert row.accuracy == pytest.approx(accuracy)
    assert row.full == pytest.approx(fixed[5])
    assert row.mean_depth == pytest.approx(mean)
    assert row.correlation == pytest.approx(slow_correlation(*zip(*pairs, strict=True)))
    assert row.by_depth == pytest.approx(fixed)
    assert row.fixed == pytest.approx(fixed[low - 1] + (mean - low) * (fixed[low] - fixed[low - 1]))
    assert row.random == pytest.approx(run(drawn)[0])
    assert row.matrix == [[pairs.count((n, u)) for u in range(1, 7)] for n in range(1, 7)]
    assert row.shown == depth[:3].tolist()


def test_what_is_saved_is_saved_at_equal_accuracy() -> None:
    model, programs, others = uneven(), some(40), some(40, seed=1)
    others = others._replace(values=model(others.ids, depth=STEPS).logits.argmax(-1))  # full depth is right
    values = evaluate.thresholds(model, SURVIVAL, others)
    assert values == sorted(values) and len(values) == 513
    enough = evaluate.fixed(model, others)[-1].accuracy - 0.002
    saved = study.saved_at_equal_accuracy(model, SURVIVAL, programs, others)
    tau = the(float, the(ad.SurvivalThreshold, model.looped.rule).tau)
    assert evaluate.measure(model, others).accuracy >= enough
    assert saved == pytest.approx(1 - evaluate.measure(model, programs).mean_depth / 6)
    assert 0 < saved < 1
    model.looped.rule = ad.SurvivalThreshold(values[values.index(tau) + 1])
    assert evaluate.measure(model, others).accuracy < enough


def test_nothing_is_saved_where_no_threshold_is_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "EQUAL", -1.0)
    assert study.saved_at_equal_accuracy(uneven(), SURVIVAL, some(4), some(4)) == 0


def test_the_mean_depth_is_fitted() -> None:
    model, others = uneven(), some(40)
    values = evaluate.thresholds(model, SURVIVAL, others)
    tau = the(float, evaluate.highest(model, SURVIVAL, others, lambda exits: exits.mean_depth >= 3.5))
    means = []
    for model.looped.rule in map(ad.SurvivalThreshold, (tau, values[values.index(tau) + 1])):
        means.append(evaluate.measure(model, others).mean_depth)
    assert means[0] >= 3.5 > means[1] > 3.3
    assert evaluate.highest(model, SURVIVAL, others, lambda exits: False) is None
    assert evaluate.highest(model, SURVIVAL, others, lambda exits: True) == values[-1]


@pytest.mark.parametrize(("mean", "expected"), [(1.0, 0.1), (2.5, 0.35), (5.0, 0.8), (5.75, 0.95), (6.0, 1.0)])
def test_fixed_depths_at_a_mean_are_mixed(mean: float, expected: float) -> None:
    rights = [0.1, 0.3, 0.4, 0.5, 0.8, 1.0]
    depths = [evaluate.Measured(torch.arange(10) < 10 * right, torch.full((10,), i)) for i, right in enumerate(rights)]
    assert evaluate.at_mean(depths, mean) == pytest.approx(expected)


def test_a_study_trains_each_policy_from_the_same_weights_and_fits_the_rest_to_survival() -> None:
    said = list(study.study(0, TINY))
    rows = [item for item in said if isinstance(item, Row)]
    steps = [item for item in said if not isinstance(item, Row)]
    assert [row.policy for row in rows] == NAMES
    assert [now.done for now in steps] == list(range(1, TINY.total + 1))
    assert [now.doing for now in steps[::3]] == ["full depth", *(policy.name for policy in TRAINED)]
    torch.manual_seed(0)
    model, programs = Interpreter(), task.draw(64, study.stream(0, 1))
    assert len(list(train.stage_1(model, 3, study.stream(0, 0)))) == 3
    at_first = train.cross_entropy(model(programs.ids), programs.values).item()
    assert steps[9].loss == pytest.approx(at_first, rel=1e-5)  # after two others were trained from these weights
    untrained = [row for row in rows if row.policy not in {policy.name for policy in TRAINED}]
    assert all(row.by_depth == untrained[0].by_depth for row in untrained)
    assert rows[-1].correlation == pytest.approx(1)
    programs = task.draw(TINY.judged, study.stream(0, 2))
    assert rows[-1].shown == programs.needed(6)[:3].tolist()
    assert all(sum(map(sum, row.matrix)) == TINY.judged * 24 for row in rows)


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


def some_row(seed: int, policy: str) -> Row:
    generator = torch.Generator().manual_seed(100 * seed + len(policy))
    shares = torch.rand(6, generator=generator).tolist()
    matrix = torch.randint(1, 50, (6, 6), generator=generator)
    needed, used = (matrix.nonzero() + 1).repeat_interleave(matrix.flatten(), 0).unbind(1)
    return Row(
        policy=policy,
        accuracy=shares[0],
        full=shares[1],
        mean_depth=used.double().mean().item(),
        correlation=ranks.rank_correlation(needed, used),
        saved=shares[2],
        fixed=shares[3],
        random=shares[4],
        by_depth=torch.rand(6, generator=generator).tolist(),
        matrix=matrix.tolist(),
        shown=[[1 + seed] * 24] * 3,
    )


def test_every_printed_figure_is_that_of_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    results = {seed: [some_row(seed, name) for name in NAMES] for seed in (0, 3, 4)}
    report.show(Console(width=80), results)
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    rows = cells(output)
    for seed, of_seed in results.items():
        for row in of_seed:
            name, *printed = rows.pop(0)
            pairs = [(n + 1, u + 1) for n in range(6) for u in range(6) for _ in range(row.matrix[n][u])]
            depth = statistics.mean(used for _, used in pairs)
            correlation = slow_correlation(*zip(*pairs, strict=True))
            figures = [row.accuracy, row.full, depth, correlation, row.saved, row.fixed, row.random]
            assert name == row.policy, seed
            assert list(map(number, printed)) == pytest.approx(figures, abs=6e-3), name
    for i, policy in enumerate(NAMES):
        name, *printed = rows.pop(0)
        group = [of_seed[i] for of_seed in results.values()]
        assert name == policy
        keys = ("accuracy", "full", "mean_depth", "correlation", "saved", "fixed", "random")
        for cell, key in zip(printed, keys, strict=True):
            mean, spread = cell.split(" ±")
            values = [getattr(row, key) for row in group]
            middle = sum(values) / 3
            assert number(mean) == pytest.approx(middle, abs=6e-3)
            assert number(spread) == pytest.approx((sum((v - middle) ** 2 for v in values) / 2) ** 0.5, abs=6e-3)
    for i, policy in enumerate([*NAMES[:4], "no exits"]):
        name, *printed = rows.pop(0)
        assert name == policy
        means = [sum(of_seed[i].by_depth[d] for of_seed in results.values()) / 3 for d in range(6)]
        assert list(map(number, printed)) == pytest.approx(means, abs=6e-5)
    for i, needed in itertools.product(range(4), range(6)):
        counts = [sum(of_seed[i].matrix[needed][u] for of_seed in results.values()) for u in range(6)]
        assert rows.pop(0) == [str(needed + 1), *(f"{count / sum(counts):.0%}" for count in counts)]
    assert not rows


def test_figures_of_one_seed_and_figures_that_are_none() -> None:
    assert report.figure([0.12345], ".2%") == "12.35%"
    assert report.figure([0.5, float("nan")], ".3f") == "–"
    assert report.figure([1.0, 3.0], ".2f") == "2.00\n±1.41"


@pytest.mark.every
def test_quick_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command.main(["--quick", "--seeds", "1", "--processes", "1", "--out", str(tmp_path / "new")])
    output = capsys.readouterr().out
    rows = cells(output)
    assert [row[0] for row in rows[: len(NAMES)]] == NAMES
    assert rows[0][3] == rows[1][3] == "6.00"  # four steps close no gate
    path = tmp_path / "new" / "programs.html"
    assert output.splitlines()[-1] == str(path)
    page = path.read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    programs = task.draw(command.QUICK.judged, study.stream(1, 2))
    lines = [line.replace(" ", "\u00a0") for line in task.text(programs.ids[0].tolist())]
    assert all(f"{line} " in page for line in lines)
    assert multiprocessing.active_children() == []


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
    assert str(e.value) == f"error: cannot write to {tmp_path / 'file'}: File exists"


def interrupted(*rows: tuple[int, Row]) -> Callable[..., Said]:
    def run(seeds: Sequence[int], plan: Plan, processes: int) -> Said:
        yield 0, Now("full depth", 1, 1.0, 6.0)
        yield from rows
        raise KeyboardInterrupt

    return run


def test_an_interrupt_shows_what_is_complete(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "run", interrupted((2, some_row(2, NAMES[0])), (2, some_row(2, NAMES[1]))))
    command.main(["--quick", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert "Stopped; this is what is complete.\n" in output
    assert "│ no exits" not in output  # these come last
    assert [row[0] for row in cells(output)[:2]] == NAMES[:2]
    assert output.splitlines()[-1] == str(tmp_path / "programs.html")


def test_an_interrupt_before_anything_is_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "run", interrupted())
    with pytest.raises(SystemExit) as e:
        command.main(["--quick", "--out", str(tmp_path)])
    assert str(e.value) == "Stopped before any policy was complete."


def test_a_seed_that_fails_takes_no_others_with_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(seeds: Sequence[int], plan: Plan, processes: int) -> Said:
        yield 1, some_row(1, NAMES[0])
        raise workers.Failed("seed 0 ended with exit code 1")

    monkeypatch.setattr(command, "run", run)
    with pytest.raises(SystemExit) as e:
        command.main(["--quick", "--out", str(tmp_path)])
    assert e.value.code == 1
    output = capsys.readouterr().out
    assert "error: seed 0 ended with exit code 1; this is what is complete.\n" in output
    assert cells(output)[0][0] == NAMES[0]


def test_processes_end_with_the_run_and_one_that_fails_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    running = workers.run([0, 1], Plan(steps_1=10**6), processes=1)
    seed, now = next(running)
    assert isinstance(now, Now) and (seed, now.doing, now.done) == (0, "full depth", 1)
    assert len(multiprocessing.active_children()) == 1
    running.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(workers.Failed) as e:
        list(workers.run([2**70], TINY, processes=1))
    assert str(e.value) == f"seed {2**70} ended with exit code 1"
    assert "Overflow" in capfd.readouterr().err
