"""Compares a block behind `RowPerToken` with the same block on whole rows, as it would run without a loop.

Behind `RowPerToken` the block gets tokens as rows of length 1, packed or not. If it mixes tokens outside its attention,
packed and dense execution agree, and both are wrong.
"""

from contextlib import suppress
from typing import Any, final

import torch
from torch import Tensor, nn

from .._modes import evaluating
from ..attention.adapters import Pointwise
from ..attention.apart import RowPerToken
from ..attention.catch import current_view
from ..attention.dispatch import uncaught
from ..updates import Replace
from .agreement import EXACT, Case, coarsest, off
from .blocks import each


def check_whole_rows(looped: Any, case: Case) -> None:
    """Compare one iteration of a block behind `RowPerToken`; other blocks are not compared.

    On whole rows a block may attend to later tokens, where the loop masks them.
    Raises: `ValueError` if the block mixes tokens outside its attention, or counts positions itself.
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
        dtype, far = coarsest(looped, case.x), float("inf")
        for causal in {looped.causal, False}:
            with suppress(ValueError):  # a causal block, in a loop that is not
                got = case.run(looped, **alone, causal=causal).hidden
                far = min(far, off(got, whole, case.mask, dtype))
    if far > EXACT[dtype]:
        raise ValueError(
            f"{type(apart.block).__name__} gives another result behind RowPerToken than on whole rows: one "
            f"iteration differs by {far:.1e} relative. RowPerToken is for blocks that mix tokens in "
            "F.scaled_dot_product_attention only. Replace convolutions, means and other attention over the row, and "
            "read positions from adadepth.positions()."
        )


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
