# pyright: standard
"""A user's program, never run: it must satisfy strict type checkers, and each `type: ignore` in it must be needed."""

from typing import assert_type

import torch
from torch import Tensor, nn

import adadepth as ad


class Norm(ad.Gate):
    """A gate of one's own, with a plain `Tensor` in its signature."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        return torch.linalg.vector_norm(h - previous, dim=-1) / self.scale


class Kept(ad.Update):
    """An update that says more of what it returns, and takes one argument more."""

    def forward(
        self, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int, share: float = 0.5
    ) -> nn.Parameter:
        return nn.Parameter(x + share * h)


def newest(history: Tensor, left: Tensor, places: Tensor) -> Tensor:
    """A rule whose arguments have names of their own."""
    return torch.where(history[..., -1] > 0, left, 0)


def deaf(history: Tensor, left: Tensor) -> Tensor:
    """No rule: it knows no positions."""
    return history[..., -1] * left


def use(block: nn.Module, x: Tensor, mask: Tensor) -> None:
    gate, update = Norm(3.0), Kept()
    looped = ad.RecurrentWrapper(block, 4, gate, newest, update)
    out = looped(x, mask=mask, min_depth=2, cache=ad.KVReuseCache("compact"))
    assert_type(out, ad.Output)
    assert_type(out.hidden, Tensor)
    assert_type(out.states, Tensor | None)
    assert_type(out.trace.depth, Tensor)
    assert_type(gate(x, x, 0), Tensor)
    assert_type(ad.LinearGate(8)(x, x, 0), Tensor)
    assert_type(ad.Replace()(x, x, x, x, 0), Tensor)
    assert_type(update(x, x, x, x, 0, share=1.0), nn.Parameter)
    looped.rule = ad.NotBefore(2, newest)
    looped.gate, looped.update = ad.PerIterationMLPGate(8, steps=4), ad.Residual()


def misuse(block: nn.Module, x: Tensor) -> None:
    ad.RecurrentWrapper(block, 4, rule=deaf)  # type: ignore[arg-type]
    ad.RecurrentWrapper(block, 4, update=ad.LinearGate(8))  # type: ignore[arg-type]
    ad.KVReuseCache("full")  # type: ignore[arg-type]
    ad.RecurrentWrapper(block, 4)(x, masked=x)  # type: ignore[call-arg]
    ad.LinearGate(8)(x, 0)  # type: ignore[call-arg]
    Norm(3.0)(x, x, "0")  # type: ignore[arg-type]
