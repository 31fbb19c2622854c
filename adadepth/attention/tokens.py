"""Which tokens run, and where they are in the block's input.

*Rows* are `(batch, seq, ...)`, as a user passes them. *Tokens* are the block's input. While all tokens run, both are
the same (`WholeTokens`). In dense execution (`DenseTokens`) the block still gets the rows, and results of active
tokens are selected. In packed execution (`PackedTokens`, with a cache `CachedTokens`) it gets only the active tokens,
as one sequence `(1, T, ...)`. All of these are immutable: the loop narrows one into the next.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor

from .._lazy import lazy
from .._types import MaskRows, PositionRows
from .groups import RowGroups, group_rows

Select = Callable[[Tensor], Tensor]
Read = Callable[[Tensor], list[int]]  # reads integers from the device


class TokenSet(ABC):
    """The tokens that run in one iteration.

    `live (batch, seq)` bool marks them; `mask` marks the real tokens and is None without padding.
    """

    live: MaskRows
    mask: MaskRows | None

    @property
    def shape(self) -> tuple[int, int]:
        """The first two axes of the block's input."""
        return self.live.shape[0], self.live.shape[1]

    @property
    def empty(self) -> bool:
        """True if it is known, without reading the device, that no token runs."""
        return self.live.numel() == 0

    @abstractmethod
    def take(self, rows: Tensor) -> Tensor:
        """Rows `(batch, seq, ...)` in the order of the block's input."""

    @abstractmethod
    def spread(self, rows: Tensor) -> Tensor:
        """A tensor that broadcasts to the rows `(batch, seq, ...)`, made to broadcast to the block's input."""

    @abstractmethod
    def settle(self, new: Tensor, old: Tensor) -> Tensor:
        """`new` for the tokens that run, `old` for others that are in the block's input."""

    @abstractmethod
    def rows(self, tokens: Tensor) -> Tensor:
        """Tokens put back into rows; 0 for tokens that do not run."""

    @abstractmethod
    def over(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """`rows`, replaced by `tokens` for the tokens that run."""

    def add(self, rows: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        """`rows + weight * tokens`, with `weight (batch, seq)` in rows."""
        return rows + weight.unsqueeze(-1) * tokens

    @abstractmethod
    def narrow(self, go: MaskRows, step: int | None, read: Read) -> tuple["TokenSet", Select]:
        """The tokens of `go`, a part of these, and a function that selects them from a tensor of these tokens.

        The others exit after iteration `step`. If it is None, they are dropped, and no token can read them. `read` is
        called at most once, for the number of tokens that continue: on a GPU the host then waits.
        """

    def finish(self, step: int) -> None:
        """All tokens exit after iteration `step`."""
        del step

    @lazy
    def positions(self) -> PositionRows:
        """The position of each token among the real tokens of its row, from 0; also 0 at padding before the first."""
        return positions_of(self.live, self.mask)

    @lazy
    def numbers(self) -> Tensor:
        """The number of each row, `(batch,)` int64."""
        return torch.arange(len(self.live), device=self.live.device)


def places(mask: MaskRows) -> PositionRows:
    """The position of each token among the real tokens of its row, from 0; also 0 at padding before the first."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def positions_of(live: MaskRows, mask: MaskRows | None) -> PositionRows:
    """`places(mask)`; if `mask` is None, all tokens of the rows `live` are real."""
    if mask is None:
        batch, seq = live.shape
        return torch.arange(seq, device=live.device).expand(batch, seq)
    return places(mask)


def all_tokens(x: Tensor, mask: MaskRows | None, skip: bool) -> TokenSet:
    """The real tokens of the rows `x (batch, seq, dim)`; with `skip` they are packed once some do not run."""
    if mask is None:
        return WholeTokens(torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), skip)
    if not skip:
        return DenseTokens(mask, mask)
    real: list[int] = mask.sum(-1).tolist()
    if sum(real) == mask.numel():
        return WholeTokens(mask, skip)
    return PackedTokens(mask, mask, chosen(mask, sum(real)), RowCounts(real, real))


def same(tokens: Tensor) -> Tensor:
    """The identity, for a selection of all tokens."""
    return tokens


@final
class WholeTokens(TokenSet):
    """All tokens run and there is no padding: the block gets the rows as they are."""

    mask = None

    def __init__(self, live: MaskRows, skip: bool) -> None:
        self.live, self.skip = live, skip

    def take(self, rows: Tensor) -> Tensor:
        return rows

    def spread(self, rows: Tensor) -> Tensor:
        return rows

    def settle(self, new: Tensor, old: Tensor) -> Tensor:
        del old
        return new

    def rows(self, tokens: Tensor) -> Tensor:
        return tokens

    def over(self, rows: Tensor, tokens: Tensor) -> Tensor:
        del rows
        return tokens

    def narrow(self, go: MaskRows, step: int | None, read: Read) -> tuple[TokenSet, Select]:
        del step
        if not self.skip:
            return DenseTokens(go, None), same
        each = read(go.sum(-1))
        if (total := sum(each)) == go.numel():
            return self, same
        packed = PackedTokens(go, None, chosen(go, total), RowCounts(each, [go.shape[1]] * len(each)))
        return packed, packed.take


@final
class DenseTokens(TokenSet):
    """All tokens are computed, and active ones are selected: static shapes, and the reference for packed execution."""

    def __init__(self, live: MaskRows, mask: MaskRows | None) -> None:
        self.live, self.mask = live, mask

    def take(self, rows: Tensor) -> Tensor:
        return self.rows(rows)

    def spread(self, rows: Tensor) -> Tensor:
        # A tensor of another shape has one entry for a row or a column, so no entries of padding.
        if self.mask is None or rows.shape[:2] != self.live.shape:
            return rows
        return torch.where(_like(self.mask, rows), rows, nothing(rows))

    def settle(self, new: Tensor, old: Tensor) -> Tensor:
        # No token reads the state of one that does not run, so its graph is not kept.
        return torch.where(_like(self.live, new), new, old.detach())

    def rows(self, tokens: Tensor) -> Tensor:
        return torch.where(_like(self.live, tokens), tokens, False)  # unlike 0, it leaves bool as it is

    def over(self, rows: Tensor, tokens: Tensor) -> Tensor:
        return torch.where(_like(self.live, tokens), tokens, rows)

    def narrow(self, go: MaskRows, step: int | None, read: Read) -> tuple[TokenSet, Select]:
        del step, read
        return DenseTokens(go, self.mask), same


class Packed(TokenSet):
    """Only the tokens that run, of the whole batch, as one sequence without padding.

    `index (T,)` holds their places in the flattened rows, ascending.
    """

    index: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return 1, self.index.numel()

    @property
    def empty(self) -> bool:
        return self.index.numel() == 0

    @property
    def whole(self) -> bool:
        """Whether all tokens of the rows run."""
        return self.index.numel() == self.live.numel()

    def take(self, rows: Tensor) -> Tensor:
        flat = rows.flatten(0, 1)
        return (flat if self.whole else flat.index_select(0, self.index)).unsqueeze(0)

    def spread(self, rows: Tensor) -> Tensor:
        (batch, length), seq = rows.shape[:2], self.live.shape[1]
        if (batch, length) == (1, 1):
            return rows
        row, column = self.index // seq, self.index % seq
        return rows[0 if batch == 1 else row, 0 if length == 1 else column].unsqueeze(0)

    def settle(self, new: Tensor, old: Tensor) -> Tensor:
        del old  # tokens that do not run are not here
        return new

    def rows(self, tokens: Tensor) -> Tensor:
        tokens = tokens.squeeze(0)
        if self.whole:
            return tokens.unflatten(0, self.live.shape)
        rows = tokens.new_zeros(self.live.numel(), *tokens.shape[1:])
        return rows.index_copy(0, self.index, tokens).unflatten(0, self.live.shape)

    def over(self, rows: Tensor, tokens: Tensor) -> Tensor:
        return rows.flatten(0, 1).index_copy(0, self.index, tokens.squeeze(0)).unflatten(0, self.live.shape)

    def add(self, rows: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        weighted = self.take(weight).unsqueeze(-1) * tokens
        return rows.flatten(0, 1).index_add(0, self.index, weighted.squeeze(0)).unflatten(0, self.live.shape)


class RowCounts(NamedTuple):
    """Two counts for each row, on the host: how many tokens run, and how many are `real`."""

    each: list[int]
    real: list[int]

    @property
    def rows(self) -> list[int]:
        """The rows in which a token runs."""
        return [row for row, number in enumerate(self.each) if number]


@final
class PackedTokens(Packed):
    """Packed, with keys and values in a grid that is made for the pass.

    Each row of the grid has `width` slots. Its real tokens are at the left, so a token's slot is its position, and a
    token attends causally to earlier slots. The grid has only the rows in which a token runs. The grid of the
    iteration before may have more rows; `inherited` are their places in it.
    """

    def __init__(
        self,
        live: MaskRows,
        mask: MaskRows | None,
        index: Tensor,
        counts: RowCounts,
        inherited: list[int] | None = None,
    ) -> None:
        self.live, self.mask, self.index, self.counts = live, mask, index, counts
        self.width = max(counts.real, default=0)
        self.grid_rows = counts.rows
        # If all tokens ran before, the grid before has a row for each row of the batch.
        self._inherited = self.grid_rows if inherited is None else inherited

    def narrow(self, go: MaskRows, step: int | None, read: Read) -> tuple[TokenSet, Select]:
        del step
        each = read(go.sum(-1))
        if (total := sum(each)) == self.index.numel():
            return self, same
        kept, counts = chosen(self.take(go), total), RowCounts(each, self.counts.real)
        before = {row: place for place, row in enumerate(self.grid_rows)}
        inherited = [before[row] for row in counts.rows]
        packed = PackedTokens(go, self.mask, self.index.index_select(0, kept), counts, inherited)
        return packed, lambda tokens: tokens.index_select(1, kept)

    @property
    def inherited(self) -> Tensor:
        """The places of this grid's rows in the grid of the iteration before, `(rows,)` int64."""
        return self._sent[0]

    @property
    def lengths(self) -> Tensor:
        """The real tokens in each row of the grid, `(rows,)` int64."""
        return self._sent[1]

    @lazy
    def _known(self) -> RowCounts:
        """The counts of the rows of the grid only."""
        return RowCounts(*([numbers[row] for row in self.grid_rows] for numbers in self.counts))

    @lazy
    def _sent(self) -> tuple[Tensor, ...]:
        """`inherited`, `lengths` and the number of active tokens of each row, sent to the device together."""
        each, real = self._known
        return torch.tensor([self._inherited, real, each], dtype=torch.int64, device=self.index.device).unbind()

    @lazy
    def row(self) -> Tensor:
        """Each token's row of the grid, `(T,)` int64."""
        rows = torch.arange(len(self.grid_rows), device=self.index.device)
        return rows.repeat_interleave(self._sent[2], output_size=self.index.numel())

    @lazy
    def slots(self) -> Tensor:
        """Each token's place in the flattened grid, `(T,)` int64."""
        return self.row * self.width + self.take(self.positions).squeeze(0)

    @lazy
    def groups(self) -> RowGroups:
        """The queries of these tokens, grouped by row."""
        return group_rows(*self._known, self._sent[2], self.row)


def chosen(go: Tensor, number: int) -> Tensor:
    """Where the flattened `go` is True, `(number,)` int64; `number` is known to be how often it is True."""
    return torch.nonzero_static(go.flatten(), size=number).squeeze(1)


def nothing(given: Tensor) -> float | bool:
    """A value for what belongs to no token, in a further argument of the block: a block may divide by it."""
    return 1.0 if given.is_floating_point() else False


def _like(live: Tensor, tokens: Tensor) -> Tensor:
    return live.reshape(*live.shape, *(1,) * (tokens.dim() - 2))
