"""Mixture-of-Recursions (Bae et al. 2025, arXiv 2507.10524), token choice: a token's depth is chosen before the loop.

Token choice is causal; top-k routing over a sequence is not. One difference: attention reads the keys and values of an
exited token from its last iteration. The paper masks such a token, or uses its first iteration, as
tests/test_single.py does.
"""

from typing import Any

import pytest
import torch
import toy
from narrow import the
from torch import Tensor, nn

import adadepth as ad


class Router(ad.Gate):
    """The score after the first iteration is `choice - 1 + p`: p in (0, 1] is the choice's probability."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.proj = nn.Linear(toy.DIM, steps)

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        if step > 0:
            return torch.ones_like(h[..., 0])  # the depth is already chosen
        p, choice = self.probabilities(previous).max(-1)
        return choice + p

    def probabilities(self, x: Tensor) -> Tensor:
        return self.proj(x).softmax(-1)


class Chosen:
    def __call__(self, scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
        return torch.where(scores[..., 0] > scores.shape[-1], remaining, 0)


class MixtureOfRecursions(nn.Module):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.embed, self.head = toy.Embed(), toy.make_head()
        self.looped = ad.RecurrentWrapper(toy.Block(), steps, Router(steps), Chosen())

    def forward(self, ids: Tensor, **call: Any) -> ad.Output:
        return self.looped(self.embed(ids), **call)

    def logits(self, ids: Tensor, out: ad.Output) -> Tensor:
        score = out.trace.scores[..., :1]
        p = score - score.ceil() + 1
        return self.head(self.embed(ids) + p * out.hidden)


def mor_loss(model: MixtureOfRecursions, ids: Tensor, out: ad.Output, labels: Tensor, balance: float) -> Tensor:
    """The task's loss, plus the balancing loss of Switch Transformers: steps · Σ share chosen · mean probability."""
    p = model.looped.gate.probabilities(model.embed(ids))[labels >= 0]  # type: ignore[union-attr, operator]
    share = nn.functional.one_hot(out.trace.depth[labels >= 0] - 1, p.shape[-1]).to(p).mean(0)
    return toy.losses(model.logits(ids, out), labels).mean() + balance * p.shape[-1] * (share * p.mean(0)).sum()


def test_gate_and_rule_meet_their_contracts() -> None:
    ad.testing.check_rule(Chosen(), steps=3)
    ad.testing.check_gate(Router(3), toy.DIM, 3, update=ad.Replace())


def test_each_token_runs_its_chosen_depth() -> None:
    model, ids = MixtureOfRecursions(steps=3), toy.batch(0)[0]
    out = model(ids)
    chosen = the(Router, model.looped.gate).probabilities(model.embed(ids)).argmax(-1) + 1
    assert chosen.unique().tolist() == [1, 2, 3]
    assert torch.equal(out.trace.depth, chosen)
    model.looped.gate = model.looped.rule = None
    assert torch.equal(model(ids, min_depth=chosen, max_depth=chosen).hidden, out.hidden)


def test_later_tokens_do_not_change_earlier_ones() -> None:
    model, ids = MixtureOfRecursions(steps=3).double(), toy.batch(0)[0]
    whole = model(ids)
    assert whole.trace.depth.unique().numel() == 3
    for seen in (1, 5, 8):
        other = torch.cat([ids[:, :seen], toy.batch(1)[0][:, seen:]], 1)
        out = model(other)
        assert torch.equal(out.trace.depth[:, :seen], whole.trace.depth[:, :seen])
        assert not torch.equal(out.trace.depth[:, seen:], whole.trace.depth[:, seen:])
        before, after = (model.logits(i, o)[:, :seen] for i, o in ((ids, whole), (other, out)))
        torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-13)


def test_the_router_gets_a_gradient_through_the_probability_of_its_choice() -> None:
    model, (ids, labels) = MixtureOfRecursions(steps=3), toy.batch(0)
    weights = list(the(Router, model.looped.gate).parameters())
    gradients = torch.autograd.grad(mor_loss(model, ids, model(ids), labels, 0.0), weights)
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.every
def test_the_balancing_loss_spreads_the_depths() -> None:
    ids, shares = toy.batch(toy.HELD_OUT, rows=64)[0], []
    for balance in (0.0, 0.5):
        torch.manual_seed(1)
        model = MixtureOfRecursions(steps=3)
        nn.init.constant_(the(Router, model.looped.gate).proj.bias[:1], 2.0)

        def loss(i: Tensor, y: Tensor, model: MixtureOfRecursions = model, balance: float = balance) -> Tensor:
            return mor_loss(model, i, model(i), y, balance)

        toy.train(loss, [model], steps=80)
        with torch.no_grad():
            out = model(ids)
        shares.append(out.trace.depth.flatten().bincount(minlength=4)[1:] / ids.numel())
    assert shares[0].min() < 0.1
    assert shares[1].min() > 0.2


def test_packed_equals_dense() -> None:
    ids, labels = toy.batch(0)
    mask, labels = toy.ragged(labels)
    model = MixtureOfRecursions(steps=3)

    def run() -> tuple[ad.Output, Tensor]:
        out = model(ids, mask=mask, states=True)
        return out, mor_loss(model, ids, out, labels, 0.1)

    toy.assert_packed_equals_dense(model, run)
