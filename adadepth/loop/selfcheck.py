"""The self check: a wrapper compares packed and dense execution when it first skips tokens."""

import threading
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._nested import each
from ..attention.context import Window
from ..attention.tokens import TokenSet, WholeTokens
from .agreement import Case, check_some_mode, untouched
from .eager import in_eager
from .whole_rows import check_whole_rows

ROWS, TOKENS = 4, 64  # the most that a self check runs on

_one_at_a_time = threading.RLock()  # a check switches off dropout in modules that other threads may check too


def due(looped: Any, tokens: TokenSet, x: Tensor) -> bool:
    """Whether a self check is due: none was made yet in this mode, for one row or for several rows.

    There is none in a graph, and none with several ranks, because the other ranks would not take part.
    """
    # First of all, in a graph: there the batch may be of any size, and is not compared.
    if torch.compiler.is_compiling() or not looped.self_check or isinstance(tokens, WholeTokens):
        return False
    if (looped.training, len(x) > 1) in looped._checked:
        return False
    return not (
        tokens.empty
        or x.is_meta
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    )


def check_itself(looped: Any, x: Tensor, mask: Tensor | None, more: Mapping[str, Any]) -> None:
    """Check the wrapper on a few tokens of its input, packed against dense.

    Raises: `ValueError` if they differ, and what the loop raises for packed tokens.
    """
    case = few(looped.steps, x, mask, more)
    if not bool(case.mask.any()):
        return
    try:
        with _one_at_a_time, in_eager(), untouched(looped, x.device):
            check_some_mode(looped, case)
            check_whole_rows(looped, case)
    except ValueError as error:
        error.add_note(
            "RecurrentWrapper found this in its self check, which runs once, on a few tokens, before it first skips "
            "any. looped.self_check = False turns it off."
        )
        raise
    looped._checked |= {(looped.training, False), (looped.training, len(x) > 1)}


def few(steps: int, x: Tensor, mask: Tensor | None, more: Mapping[str, Any]) -> Case:
    """The window of the input with the most real tokens; its rows are cut to different lengths, its depths mixed."""
    batch, seq = x.shape[:2]
    rows = min(batch, ROWS)
    first = _fullest(mask, rows, seq)
    window = Window((batch, seq), rows, first, min(seq, first + TOKENS))
    part = window.cut(x)
    real = part.new_ones(part.shape[:2], dtype=torch.bool) if mask is None else window.cut(mask)
    given = each({"block_kwargs": {}, **more}, lambda tensor: window.cut(tensor))
    return Case(part, shortened(real), mixed(part, steps), given, window)


def shortened(mask: Tensor) -> Tensor:
    """Row i without its last i tokens, if any are left: no two rows end at the same column."""
    rows, width = mask.shape
    column, row = torch.arange(width, device=mask.device), torch.arange(rows, device=mask.device).unsqueeze(1)
    cut = mask & (column < width - (row if width > rows else (row == rows - 1).long()))
    return torch.where(cut.any(), cut, mask)


def mixed(x: Tensor, steps: int) -> Tensor:
    """Depths `(batch, seq)` from 1 to steps; neighbours have different depths."""
    rows, width = x.shape[:2]
    column, row = torch.arange(width, device=x.device), torch.arange(rows, device=x.device).unsqueeze(1)
    return 1 + (column + row) % steps


def _fullest(mask: Tensor | None, rows: int, seq: int) -> int:
    """The first column of the window of `TOKENS` columns that holds the most real tokens."""
    if mask is None or seq <= TOKENS:
        return 0
    upto = torch.nn.functional.pad(mask[:rows].sum(0).cumsum(0), (1, 0))
    return int((upto[TOKENS:] - upto[:-TOKENS]).argmax())
