"""Looped transformers (Yang et al. 2023, arXiv 2311.12424): one block, applied a fixed number of times."""

from typing import Any

import pytest
import torch
import toy
from torch import Tensor, nn

import adadepth as ad


class LoopTransformer(nn.Module):
    """`update=ad.InputInjection()` is the paper's update. Without it, the state alone is fed back."""

    def __init__(self, steps: int, update: ad.Update | None = None) -> None:
        super().__init__()
        self.embed, self.head = toy.Embed(), toy.make_head()
        self.looped = ad.RecurrentWrapper(toy.Block(), steps, update=update)

    def forward(self, ids: Tensor, **call: Any) -> ad.Output:
        return self.looped(self.embed(ids), **call)


def answer_loss(model: LoopTransformer, out: ad.Output, labels: Tensor) -> Tensor:
    return toy.losses(model.head(out.hidden), labels).mean()


def test_equals_a_loop_written_by_hand() -> None:
    ids, labels = toy.batch(0)
    model = LoopTransformer(3, ad.InputInjection()).double()
    out = model(ids)
    start = x = model.embed(ids)
    for _ in range(3):
        h = model.looped.block(x)
        x = start + h
    by_hand = toy.losses(model.head(h), labels).mean()
    assert torch.equal(out.hidden, h)
    assert bool((out.trace.depth == 3).all())
    toy.assert_same_gradients(model, answer_loss(model, out, labels), by_hand)


def test_a_second_iteration_adds_right_answers_and_no_parameters() -> None:
    ids, labels = toy.batch(toy.HELD_OUT, rows=128)
    right, sizes = [], set()
    for steps in (1, 2):
        torch.manual_seed(0)
        model = LoopTransformer(steps)

        def loss(ids: Tensor, labels: Tensor, model: LoopTransformer = model) -> Tensor:
            return answer_loss(model, model(ids), labels)

        toy.train(loss, [model], steps=100)
        right.append((model.head(model(ids).hidden).argmax(-1) == labels).double().mean().item())
        sizes.add(sum(p.numel() for p in model.parameters()))
    assert len(sizes) == 1
    assert right[1] > right[0] + 0.05


@pytest.mark.parametrize("update", [None, ad.InputInjection()])
def test_packed_equals_dense(update: ad.Update | None) -> None:
    ids, labels = toy.batch(0)
    mask, labels = toy.ragged(labels)
    model, most = LoopTransformer(3, update), torch.randint(1, 4, ids.shape)

    def run() -> tuple[ad.Output, Tensor]:
        out = model(ids, mask=mask, max_depth=most, states=True)
        return out, answer_loss(model, out, labels)

    toy.assert_packed_equals_dense(model, run)
