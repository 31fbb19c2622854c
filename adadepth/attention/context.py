"""What blocks, gates and updates may know of the pass that runs them: which iteration, and where its tokens stand."""

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
        """The iteration that each token is in, int64, from 0."""
        return torch.full(self.tokens.shape, self.step, dtype=torch.int64, device=self.tokens.live.device)

    @lazy
    def positions(self) -> Int[Tensor, "rows length"]:
        """The place of each token among its row's real tokens, int64, from 0."""
        return self.tokens.take(self.tokens.positions)

    @lazy
    def rows(self) -> Int[Tensor, "rows length"]:
        """The row of the batch, or of the cache, that each token stands in, int64, from 0."""
        return self.tokens.spread(self.tokens.numbers.unsqueeze(1)).expand(self.tokens.shape)


@final
class Together:
    """The tokens of several passes, one after the other; `tokens` are all of them."""

    def __init__(self, parts: Sequence[Here], tokens: TokenSet) -> None:
        self.parts, self.tokens = parts, tokens

    @lazy
    def iteration(self) -> Int[Tensor, "1 length"]:
        """As of one pass."""
        return torch.cat([part.iteration for part in self.parts], 1)

    @lazy
    def positions(self) -> Int[Tensor, "1 length"]:
        """As of one pass."""
        return torch.cat([part.positions for part in self.parts], 1)

    @lazy
    def rows(self) -> Int[Tensor, "1 length"]:
        """The rows of the cache."""
        return torch.cat([part.rows for part in self.parts], 1)


@final
class Window(NamedTuple):
    """The part of a batch that a pass is about, where it is not about all of it.

    `shape (batch, seq)` of the whole; the pass has its first `rows` and its columns from `first` to `last`. No
    rows at all: the pass is about one token of zeros, which stands in.
    """

    shape: tuple[int, int]
    rows: int
    first: int
    last: int

    def cut(self, whole: Tensor) -> Tensor:
        """The part of a tensor that broadcasts to the whole `(batch, seq, ...)`."""
        if not self.rows:
            return whole.new_zeros(1, 1, *whole.shape[2:])
        rows = whole if whole.shape[0] == 1 != self.shape[0] else whole[: self.rows]
        return rows if rows.shape[1] == 1 != self.shape[1] else rows[:, self.first : self.last]


@final
class Active(threading.local):
    """What this thread runs: a piece on the tokens of `here`, and a block whose attention goes to `view`.

    `apart` is True where the block sees every token as a row of its own; `attends` while the view answers.
    """

    def __init__(self) -> None:  # in every thread: Dynamo guards on what the instance holds
        self.here: Here | Together | None = None
        self.view: Any = None  # a TokenView
        self.block: nn.Module | None = None
        self.takes_view = False  # whether the block does
        self.window: Window | None = None
        self.apart = False
        self.attends = False
        self.turn = torch.zeros(2, dtype=torch.int64)  # of the last call of attention that a graph made


active = Active()


def checking() -> bool:
    """Whether a wrapper checks itself on a part of the batch: what is seen now is not of the pass."""
    return active.window is not None and active.window.rows > 0


def asked(piece: Callable[..., T], here: Here | Together, *args: Any) -> T:
    """What a piece gives, which may ask where the tokens stand."""
    before, active.here = active.here, here
    try:
        return piece(*args)
    finally:
        active.here = before


def here(caller: str) -> Here | Together:
    """Where the tokens stand that this thread runs; an error that names `caller` if it runs none."""
    if active.here is None:
        raise RuntimeError(
            f"{caller}() was called outside a looped block: only a RecurrentWrapper that runs one knows it. It works "
            "in the block, its submodules and hooks, and in gates and updates."
        )
    return active.here


def iteration() -> Int[Tensor, "rows length"]:
    """The iteration of each token of the block's input, int64, from 0; in blocks, gates and updates.

    Shapes: `(rows, length)`, the first two axes of the block's input. In an update: the iteration that has
    just run, for the tokens that go on.
    Raises: `RuntimeError` outside a looped block.
    """
    return here("iteration").iteration


def positions() -> Int[Tensor, "rows length"]:
    """The position of each token of the block's input among its row's real tokens, int64, from 0.

    A block that runs on packed tokens cannot count positions by the length of its input: rotary or
    learned positions are read from here. Works in blocks, gates and updates.

    Shapes: `(rows, length)`, the first two axes of the block's input.
    Raises: `RuntimeError` outside a looped block.
    """
    return here("positions").positions


def rows() -> Int[Tensor, "rows length"]:
    """The row of the batch in which each token of the block's input stands, int64, from 0.

    Packed tokens of all rows stand in one sequence: what is one per row, `c (batch, ...)`, is read as
    `c[adadepth.rows()]`, and noise per row likewise. Works in blocks, gates and updates.

    Shapes: `(rows, length)`, the first two axes of the block's input.
    Raises: `RuntimeError` outside a looped block.
    """
    return here("rows").rows


def take(per_token: Shaped[Tensor, "batch seq *rest"]) -> Shaped[Tensor, "rows length *rest"]:
    """A tensor of all tokens in the order of the block's input; in blocks, gates and updates.

    Arguments: `per_token (batch, seq, ...)`, of the shape of the wrapper's `x`; with a cache, of the new tokens.
    Shapes: `(rows, length, ...)`, the first two axes those of the block's input. What it holds for tokens that are
    skipped or padding is not read.
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
            f"token that the loop was given, got {tuple(per_token.shape)}. What is one per row is "
            "c[adadepth.rows()]; with a cache the tokens are the new ones."
        )
    return tokens.take(per_token if active.window is None else active.window.cut(per_token))
