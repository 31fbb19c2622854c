"""PonderLM (Zeng et al. 2025, arXiv 2505.20674): the expected embedding is added to the input of the next pass."""

from typing import Any

import torch
import toy
from torch import Tensor, nn

import adadepth as ad


class PonderLM(nn.Module):
    """The looped block is the whole backbone with its final norm. The head is the transposed embedding."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.embed, self.head = toy.Embed(), nn.Linear(toy.DIM, toy.NUMBERS, bias=False)
        self.head.weight = self.embed.number.weight
        nn.init.normal_(self.head.weight, std=0.3)
        backbone = nn.Sequential(toy.Block(), nn.LayerNorm(toy.DIM))
        self.looped = ad.RecurrentWrapper(backbone, steps, update=ad.Ungated(ad.Ponder(self.embed.number, self.head)))

    def forward(self, ids: Tensor, **call: Any) -> ad.Output:
        return self.looped(self.embed(ids), **call)


def answer_loss(model: PonderLM, out: ad.Output, labels: Tensor) -> Tensor:
    return toy.losses(model.head(out.hidden), labels).mean()


def test_equals_a_loop_written_by_hand() -> None:
    ids, labels = toy.batch(0)
    model = PonderLM(3).double()
    x = model.embed(ids)
    for _ in range(3):
        h = model.looped.block(x)
        x = x + model.head(h).softmax(-1) @ model.embed.number.weight
    by_hand = toy.losses(model.head(h), labels).mean()
    out = model(ids)
    toy.assert_close("hidden", out.hidden, h)
    toy.assert_same_gradients(model, answer_loss(model, out, labels), by_hand)


def test_a_second_iteration_lowers_the_loss_and_adds_no_parameters() -> None:
    ids, labels = toy.batch(toy.HELD_OUT, rows=128)
    losses, names = [], []
    for steps in (1, 2):
        torch.manual_seed(0)
        model = PonderLM(steps)

        def loss(ids: Tensor, labels: Tensor, model: PonderLM = model) -> Tensor:
            return answer_loss(model, model(ids), labels)

        toy.train(loss, [model], steps=100)
        losses.append(answer_loss(model, model(ids), labels).item())
        names.append([name for name, _ in model.named_parameters()])
    assert names[0] == names[1]
    assert losses[1] < losses[0] - 0.1


def test_a_criterion_adds_exits_and_does_not_change_states() -> None:
    model, ids = PonderLM(3), toy.batch(0)[0]
    without = model(ids)
    model.looped.gate = ad.EntropyGate(model.head)
    assert torch.equal(model(ids).hidden, without.hidden)
    model.looped.rule = ad.Threshold(model(ids).trace.scores.median().item())
    assert 1 < model(ids).trace.depth.double().mean() < 3


def test_packed_equals_dense() -> None:
    ids, labels = toy.batch(0)
    mask, labels = toy.ragged(labels)
    model, most = PonderLM(3), torch.randint(1, 4, ids.shape)

    def run() -> tuple[ad.Output, Tensor]:
        out = model(ids, mask=mask, max_depth=most, states=True)
        return out, answer_loss(model, out, labels)

    toy.assert_packed_equals_dense(model, run)
