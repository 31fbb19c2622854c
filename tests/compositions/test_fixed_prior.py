"""A loop trained under a fixed prior over its iterations; exits are added afterwards.

Source: PonderNet's prior (arXiv 2107.05407) as weights of the losses, without a gate. The exits come from a criterion,
or from a gate that is fitted on the frozen model to predict how much later iterations lower the loss.
"""

import copy
from typing import Any

import pytest
import torch
import toy
from torch import Tensor, nn

import adadepth as ad


class Looped(nn.Module):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.embed, self.head = toy.Embed(), toy.make_head()
        self.looped = ad.RecurrentWrapper(toy.Block(), steps)

    def forward(self, ids: Tensor, **call: Any) -> ad.Output:
        return self.looped(self.embed(ids), states=True, **call)


def prior_loss(model: Looped, out: ad.Output, labels: Tensor, rate: float) -> Tensor:
    """The losses of the iterations, weighted by the prior."""
    each = ad.per_iteration_loss(out.states, model.head, labels)
    steps = each.shape[-1]
    prior = ad.depth_prior("geometric", steps, rate, each.device)
    return (each * prior).sum(-1).mean()


class Gain(ad.Gate):
    """Predicts by how many nats the best later iteration lowers the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(toy.DIM, toy.DIM), nn.GELU(), nn.Linear(toy.DIM, 1))

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        return self.mlp(h).squeeze(-1)


def gain_loss(model: Looped, out: ad.Output, labels: Tensor) -> Tensor:
    gain = ad.loss_gain(ad.per_iteration_loss(out.states, model.head, labels)).gain
    return ((gain - out.trace.scores)[out.trace.live[..., :-1]] ** 2).mean()


@pytest.fixture(scope="module")
def trained() -> Looped:
    torch.manual_seed(0)
    model = Looped(steps=4)
    toy.train(lambda i, y: prior_loss(model, model(i), y, 0.2), [model], steps=120)
    model.requires_grad_(False)
    model.looped.gate = Gain()
    toy.train(lambda i, y: gain_loss(model, model(i), y), [model.looped.gate], steps=100)
    return model.requires_grad_(False)


@pytest.fixture
def frozen(trained: Looped) -> Looped:
    return copy.deepcopy(trained)


def evaluate(model: Looped, **call: Any) -> tuple[float, float]:
    """Mean depth and loss on held-out rows."""
    ids, labels = toy.batch(toy.HELD_OUT, rows=128)
    out = model(ids, **call)
    return out.trace.depth.double().mean().item(), toy.losses(model.head(out.hidden), labels).mean().item()


def test_every_iteration_predicts_and_later_ones_predict_better(frozen: Looped) -> None:
    each = [evaluate(frozen, max_depth=depth)[1] for depth in (1, 2, 3, 4)]
    assert each[0] < 0.7
    assert max(each[1:]) < each[0] - 0.2


def test_the_fitted_gate_predicts_the_gain_and_does_not_change_the_states(frozen: Looped) -> None:
    ids, labels = toy.batch(toy.HELD_OUT, rows=128)
    scored = frozen(ids)
    each = toy.losses(frozen.head(scored.states), labels)
    gain, expected = each[..., 0] - each[..., -1], scored.trace.scores[..., 0]
    frozen.looped.gate = None
    assert torch.equal(frozen(ids).states, scored.states)
    assert torch.stack([gain.flatten(), expected.flatten()]).corrcoef()[0, 1] > 0.3


def test_one_model_meets_three_budgets_and_beats_random_exits(frozen: Looped) -> None:
    """Only the threshold changes, which is the price of an iteration."""
    depths = []
    for price in (0.02, 0.1, 0.3):
        frozen.looped.rule = ad.Threshold(price)
        depth, loss = evaluate(frozen)
        depths.append(depth)
        drawn = ad.uniform_depths((128, toy.LENGTH), 4, depth)
        assert loss < evaluate(frozen, min_depth=drawn, max_depth=drawn)[1] - 0.02
    assert depths[0] > depths[1] + 0.3 > depths[2] + 0.6


def test_a_criterion_without_parameters_beats_random_exits(frozen: Looped) -> None:
    frozen.looped.gate, frozen.looped.rule = ad.KLGate(frozen.head), ad.Threshold(0.05)
    depth, loss = evaluate(frozen)
    drawn = ad.uniform_depths((128, toy.LENGTH), 4, depth)
    assert 2 < depth < 3
    assert loss < evaluate(frozen, min_depth=drawn, max_depth=drawn)[1] - 0.02


@pytest.mark.parametrize("criterion", ["fitted", "KL"])
def test_packed_equals_dense(criterion: str) -> None:
    ids, labels = toy.batch(0)
    mask, labels = toy.ragged(labels)
    model = Looped(steps=3)
    model.looped.gate = Gain() if criterion == "fitted" else ad.KLGate(model.head)
    first = model.double()(ids).trace.scores[..., 0]
    model.looped.rule = ad.Threshold(first.median().item() + 1e-3)

    def run() -> tuple[ad.Output, Tensor]:
        out = model(ids, mask=mask)
        return out, prior_loss(model, out, labels, 0.3) + gain_loss(model, out, labels)

    toy.assert_packed_equals_dense(model, run)
