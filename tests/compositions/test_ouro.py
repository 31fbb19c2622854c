"""Ouro (Zhu et al. 2025, arXiv 2510.25741): the expected loss over the exits, minus their entropy."""

import copy
from typing import Any

import pytest
import torch
import toy
from narrow import the
from torch import Tensor, nn

import adadepth as ad


class Ouro(nn.Module):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.embed, self.head = toy.Embed(), toy.make_head()
        self.looped = ad.RecurrentWrapper(toy.Block(), steps, ad.LinearGate(toy.DIM, bias=1.0), ad.Survival())

    def forward(self, ids: Tensor, **call: Any) -> ad.Output:
        return self.looped(self.embed(ids), states=True, **call)

    def exit_at(self, cumulative: float) -> None:
        """At inference, a token exits once its exit probabilities sum to `cumulative`."""
        self.looped.rule = ad.SurvivalThreshold(1 - cumulative)


def entropy(trace: ad.Trace) -> Tensor:
    """The entropy of each token's exits, (batch, seq), in nats."""
    p = trace.exit_probs
    return -(p * p.clamp_min(1e-9).log()).sum(-1)


def ouro_loss(model: Ouro, out: ad.Output, labels: Tensor, beta: float) -> Tensor:
    expected = (out.trace.exit_probs * toy.losses(model.head(out.states), labels)).sum(-1)
    return (expected - beta * entropy(out.trace)).mean()


@pytest.fixture(scope="module")
def trained() -> dict[float, Ouro]:
    """One model for each weight of the entropy."""
    models = {}
    for beta in (0.0, 0.05, 0.3):
        torch.manual_seed(0)
        model = models[beta] = Ouro(steps=4)

        def loss(ids: Tensor, labels: Tensor, model: Ouro = model, beta: float = beta) -> Tensor:
            return ouro_loss(model, model(ids), labels, beta)

        toy.train(loss, [model], steps=80)
        model.requires_grad_(False)
    return models


def test_the_entropy_term_moves_exits_away_from_the_last_iteration(trained: dict[float, Ouro]) -> None:
    ids = toy.batch(toy.HELD_OUT, rows=64)[0]
    traces = [model(ids).trace for model in trained.values()]
    spread = [entropy(trace).mean() for trace in traces]
    last = [trace.exit_probs[..., -1].mean() for trace in traces]
    assert spread[0] + 0.3 < spread[1] < spread[2] - 0.3
    assert last[0] > last[1] + 0.1 > last[2] + 0.2


@pytest.mark.parametrize("cumulative", [0.1, 0.5, 0.9])
def test_a_token_exits_where_its_cumulative_exit_probability_reaches_the_threshold(cumulative: float) -> None:
    model, ids = Ouro(steps=4), toy.batch(0, rows=64)[0]
    toy.spread(the(nn.Module, model.looped.gate))
    model.exit_at(cumulative)
    trace = model(ids).trace
    reached = 1 - trace.scores.cumprod(-1) > cumulative
    first = torch.where(reached.any(-1), reached.int().argmax(-1) + 1, 4)
    assert torch.equal(trace.depth, first)
    assert trace.depth.unique().numel() > 1


def test_a_higher_threshold_exits_later_and_lowers_the_loss(trained: dict[float, Ouro]) -> None:
    model = copy.deepcopy(trained[0.3])
    ids, labels = toy.batch(toy.HELD_OUT, rows=64)
    depths, losses = [], []
    for cumulative in (0.1, 0.3, 0.6, 0.9):
        model.exit_at(cumulative)
        out = model(ids)
        depths.append(out.trace.depth.double().mean().item())
        losses.append(toy.losses(model.head(out.hidden), labels).mean().item())
    assert depths == sorted(depths) and depths[0] + 2 < depths[-1]
    assert losses[2] < losses[1] < losses[0] - 0.2


@pytest.mark.parametrize("exits", [False, True])
def test_packed_equals_dense(exits: bool) -> None:
    ids, labels = toy.batch(0)
    mask, labels = toy.ragged(labels)
    model = Ouro(steps=4)
    toy.spread(the(nn.Module, model.looped.gate))
    if exits:
        model.exit_at(0.8)

    def run() -> tuple[ad.Output, Tensor]:
        out = model(ids, mask=mask)
        return out, ouro_loss(model, out, labels, 0.1)

    toy.assert_packed_equals_dense(model, run, mixed=exits)
