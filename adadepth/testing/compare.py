"""What the suites of pieces share: random rows, what must come back the same, and a small loop."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._given import named
from ..attention.view import TokenView
from ..gates import Gate
from ..loop.wrapper import RecurrentWrapper
from ..masks import depth_mask
from ..rules import Rule
from ..updates import Update


class _Mixer(nn.Module):
    """The smallest block that attends."""

    takes_view = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor, view: TokenView) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return x + view.attend(q, k, v).squeeze(1)


def agree(dim: int, steps: int, gate: Gate, rule: Rule, update: Update, dtype: torch.dtype) -> None:
    """Packed and dense execution agree, on padded rows of mixed depth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = _Mixer(dim).to(dtype)
    mask = depth_mask(torch.tensor([7, 4, 0]), 7).roll(1, 1)
    most = (1 + torch.arange(7) % steps).unsqueeze(0)
    outputs = [
        RecurrentWrapper(block, steps, gate, rule, update, skip=skip).eval()(
            drawn(3, 7, dim, dtype=dtype), mask=mask, max_depth=most
        )
        for skip in (True, False)
    ]
    same("loop", "packed execution", outputs[0].hidden, outputs[1].hidden)
    assert torch.equal(outputs[0].trace.live, outputs[1].trace.live), "Packed and dense execution ran other tokens."


def dtype_of(piece: nn.Module) -> torch.dtype:
    """That of its parameters; a piece may hold others by reference, so it is not cast."""
    return next((p.dtype for p in piece.parameters()), torch.get_default_dtype())


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers, every time the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def untouched(piece: Callable[..., Tensor], *args: Tensor | int) -> Tensor:
    """The result, if it is a tensor and no argument was changed in place."""
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
    """Permuted tokens give permuted results, and one token alone gives its own."""
    whole = piece(*rows)
    order = torch.arange(len(rows[0])).flip(0)
    same(name, "the tokens in another order", piece(*(row[order] for row in rows)), whole[order])
    same(name, "a token alone", piece(*(row[:1] for row in rows)), whole[:1])


def same(piece: str, what: str, got: Tensor, expected: Tensor, advice: str = "") -> None:
    """Both are the same up to rounding, or the error says how far they are apart, and the `advice`."""
    got, expected = got.detach(), expected.detach()
    off = float((got - expected).abs().max()) if got.numel() else 0.0
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    exact = 1e-10 if expected.dtype == torch.float64 else 1e-5
    assert off <= exact * max(scale, 1.0), (
        f"The {piece} gave another result for {what}: off by {off:.1e} of {scale:.1e}. {advice}".rstrip()
    )
