"""What the loop is given and what its pieces return: of the expected shape, or an error that teaches."""

import torch
from torch import Tensor

from ..gates import Gate
from ..updates import Update


def check_parts(gate: object, rule: object, update: object) -> None:
    """The pieces of a wrapper, which are easily given in each other's place."""
    expected = {
        "gate to be an adadepth.Gate": (gate, isinstance(gate, Gate)),
        "rule to be a function or an object that is called like one": (
            rule,
            callable(rule) and not isinstance(rule, Gate | Update),
        ),
        "update to be an adadepth.Update": (update, isinstance(update, Update)),
    }
    for what, (piece, fits) in expected.items():
        if piece is not None and (isinstance(piece, type) or not fits):
            got = f"the class {piece.__name__}; call it" if isinstance(piece, type) else type(piece).__name__
            raise ValueError(
                f"RecurrentWrapper expected {what}, got {got}. The order is block, steps, gate, rule, update."
            )


def check_rows(x: Tensor, mask: Tensor | None, start: Tensor | None) -> None:
    """The arguments of a looped block that come in rows."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(
            f"RecurrentWrapper expected x of shape (batch, seq, dim) in floating point, got {tuple(x.shape)} {x.dtype}."
        )
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask expected shape (batch, seq) = {tuple(x.shape[:2])} and dtype torch.bool, True for real tokens, got "
            f"{tuple(mask.shape)} {mask.dtype}."
        )
    if start is not None and (start.shape != x.shape or start.dtype != x.dtype):
        raise ValueError(
            f"start expected the shape and dtype of x, {tuple(x.shape)} {x.dtype}, got {tuple(start.shape)} "
            f"{start.dtype}."
        )


def check_piece(piece: object, what: str, shape: torch.Size, result: Tensor, step: int) -> None:
    """What a gate, a rule or an update returned at iteration `step`."""
    if result.shape != shape:
        raise ValueError(
            f"{type(piece).__name__} expected to return {what}, shape {tuple(shape)}, got {tuple(result.shape)} at "
            f"iteration {step}."
        )
