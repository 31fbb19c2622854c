"""ACT (Graves 2016, arXiv 1603.08983) in a Universal Transformer (Dehghani et al. 2018, arXiv 1807.03819).

One difference: the Universal Transformer copies the state of an exited token to later iterations, and computes keys and
values from it. Here attention reads the keys and values of the token's last iteration.
"""

from typing import Any

import pytest
import torch
import toy
from narrow import the
from torch import Tensor, nn

import adadepth as ad


class StepBlock(nn.Module):
    """A block with embeddings of the iteration and of each token's position."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.block, self.time, self.place = toy.Block(), nn.Embedding(steps, toy.DIM), nn.Embedding(toy.LENGTH, toy.DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.time(ad.iteration()) + self.place(ad.positions()))


class UniversalTransformer(nn.Module):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(toy.NUMBERS, toy.DIM), toy.make_head()
        self.looped = ad.RecurrentWrapper(StepBlock(steps), steps, ad.LinearGate(toy.DIM, bias=1.0), ad.ACT(eps=0.01))

    def forward(self, ids: Tensor, **call: Any) -> ad.Output:
        return self.looped(self.embed(ids), **call)


def act_loss(model: UniversalTransformer, out: ad.Output, labels: Tensor, time_penalty: float) -> Tensor:
    return toy.losses(model.head(out.hidden), labels).mean() + time_penalty * ad.ponder_cost(out.trace)


@pytest.fixture
def model() -> UniversalTransformer:
    model = UniversalTransformer(steps=4)
    toy.spread(the(nn.Module, model.looped.gate))
    return model


def cost_by_definition(halting: Tensor, steps: int) -> Tensor:
    """N + R of one token: N is the first n whose halting units sum to 1 - eps, R is 1 minus the sum before it."""
    left = torch.ones((), dtype=halting.dtype)
    for n in range(1, steps):
        if left - halting[n - 1] <= 0.01:
            return n + left
        left = left - halting[n - 1]
    return steps + left


def test_ponder_cost_and_its_gradient_equal_the_definition(model: UniversalTransformer) -> None:
    trace = model.double()(toy.batch(0)[0]).trace
    halting = (1 - trace.scores).flatten(0, 1)
    got, want = ad.ponder_cost(trace), torch.stack([cost_by_definition(token, steps=4) for token in halting]).mean()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    weight = next(the(nn.Module, model.looped.gate).parameters())
    got, want = (torch.autograd.grad(cost, weight, retain_graph=True)[0] for cost in (got, want))
    assert got.any()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)


@pytest.mark.every
def test_a_higher_time_penalty_lowers_the_ponder_cost() -> None:
    ids, labels = toy.batch(toy.HELD_OUT, rows=128)
    costs, depths, losses = [], [], []
    for penalty in (0.0, 0.03, 0.3):
        torch.manual_seed(0)
        model = UniversalTransformer(steps=4)

        def loss(i: Tensor, y: Tensor, model: UniversalTransformer = model, penalty: float = penalty) -> Tensor:
            return act_loss(model, model(i), y, penalty)

        toy.train(loss, [model], steps=60)
        with torch.no_grad():
            out = model(ids)
        costs.append(ad.ponder_cost(out.trace).item())
        depths.append(out.trace.depth.double().mean().item())
        losses.append(toy.losses(model.head(out.hidden), labels).mean().item())
    assert costs[0] > costs[1] + 0.3 > costs[2] + 0.6
    assert depths[0] > depths[1] > depths[2]
    assert losses[0] < losses[2]


def test_packed_equals_dense(model: UniversalTransformer) -> None:
    ids, labels = toy.batch(0)
    mask, labels = toy.ragged(labels)

    def run() -> tuple[ad.Output, Tensor]:
        out = model(ids, mask=mask, states=True)
        return out, act_loss(model, out, labels, 0.1)

    toy.assert_packed_equals_dense(model, run)
