"""Huginn (Geiping et al. 2025, arXiv 2502.05171): a random number of iterations from a random state.

One difference: the paper's coda has attention of its own. The head here reads each token by itself.
"""

import copy
import math
import weakref
from typing import Any

import pytest
import torch
import toy
from narrow import the
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import adadepth as ad


class Adapter(ad.Update):
    """Maps state and embedding to the next input. Gradients stop before iteration `cut`."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.cut = nn.Linear(2 * toy.DIM, toy.DIM), 0

    def forward(self, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int) -> Tensor:
        # Detached at every iteration before the cut, so that each graph is freed at once.
        return self.mix(torch.cat([h.detach() if step < self.cut else h, start], -1))


class Huginn(nn.Module):
    """`keep`: gradients pass through the last `keep` iterations."""

    def __init__(self, steps: int, keep: int) -> None:
        super().__init__()
        self.embed, self.head, self.keep = toy.Embed(), toy.make_head(), keep
        self.looped = ad.RecurrentWrapper(toy.Block(), steps, update=Adapter())

    def forward(self, ids: Tensor, noise: Tensor, depth: int, **call: Any) -> ad.Output:
        embedded, adapter = self.embed(ids), self.looped.update
        adapter.cut = depth - self.keep  # type: ignore[assignment]
        first = adapter.mix(torch.cat([noise, embedded], -1))  # type: ignore[operator]
        return self.looped(first, start=embedded, max_depth=depth, **call)

    def exit_when_settled(self, nats: float) -> None:
        self.looped.gate, self.looped.rule = ad.KLGate(self.head), ad.Threshold(nats)


def make_noise(ids: Tensor) -> Tensor:
    return math.sqrt(0.4) * torch.randn(*ids.shape, toy.DIM)


def draw_depth(mean: float, steps: int) -> int:
    """Draw from the paper's log-normal Poisson distribution, clipped to 1..steps."""
    rate = math.log(mean) - 0.125 + 0.5 * torch.randn(())
    return min(int(torch.poisson(rate.exp())) + 1, steps)


def answer_loss(model: Huginn, out: ad.Output, labels: Tensor) -> Tensor:
    return toy.losses(model.head(out.hidden), labels).mean()


def truncated_by_hand(model: Huginn, ids: Tensor, noise: Tensor, depth: int) -> Tensor:
    """The state after `depth` iterations, the first of them without a graph."""
    h, embedded, adapter = noise, model.embed(ids), the(Adapter, model.looped.update)
    for i in range(depth):
        with torch.set_grad_enabled(i >= depth - model.keep):
            h = model.looped.block(adapter.mix(torch.cat([h, embedded], -1)))
    return h


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_gradients_equal_those_of_a_truncated_loop_written_by_hand(depth: int) -> None:
    ids, labels = toy.batch(0)
    model, noise = Huginn(steps=6, keep=2).double(), make_noise(ids).double()
    out, by_hand = model(ids, noise, depth), truncated_by_hand(model, ids, noise, depth)
    toy.assert_close("hidden", out.hidden, by_hand)
    by_hand_loss = toy.losses(model.head(by_hand), labels).mean()
    toy.assert_same_gradients(model, answer_loss(model, out, labels), by_hand_loss)


class Saved:
    """A tensor that is saved for the backward pass; it is alive as long as its graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output that is attached would keep its own node alive


def most_saved(model: Huginn, depth: int, mask: Tensor | None) -> int:
    """The most values that are saved for the backward pass at any time during a forward pass."""
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    most, ids = 0, toy.batch(0)[0]

    def pack(tensor: Tensor) -> Saved:
        nonlocal most
        alive.add(saved := Saved(tensor))
        most = max(most, sum(s.tensor.numel() for s in alive))
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        out = model(ids, make_noise(ids), depth, mask=mask)
    assert out.hidden.requires_grad
    return most


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_truncated_backpropagation_needs_the_memory_of_the_kept_iterations(skip: bool, padded: bool) -> None:
    mask = toy.ragged(toy.batch(0)[1])[0] if padded else None
    kept, whole = Huginn(steps=12, keep=3), Huginn(steps=12, keep=12)
    kept.looped.skip = whole.looped.skip = skip
    assert most_saved(kept, 12, mask) == most_saved(kept, 6, mask)
    assert most_saved(kept, 12, mask) < 1.1 * most_saved(whole, 3, mask)
    assert most_saved(whole, 12, mask) > 3.8 * most_saved(whole, 3, mask)


@pytest.fixture(scope="module")
def trained() -> tuple[Huginn, list[int]]:
    """The model, and the depths of its training batches."""
    torch.manual_seed(0)
    model, depths = Huginn(steps=8, keep=2), []

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        depths.append(draw_depth(mean=3, steps=8))
        return answer_loss(model, model(ids, make_noise(ids), depths[-1]), labels)

    toy.train(loss, [model], steps=200)
    return model, depths


def test_after_training_at_random_depths_every_depth_predicts_well(trained: tuple[Huginn, list[int]]) -> None:
    model, depths = trained
    assert set(depths) == set(range(1, 9))
    ids, labels = toy.batch(toy.HELD_OUT, rows=128)
    with torch.no_grad():
        each = [answer_loss(model, model(ids, make_noise(ids), depth), labels).item() for depth in range(1, 9)]
    assert each[0] < 1
    assert max(each[1:]) < each[0] - 0.15


def test_the_last_state_hardly_depends_on_the_noise(trained: tuple[Huginn, list[int]]) -> None:
    model, ids = trained[0], toy.batch(toy.HELD_OUT)[0]
    with torch.no_grad():
        one, other = (model(ids, make_noise(ids), 8, states=True).states for _ in range(2))
    apart = ((one - other).norm(dim=-1) / one.norm(dim=-1)).mean((0, 1))
    assert apart[0] > 0.1 and apart[-1] < 0.02


def test_tokens_exit_once_their_prediction_settles(trained: tuple[Huginn, list[int]]) -> None:
    model = copy.deepcopy(trained[0]).eval()
    ids, labels = toy.batch(toy.HELD_OUT, rows=128)
    noise = make_noise(ids)
    with torch.no_grad():
        whole = answer_loss(model, model(ids, noise, 8), labels)
        depths = []
        for nats in (1e-5, 5e-4, 1e-2):
            model.exit_when_settled(nats)
            out = model(ids, noise, 8)
            depths.append(out.trace.depth.double().mean().item())
            assert answer_loss(model, out, labels) < whole + 0.03
    assert 8 > depths[0] > depths[1] + 1 > depths[2] + 1.5


@pytest.mark.parametrize("exits", [False, True])
def test_packed_equals_dense(exits: bool) -> None:
    ids, labels = toy.batch(0)
    mask, labels = toy.ragged(labels)
    model, noise = Huginn(steps=6, keep=3), make_noise(ids).double()
    if exits:
        model.exit_when_settled(0.02)

    def run() -> tuple[ad.Output, Tensor]:
        out = model(ids, noise, 5, mask=mask, states=True)
        return out, answer_loss(model, out, labels)

    toy.assert_packed_equals_dense(model, run, mixed=exits)
