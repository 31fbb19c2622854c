"""Diagnostics against sums over tokens, written out."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adadepth as ad
from adadepth.diagnostics import Measured, by_exit, deciles, forced, gain_by, measure, mixture, oracle

pytestmark = pytest.mark.shapes

DIM, WORDS, STEPS = 6, 5, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        gate = ad.LinearGate(DIM, bias=0.0)
        self.embed, self.head = nn.Embedding(WORDS, DIM), nn.Linear(DIM, WORDS)
        self.looped = ad.RecurrentWrapper(ad.Pointwise(nn.Linear(DIM, DIM)), STEPS, gate, ad.Threshold(0.5))
        nn.init.normal_(gate.proj.weight, std=3.0)

    def score(self, ids: Tensor, **depths: Any) -> tuple[Tensor, Tensor]:
        out = self.looped(self.embed(ids[:, :-1]), **depths)
        loss = nn.functional.cross_entropy(self.head(out.hidden).transpose(1, 2), ids[:, 1:], reduction="none")
        return loss, out.trace.depth


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(WORDS, (rows, 9), generator=generator) for rows in (4, 4, 1)]


def test_a_policy_is_measured_over_all_batches() -> None:
    model = Model()
    got = measure(model.score, batches())
    parts = [model.score(batch) for batch in batches()]
    assert got.loss.shape == got.depth.shape == (9, 8)
    assert not got.loss.requires_grad
    assert got.nats == pytest.approx(sum(loss.sum().item() for loss, _ in parts) / 72)
    assert got.mean_depth == pytest.approx(sum(depth.sum().item() for _, depth in parts) / 72)
    assert 1 < got.mean_depth < STEPS


def test_the_depth_curve_is_the_loss_with_everyone_at_one_depth() -> None:
    model = Model()
    curve = forced(model.score, (batch for batch in batches()), STEPS)
    for depth, measured in enumerate(curve, 1):
        assert (measured.depth == depth).all()
        for row, ids in enumerate(batches()[0]):
            loss, _ = model.score(ids[None], max_depth=depth, min_depth=depth)
            torch.testing.assert_close(measured.loss[row], loss[0].detach())


def random_curve(seed: int) -> list[Measured]:
    losses = torch.rand(STEPS, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [Measured(loss, torch.full((3, 4), depth)) for depth, loss in enumerate(losses, 1)]


@given(seed=st.integers(0, 50), mean=st.floats(1, STEPS))
@settings(max_examples=40)
def test_a_mixture_is_the_best_of_two_depths_with_that_mean(seed: int, mean: float) -> None:
    curve = random_curve(seed)
    got = mixture(curve, mean)
    assert got.mean_depth == pytest.approx(mean)
    pairs = []
    for low in range(1, STEPS + 1):
        for high in range(low, STEPS + 1):
            if low <= mean <= high:
                share = (mean - low) / (high - low) if high > low else 0.0
                pairs.append((1 - share) * curve[low - 1].nats + share * curve[high - 1].nats)
    assert got.nats == pytest.approx(min(pairs))


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", range(STEPS))
def test_a_depth_whose_loss_is_lost_is_left_out(lost: float, place: int) -> None:
    curve = random_curve(0)
    curve[place] = Measured(torch.full_like(curve[place].loss, lost), curve[place].depth)
    others = [i for i in range(STEPS) if i != place]
    for mean in (1.0, 1.5, 2.0, STEPS - 0.5, float(STEPS)):
        pairs = [
            ((j + 1 - mean) * curve[i].nats + (mean - i - 1) * curve[j].nats) / (j - i) if i < j else curve[i].nats
            for i in others
            for j in others
            if i <= mean - 1 <= j
        ]
        if pairs:
            assert mixture(curve, mean).nats == pytest.approx(min(pairs))
        else:
            assert not math.isfinite(mixture(curve, mean).nats)


def test_a_mixture_of_one_depth_is_that_depth() -> None:
    assert mixture(random_curve(0)[:1], 1.0).mean_depth == 1


@given(seed=st.integers(0, 50))
@settings(max_examples=20)
def test_the_oracle_chooses_by_the_label(seed: int) -> None:
    curve = random_curve(seed)
    found, better = oracle(curve), 0
    for row in range(3):
        for token in range(4):
            losses = [each.loss[row, token].item() for each in curve]
            assert found.measured.loss[row, token] == min(losses)
            assert found.measured.depth[row, token] == 1 + losses.index(min(losses))
            better += min(losses) < losses[-1]
    assert found.better == pytest.approx(better / 12)


def test_of_equal_depths_the_oracle_takes_the_shallowest() -> None:
    same = [Measured(torch.ones(2, 3), torch.full((2, 3), depth)) for depth in (1, 2, 3)]
    assert oracle(same).measured.mean_depth == 1
    assert oracle(same).better == 0


def test_differences_are_of_rows() -> None:
    a, b = Measured(torch.tensor([[1.0, 2.0], [4.0, 5.0], [0.0, 1.0]]), torch.ones(3, 2)), random_curve(0)[0]
    b = Measured(torch.ones(3, 2), torch.ones(3, 2))
    mean, error = a.against(b)
    rows = [0.5, 3.5, -0.5]
    assert mean == pytest.approx(sum(rows) / 3)
    spread = (sum((row - mean) ** 2 for row in rows) / 2) ** 0.5
    assert error == pytest.approx(spread / 3**0.5)


def test_gain_is_grouped() -> None:
    shallow, deep = random_curve(1)[1], random_curve(1)[3]
    groups = torch.tensor([[5, 5, 2, 9], [2, 2, 5, 5], [9, 9, 9, 9]])
    got = {group.name: group for group in gain_by(shallow, deep, groups)}
    assert list(got) == [2, 5, 9]
    for name in got:
        gains = [(shallow.loss[i] - deep.loss[i]).item() for i in map(tuple, (groups == name).nonzero().tolist())]
        assert got[name].share == pytest.approx(len(gains) / 12)
        assert got[name].mean == pytest.approx(sum(gains) / len(gains))


def test_exits_have_their_share_and_their_loss() -> None:
    measured = Measured(torch.tensor([[1.0, 3.0, 5.0, 8.0]]), torch.tensor([[2, 2, 4, 2]]))
    assert by_exit(measured) == [(2, 0.75, 4.0), (4, 0.25, 5.0)]


def test_deciles_are_tenths_in_order() -> None:
    values = torch.rand(20, 10, generator=torch.Generator().manual_seed(0))
    got = deciles(values)
    assert got.flatten().bincount().tolist() == [20] * 10
    for tenth in range(9):
        assert values[got == tenth].max() <= values[got == tenth + 1].min()


ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "no batch": (
        lambda: measure(Model().score, []),
        "measure expected at least one batch, got none. A generator is empty after one use: make it a list.",
    ),
    "shapes": (
        lambda: measure(lambda ids: (torch.zeros(2, 3), torch.ones(2, 4)), [None]),
        "measure expected score to return losses and depths of the same tokens, got (2, 3) and (2, 4). Cut both to "
        "the tokens that have a label.",
    ),
    "lengths": (
        lambda: measure(lambda length: (torch.zeros(2, length), torch.ones(2, length)), [5, 7]),
        "measure expected all batches to have rows of one length, got [(5,), (7,)]. Return their tokens alone, on one "
        "axis: loss[mask], depth[mask].",
    ),
    "padding": (
        lambda: measure(lambda ids: (torch.zeros(1, 3), torch.tensor([[0, 2, 0]])), [None]),
        "measure expected score to return tokens that ran, got 2 of depth 0. Remove the padding: loss[mask], "
        "depth[mask].",
    ),
    "an output": (
        lambda: measure(lambda ids: Model().looped(torch.zeros(1, 3, DIM)), [None]),  # type: ignore[arg-type, return-value]
        "measure expected score to return two tensors, losses and depths of the same tokens, got Output. Return both: "
        "(loss, out.trace.depth).",
    ),
    "other tokens": (
        lambda: random_curve(0)[0].against(Measured(torch.zeros(3, 1), torch.ones(3, 1))),
        "against expected the same tokens measured, of shape (3, 4), got (3, 1). Measure both on the same batches.",
    ),
    "one row": (
        lambda: Measured(torch.zeros(1, 4), torch.ones(1, 4)).against(Measured(torch.ones(1, 4), torch.ones(1, 4))),
        "against expected at least 2 rows, over which the standard error is computed, got 1. Measure more rows; the "
        "difference alone is a.nats - b.nats.",
    ),
    "gains of other tokens": (
        lambda: gain_by(random_curve(0)[0], Measured(torch.zeros(3, 1), torch.ones(3, 1)), torch.zeros(3, 4)),
        "gain_by expected the same tokens measured, of shape (3, 4), got (3, 1). Measure both on the same batches.",
    ),
    "one depth": (
        lambda: oracle(random_curve(0)[0]),  # type: ignore[arg-type]
        "oracle expected fixed, a list with a Measured for each depth from 1 on, got Measured. Pass forced(score, "
        "data, steps).",
    ),
    "no depth": (
        lambda: mixture([], 1.0),
        "mixture expected fixed, a list with a Measured for each depth from 1 on, got an empty list. Pass "
        "forced(score, data, steps).",
    ),
    "mean": (lambda: mixture(random_curve(0), 4.5), "mixture expected a mean depth from 1 to 4, got 4.5."),
    "groups": (
        lambda: gain_by(random_curve(0)[0], random_curve(0)[1], torch.zeros(3, 5)),
        "group_means expected a group for each value, (3, 4), got (3, 5).",
    ),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", ERRORS)
def test_errors_teach(case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
