"""Compares a block behind `RowPerToken` with the same block on whole rows, as it would run without a loop.

Behind `RowPerToken` the block gets tokens as rows of length 1, packed or not. If it mixes tokens outside its attention,
packed and dense execution agree, and both are wrong.
"""

from typing import Any, final

import torch
from torch import Tensor, nn

from .._modes import evaluating
from .._nested import each
from ..attention.adapters import Pointwise
from ..attention.apart import RowPerToken
from ..attention.catch import current_view
from ..attention.dispatch import uncaught
from ..updates import Replace
from .agreement import EXACT, Case, coarsest, off


def check_whole_rows(looped: Any, case: Case) -> None:
    """Compare one iteration of a block behind `RowPerToken`; other blocks are not compared.

    A causal loop masks later tokens for `nn.MultiheadAttention`, which leaves causality to its caller. A block that
    calls `F.scaled_dot_product_attention` itself says whether it is causal, and must agree with the loop.
    Raises: `ValueError` if the block mixes tokens outside its attention, counts positions itself, or attends to later
        tokens in a causal loop.
    """
    apart = looped.block.block if isinstance(looped.block, Pointwise) else looped.block
    if not isinstance(apart, RowPerToken):
        return
    case = case._replace(mask=torch.ones_like(case.mask), depth=torch.ones_like(case.depth))
    alone: dict[str, Any] = {"steps": 1, "gate": None, "update": Replace(), "skip": False}
    with evaluating(looped):
        try:
            whole = case.run(looped, **alone, block=_Whole(apart.block)).hidden
        except Exception:  # it does not run on whole rows, or has an argument for each token
            return
        dtype = coarsest(looped, case.x)
        far = {
            causal: _difference(case, looped, whole, dtype, **alone, causal=causal) for causal in {looped.causal, False}
        }
    name = type(apart.block).__name__
    if (least := min(far.values())) > EXACT[dtype]:
        raise ValueError(
            f"{name} gives another result behind RowPerToken than on whole rows: one iteration differs by "
            f"{least:.1e} relative. RowPerToken is for blocks that mix tokens in F.scaled_dot_product_attention only. "
            "Replace convolutions, means and other attention over the row, and read positions from "
            "adadepth.positions()."
        )
    if far[looped.causal] > EXACT[dtype] and not any(isinstance(m, nn.MultiheadAttention) for m in apart.modules()):
        raise ValueError(
            f"RecurrentWrapper(causal=True) expected causal attention, but {name} attends to later tokens. Pass "
            "causal=False to the wrapper, or is_causal=True in the block."
        )


def _difference(case: Case, looped: Any, whole: Tensor, dtype: torch.dtype, **changes: Any) -> float:
    """How far the loop, with some attributes changed, is from the block on whole rows."""
    try:
        got = case.run(looped, **changes).hidden
    except ValueError:  # a causal block, in a loop that is not
        return float("inf")
    return off(got, whole, case.mask, dtype)


@final
class _Whole(nn.Module):
    """A block on rows of the batch, whose attention calls are not caught."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        current_view("RowPerToken").elsewhere = True
        with uncaught():
            return self.block(x, **each(given, _of_row))


def _of_row(tensor: Tensor) -> Tensor:
    """What a row has, of `(batch, seq, ...)`, in which all its tokens have the same."""
    if tensor.dim() < 2:
        return tensor
    if not torch.equal(tensor, tensor[:, :1].expand_as(tensor)):
        raise ValueError("It differs between the tokens of a row.")
    return tensor[:, 0]
