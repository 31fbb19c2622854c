"""Think-at-Hard (Fu et al. 2025, arXiv 2511.08577): only tokens with a wrong first answer run twice.

One difference: in the paper, later iterations attend to the keys and values of all earlier ones ("duo-causal").
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toy
from narrow import the
from torch import Tensor, nn

import adadepth as ad


class LoRA(nn.Module):
    """A linear map, with a low-rank addition from the second iteration on."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        later = (ad.iteration() > 0).unsqueeze(-1)
        return self.base(x) + later * self.up(self.down(x))


class ThinkAtHard(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, block = toy.Embed(), toy.make_head(), toy.Block()
        block.qkv, block.out = LoRA(block.qkv), LoRA(block.out)  # type: ignore[assignment]
        block.mlp[0], block.mlp[2] = LoRA(block.mlp[0]), LoRA(block.mlp[2])  # type: ignore[arg-type]
        self.looped = ad.RecurrentWrapper(block, 2, gate=ad.SharedMLPGate(toy.DIM, bias=0.0))

    def forward(self, ids: Tensor, **call: Any) -> ad.Output:
        return self.looped(self.embed(ids), **call)

    def find_hard(self, ids: Tensor, labels: Tensor, **call: Any) -> Tensor:
        """The oracle: whether the first answer is wrong, (batch, seq)."""
        return self.head(self(ids, max_depth=1, **call).hidden).argmax(-1) != labels


def answer_loss(model: ThinkAtHard, out: ad.Output, labels: Tensor) -> Tensor:
    return toy.losses(model.head(out.hidden), labels).mean()


def decider_loss(out: ad.Output, hard: Tensor) -> Tensor:
    score, real = out.trace.scores[..., 0], out.trace.live[..., 0]
    return F.binary_cross_entropy(score[real], hard[real].to(score))


def low_rank(model: ThinkAtHard) -> list[nn.Module]:
    return [part for m in model.modules() if isinstance(m, LoRA) for part in (m.down, m.up)]


@pytest.fixture(scope="module")
def trained() -> ThinkAtHard:
    """In the paper's three stages: a model of one iteration, then LoRA under the oracle, then the decider."""
    torch.manual_seed(0)
    model = ThinkAtHard()
    toy.train(lambda i, y: answer_loss(model, model(i, max_depth=1), y), [model], steps=100)
    toy.train(
        lambda i, y: answer_loss(model, model(i, max_depth=1 + model.find_hard(i, y).long()), y),
        low_rank(model),
        steps=120,
    )
    decider = the(nn.Module, model.looped.gate)
    toy.train(lambda i, y: decider_loss(model(i), model.find_hard(i, y)), [decider], steps=100)
    return model.eval().requires_grad_(False)


def test_lora_changes_only_later_iterations() -> None:
    model, ids = ThinkAtHard(), toy.batch(0)[0]
    hard = torch.rand(ids.shape) < 0.3
    before = model(ids, max_depth=1 + hard.long(), states=True).states
    for part in low_rank(model):
        nn.init.normal_(the(nn.Linear, part).weight, std=0.1)
    after = model(ids, max_depth=1 + hard.long(), states=True).states
    assert torch.equal(after[:, :, 0], before[:, :, 0])
    assert torch.equal((after != before)[:, :, 1].any(-1), hard)


@pytest.mark.every
def test_a_second_iteration_for_hard_tokens_only_gives_the_most_right_answers(trained: ThinkAtHard) -> None:
    model, (ids, labels) = copy.deepcopy(trained), toy.batch(toy.HELD_OUT, rows=128)
    hard = model.find_hard(ids, labels)

    def accuracy(**call: Any) -> float:
        return (model.head(model(ids, **call).hidden).argmax(-1) == labels).double().mean().item()

    once, twice, oracle = accuracy(max_depth=1), accuracy(), accuracy(max_depth=1 + hard.long())
    model.looped.rule = ad.Threshold(0.5)
    decided, ran_twice = accuracy(), model(ids).trace.depth == 2
    assert oracle > decided > once + 0.01
    assert twice < once  # a second iteration makes right answers wrong
    assert (ran_twice == hard).double().mean() > 0.9
    assert ran_twice[hard].double().mean() > 0.4
    assert ran_twice.double().mean() < 0.25


@pytest.mark.parametrize("decides", [False, True])
def test_packed_equals_dense(decides: bool) -> None:
    ids, labels = toy.batch(0)
    mask, labels = toy.ragged(labels)
    model = ThinkAtHard().double()
    for module in (the(nn.Module, model.looped.gate), *low_rank(model)):
        toy.spread(module)
    hard = model.find_hard(ids, labels, mask=mask)
    most = None if decides else torch.randint(1, 3, ids.shape)
    if decides:
        model.looped.rule = ad.Threshold(0.5)

    def run() -> tuple[ad.Output, Tensor]:
        out = model(ids, mask=mask, states=True, max_depth=most)
        return out, answer_loss(model, out, labels) + decider_loss(out, hard)

    toy.assert_packed_equals_dense(model, run)
