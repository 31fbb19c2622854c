"""Shared parts of the suites: random rows, comparisons, and a small loop."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._given import named
from .._references import referred
from ..attention.view import TokenView
from ..gates import Gate
from ..loop.wrapper import RecurrentWrapper
from ..masks import depth_mask
from ..rules import Rule
from ..updates import Update


class _Mixer(nn.Module):
    """A minimal block with attention."""

    takes_view = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor, view: TokenView) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return x + view.attend(q, k, v).squeeze(1)


class Like(NamedTuple):
    """The device and dtype of the tensors that a piece gets."""

    device: torch.device
    dtype: torch.dtype


def agree(dim: int, steps: int, gate: Gate, rule: Rule, update: Update, like: Like) -> None:
    """Check that packed and dense execution agree, on padded rows of mixed depths."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = _Mixer(dim).to(*like)
    mask = depth_mask(torch.tensor([7, 4, 0], device=like.device), 7).roll(1, 1)
    most = (1 + torch.arange(7, device=like.device) % steps).unsqueeze(0)
    outputs = [
        RecurrentWrapper(block, steps, gate, rule, update, skip=skip).eval()(
            drawn(3, 7, dim, like=like), mask=mask, max_depth=most
        )
        for skip in (True, False)
    ]
    same("loop", "packed execution", outputs[0].hidden, outputs[1].hidden)
    assert torch.equal(outputs[0].trace.live, outputs[1].trace.live), "Packed and dense execution ran different tokens."


def like(piece: nn.Module) -> Like:
    """Device and dtype of a piece's parameters. The piece is not cast, because it may refer to other modules."""
    return Like(device_of(piece), next((p.dtype for p in piece.parameters()), torch.get_default_dtype()))


def device_of(piece: object) -> torch.device:
    """The device of the first tensor that a piece holds or refers to, or else the default device."""
    return next((tensor.device for tensor in _tensors(piece)), torch.get_default_device())


def _tensors(thing: object) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from chain(thing.parameters(), thing.buffers())
        for part in referred(thing):
            yield from chain(part.parameters(), part.buffers())
    elif callable(thing):
        for value in getattr(thing, "__dict__", {}).values():  # a threshold, or a rule inside a rule
            yield from _tensors(value)


def drawn(*shape: int, like: Like, seed: int = 0) -> Tensor:
    """Normal random numbers, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def untouched(piece: Callable[..., Tensor], *args: Tensor | int) -> Tensor:
    """The result of a piece; checks that it is a tensor and that no argument was changed in place."""
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    result = piece(*args)
    for old, new in zip(before, args, strict=True):
        unchanged = torch.equal(old, new) if isinstance(old, Tensor) and isinstance(new, Tensor) else old == new
        assert unchanged, f"{type(piece).__name__} changed an argument in place; make a new tensor."
    assert isinstance(result, Tensor), (
        f"{type(piece).__name__} must return one tensor, got {named(result)}. Return it alone, and from every branch."
    )
    return result


def each_alone(name: str, piece: Callable[..., Tensor], *rows: Tensor) -> None:
    """Check that permuted tokens give permuted results, and that a token alone gives the same result."""
    whole = piece(*rows)
    order = torch.arange(len(rows[0]), device=rows[0].device).flip(0)
    same(name, "the tokens in another order", piece(*(row[order] for row in rows)), whole[order])
    same(name, "a token alone", piece(*(row[:1] for row in rows)), whole[:1])


def same(piece: str, what: str, got: Tensor, expected: Tensor, advice: str = "") -> None:
    """Check that both are equal up to rounding; the error gives the difference and the `advice`."""
    got, expected = got.detach(), expected.detach()
    off = float((got - expected).abs().max()) if got.numel() else 0.0
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    exact = 1e-10 if expected.dtype == torch.float64 else 1e-5
    assert off <= exact * max(scale, 1.0), (
        f"The {piece} gave another result for {what}: off by {off:.1e} of {scale:.1e}. {advice}".rstrip()
    )
