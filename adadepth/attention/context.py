"""What blocks, gates and updates can read about the current pass: the iteration, positions and rows of its tokens."""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, final

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from .._lazy import lazy
from .tokens import TokenSet

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")


@final
class Here:
    """The tokens of one iteration, in the order of the block's input `(rows, length, dim)`."""

    def __init__(self, tokens: TokenSet, step: int) -> None:
        self.tokens, self.step = tokens, step

    @lazy
    def iteration(self) -> Int[Tensor, "rows length"]:
        """The iteration of each token, int64, from 0."""
        return torch.full(self.tokens.shape, self.step, dtype=torch.int64, device=self.tokens.live.device)

    @lazy
    def positions(self) -> Int[Tensor, "rows length"]:
        """The position of each token among the real tokens of its row, int64, from 0."""
        return self.tokens.take(self.tokens.positions)

    @lazy
    def rows(self) -> Int[Tensor, "rows length"]:
        """The row of each token, in the batch or in the cache, int64, from 0."""
        return self.tokens.spread(self.tokens.numbers.unsqueeze(1)).expand(self.tokens.shape)


@final
class Together:
    """The tokens of several passes, one after the other; `tokens` are all of them."""

    def __init__(self, parts: Sequence[Here], tokens: TokenSet) -> None:
        self.parts, self.tokens = parts, tokens

    @lazy
    def iteration(self) -> Int[Tensor, "1 length"]:
        """The iteration of each token, as in `Here`."""
        return torch.cat([part.iteration for part in self.parts], 1)

    @lazy
    def positions(self) -> Int[Tensor, "1 length"]:
        """The position of each token, as in `Here`."""
        return torch.cat([part.positions for part in self.parts], 1)

    @lazy
    def rows(self) -> Int[Tensor, "1 length"]:
        """The row of each token in the cache."""
        return torch.cat([part.rows for part in self.parts], 1)


@final
class Window(NamedTuple):
    """The part of a batch on which a pass runs, if it does not run on the whole batch.

    `shape (batch, seq)` is that of the whole batch. The pass runs on the first `rows` rows, and on the columns from
    `first` to `last`. With 0 rows, the pass runs on one token of zeros as a placeholder.
    """

    shape: tuple[int, int]
    rows: int
    first: int
    last: int

    def cut(self, whole: Tensor) -> Tensor:
        """The same part of a tensor `(batch, seq, ...)`, or of one that broadcasts to it."""
        if not self.rows:
            return whole.new_zeros(1, 1, *whole.shape[2:])
        rows = whole if whole.shape[0] == 1 != self.shape[0] else whole[: self.rows]
        return rows if rows.shape[1] == 1 != self.shape[1] else rows[:, self.first : self.last]


@final
class Active(threading.local):
    """What this thread runs: a piece on the tokens of `here`, and a block whose attention calls `view` answers.

    `apart` is True if the block gets every token as a row of its own; `attends` is True while the view computes
    attention.
    """

    def __init__(self) -> None:  # sets all of them in every thread: Dynamo guards on the attributes of the instance
        self.here: Here | Together | None = None
        self.view: Any = None  # a TokenView
        self.block: nn.Module | None = None
        self.takes_view = False  # whether the block takes the view
        self.window: Window | None = None
        self.apart = False
        self.attends = False
        self.turn = torch.zeros(2, dtype=torch.int64)  # from the last attention call of a compiled graph


active = Active()


def checking() -> bool:
    """Whether a self check runs now, on a part of the batch: this is not the real pass."""
    return active.window is not None and active.window.rows > 0


def call_piece(piece: Callable[..., T], here: Here | Together, *args: Any) -> T:
    """The result of a piece, which may call `iteration()`, `positions()`, `rows()` and `take()`."""
    before, active.here = active.here, here
    try:
        return piece(*args)
    finally:
        active.here = before


def here(caller: str) -> Here | Together:
    """The tokens that this thread runs; outside a looped block, an error that names `caller`."""
    if active.here is None:
        raise RuntimeError(
            f"{caller}() was called outside a looped block, where it has no value. Call it in the block, its "
            "submodules and hooks, or in gates and updates."
        )
    return active.here


def iteration() -> Int[Tensor, "rows length"]:
    """The iteration of each token of the block's input, int64, from 0; in blocks, gates and updates.

    Shapes: `(rows, length)`, the first two axes of the block's input. In an update, it is the iteration that has just
    run, and it has an entry for each token that continues.
    Raises: `RuntimeError` outside a looped block.
    """
    return here("iteration").iteration


def positions() -> Int[Tensor, "rows length"]:
    """The position of each token of the block's input among the real tokens of its row, int64, from 0.

    A block that runs on packed tokens cannot count positions by the length of its input. It reads rotary or learned
    positions from here. Works in blocks, gates and updates.

    Shapes: `(rows, length)`, the first two axes of the block's input.
    Raises: `RuntimeError` outside a looped block.
    """
    return here("positions").positions


def rows() -> Int[Tensor, "rows length"]:
    """The row of the batch that each token of the block's input belongs to, int64, from 0.

    Packed tokens of all rows form one sequence. So read a tensor with one entry for each row, `c (batch, ...)`, as
    `c[adadepth.rows()]`, and noise for each row in the same way. Works in blocks, gates and updates.

    Shapes: `(rows, length)`, the first two axes of the block's input.
    Raises: `RuntimeError` outside a looped block.
    """
    return here("rows").rows


def take(per_token: Shaped[Tensor, "batch seq *rest"]) -> Shaped[Tensor, "rows length *rest"]:
    """Brings a tensor with one entry for each token into the order of the block's input.

    Works in blocks, gates and updates.
    Arguments: `per_token (batch, seq, ...)`, with the first two axes of the wrapper's `x`; with a cache, these are
    the new tokens. Entries of skipped tokens and of padding are not read.
    Shapes: `(rows, length, ...)`; the first two axes are those of the block's input.
    Raises: `RuntimeError` outside a looped block, `ValueError` for another batch or length.
    """
    at = here("take")
    tokens = at.tokens
    if isinstance(at, Together):
        return tokens.take(per_token)
    batch, seq = tokens.live.shape if active.window is None else active.window.shape
    if tuple(per_token.shape[:2]) != (batch, seq):
        raise ValueError(
            f"adadepth.take expected a tensor of shape (batch, seq, ...) = ({batch}, {seq}, ...), one entry for each "
            f"token that the loop was given, got {tuple(per_token.shape)}. For a tensor c with one entry per row, "
            "write c[adadepth.rows()]; with a cache, pass entries of the new tokens."
        )
    return tokens.take(per_token if active.window is None else active.window.cut(per_token))
