"""PonderNet (Banino et al. 2021, arXiv 2107.05407): the expected loss over a distribution of exits, and a prior.

One difference: in the paper, whole inputs halt. Here single tokens exit.
"""

from typing import Any

import pytest
import torch
import toy
from narrow import the
from torch import Tensor, nn

import adadepth as ad


class PonderNet(nn.Module):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.embed, self.head = toy.Embed(), toy.make_head()
        self.looped = ad.RecurrentWrapper(toy.Block(), steps, ad.LinearGate(toy.DIM, bias=0.0), ad.Survival())

    def forward(self, ids: Tensor, **call: Any) -> ad.Output:
        return self.looped(self.embed(ids), states=True, **call)


def ponder_loss(model: PonderNet, out: ad.Output, labels: Tensor, prior: Tensor, beta: float) -> Tensor:
    p = out.trace.exit_probs
    expected = (p * toy.losses(model.head(out.states), labels)).sum(-1)
    divergence = (p * (p.clamp_min(1e-9) / prior).log()).sum(-1)
    return (expected + beta * divergence).mean()


@pytest.fixture
def model() -> PonderNet:
    model = PonderNet(steps=4)
    toy.spread(the(nn.Module, model.looped.gate))
    return model


def test_exit_probabilities_equal_the_definition(model: PonderNet) -> None:
    trace = model.double()(toy.batch(0)[0]).trace
    halting = torch.cat([1 - trace.scores, torch.ones_like(trace.scores[..., :1])], -1)
    before = torch.cat([torch.ones_like(halting[..., :1]), (1 - halting[..., :-1]).cumprod(-1)], -1)
    torch.testing.assert_close(trace.exit_probs, halting * before, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rate", [0.2, pytest.param(0.5, marks=pytest.mark.every)])
def test_exits_move_to_the_prior_if_all_iterations_have_the_same_loss(model: PonderNet, rate: float) -> None:
    prior, ids = ad.depth_prior("geometric", steps=4, rate=rate), toy.batch(toy.HELD_OUT)[0]
    for p in model.head.parameters():
        nn.init.zeros_(p)  # every iteration predicts the same

    def distance() -> float:
        with torch.no_grad():
            return (model(ids).trace.exit_probs - prior).abs().sum(-1).mean().item() / 2

    at_first = distance()
    gate = the(nn.Module, model.looped.gate)
    toy.train(lambda i, y: ponder_loss(model, model(i), y, prior, 0.1), [gate], steps=100, lr=2e-2)
    assert at_first > 0.15
    assert distance() < 0.06


def test_exits_move_from_the_prior_to_iterations_with_a_lower_loss() -> None:
    prior, (ids, labels) = ad.depth_prior("geometric", steps=4, rate=0.5), toy.batch(toy.HELD_OUT)
    model = PonderNet(steps=4)
    toy.train(lambda i, y: ponder_loss(model, model(i), y, prior, 0.05), [model], steps=60)
    with torch.no_grad():
        out = model(ids)
    each = toy.losses(model.head(out.states), labels)
    expected, by_prior = (out.trace.exit_probs * each).sum(-1).mean(), (prior * each).sum(-1).mean()
    assert out.trace.exit_probs[..., 0].mean() < prior[0] - 0.05
    assert expected < by_prior - 0.02


def test_drawn_exits_are_as_frequent_as_their_probabilities() -> None:
    model, ids = PonderNet(steps=4), torch.full((4000, 1), 3)
    soft = model(ids[:1]).trace.exit_probs[0, 0]
    model.looped.rule = ad.SurvivalThreshold(torch.rand(ids.shape))  # each token exits at an iteration drawn at random
    frequencies = model(ids).trace.exit_probs.mean((0, 1))
    assert soft.min() > 0.05
    assert (frequencies - soft).abs().max() < 0.03


@pytest.mark.parametrize("drawn", [False, True])
def test_packed_equals_dense(model: PonderNet, drawn: bool) -> None:
    ids, labels = toy.batch(0)
    mask, labels = toy.ragged(labels)
    prior, most = ad.depth_prior("geometric", steps=4, rate=0.3).double(), torch.randint(1, 5, ids.shape)
    if drawn:
        model.looped.rule = ad.SurvivalThreshold(
            torch.rand(ids.shape)
        )  # each token exits at an iteration drawn at random

    def run() -> tuple[ad.Output, Tensor]:
        out = model(ids, mask=mask, max_depth=most)
        return out, ponder_loss(model, out, labels, prior, 0.1)

    toy.assert_packed_equals_dense(model, run)
