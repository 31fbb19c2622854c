"""Which tokens run, and how they sit in the block's input: where rows and tokens meet.

Rows are `(batch, seq, ...)`, as a user sees them. Tokens are what the block sees: for `DenseTokens`
the rows themselves, for `PackedTokens` the running ones alone, as one sequence `(1, T, ...)`.
Both are immutable; the loop narrows one into the next.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from ._lazy import lazy
from typing import final

import torch
from torch import Tensor

from ._types import MaskRows, PositionRows
from .groups import Group, RowGroups, group_rows

Select = Callable[[Tensor], Tensor]


class TokenSet(ABC):
    """The tokens that run in one iteration.

    `live (batch, seq)` bool says which; `everyone` is True where that is known, without a look at
    the data, to be all of them; `mask` are the real tokens, None where nothing is padded.
    """

    live: MaskRows
    mask: MaskRows | None
    everyone: bool

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The first two axes of the block's input."""

    @property
    @abstractmethod
    def empty(self) -> bool:
        """True where it is known that nothing is left to run."""

    @abstractmethod
    def take(self, rows: Tensor) -> Tensor:
        """Rows `(batch, seq, ...)` in the order of the block's input."""

    @abstractmethod
    def settle(self, new: Tensor, old: Tensor) -> Tensor:
        """`new` for the tokens that run, `old` for those that are merely present."""

    @abstractmethod
    def rows(self, tokens: Tensor) -> Tensor:
        """Tokens back in rows, 0 where nothing runs."""

    @abstractmethod
    def over(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """`rows`, replaced by `tokens` where these run."""

    @abstractmethod
    def add(self, rows: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        """`rows + weight * tokens`, with `weight (batch, seq)` in rows."""

    @abstractmethod
    def narrow(self, go: MaskRows) -> tuple["TokenSet", Select]:
        """The tokens of `go`, and what takes a tensor of these tokens to a tensor of those."""

    @lazy
    def positions(self) -> PositionRows:
        """The place of each token among its row's real tokens, from 0; 0 before the first."""
        if self.mask is None:
            batch, seq = self.live.shape
            return torch.arange(seq, device=self.live.device).expand(batch, seq)
        return (self.mask.cumsum(-1) - 1).clamp_min(0)


def _same(tokens: Tensor) -> Tensor:
    return tokens


@final
class DenseTokens(TokenSet):
    """All tokens are computed, those that run are selected: static shapes, the reference."""

    def __init__(self, live: MaskRows, mask: MaskRows | None, everyone: bool) -> None:
        self.live, self.mask, self.everyone = live, mask, everyone

    @classmethod
    def start(cls, mask: MaskRows | None, x: Tensor) -> "DenseTokens":
        if mask is None:
            return cls(_everyone(x), None, True)
        return cls(mask, mask, False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.live.shape[0], self.live.shape[1]

    @property
    def empty(self) -> bool:
        return self.live.numel() == 0

    def take(self, rows: Tensor) -> Tensor:
        return self.rows(rows)

    def settle(self, new: Tensor, old: Tensor) -> Tensor:
        return new if self.everyone else torch.where(_like(self.live, new), new, old)

    def rows(self, tokens: Tensor) -> Tensor:
        return tokens if self.everyone else torch.where(_like(self.live, tokens), tokens, 0)

    def over(self, rows: Tensor, tokens: Tensor) -> Tensor:
        return self.settle(tokens, rows)

    def add(self, rows: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        return rows + weight.unsqueeze(-1) * tokens

    def narrow(self, go: MaskRows) -> tuple[TokenSet, Select]:
        return DenseTokens(go, self.mask, False), _same


@final
class PackedTokens(TokenSet):
    """Only the tokens that run, over the whole batch as one sequence: no padding anywhere.

    `index (T,)` are their places in the flattened rows, ascending; None means every place.
    Keys and values live in a grid `(batch, width)` in which each row's real tokens stand at its
    left, so that a token's slot is its position and causality is the order of slots.
    """

    def __init__(self, live: MaskRows, mask: MaskRows | None, index: Tensor | None, width: int) -> None:
        self.live, self.mask, self.index, self.width = live, mask, index, width
        self.everyone = index is None

    @classmethod
    def start(cls, mask: MaskRows | None, x: Tensor) -> "PackedTokens":
        if mask is None or bool(mask.all()):
            return cls(_everyone(x), None, None, x.shape[1])
        width = int(mask.sum(-1).max())
        return cls(mask, mask, mask.flatten().nonzero().squeeze(1), width)

    @property
    def shape(self) -> tuple[int, int]:
        return 1, self.live.numel() if self.index is None else self.index.numel()

    @property
    def empty(self) -> bool:
        return self.shape[1] == 0

    def take(self, rows: Tensor) -> Tensor:
        flat = rows.flatten(0, 1)
        return (flat if self.index is None else flat.index_select(0, self.index)).unsqueeze(0)

    def settle(self, new: Tensor, old: Tensor) -> Tensor:
        del old  # tokens that do not run are not here
        return new

    def rows(self, tokens: Tensor) -> Tensor:
        tokens = tokens.squeeze(0)
        if self.index is not None:
            whole = tokens.new_zeros(self.live.numel(), *tokens.shape[1:])
            tokens = whole.index_copy(0, self.index, tokens)
        return tokens.unflatten(0, self.live.shape)

    def over(self, rows: Tensor, tokens: Tensor) -> Tensor:
        if self.index is None:
            return self.rows(tokens)
        whole = rows.flatten(0, 1).index_copy(0, self.index, tokens.squeeze(0))
        return whole.unflatten(0, self.live.shape)

    def add(self, rows: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        weighted = self.take(weight).unsqueeze(-1) * tokens
        if self.index is None:
            return rows + self.rows(weighted)
        whole = rows.flatten(0, 1).index_add(0, self.index, weighted.squeeze(0))
        return whole.unflatten(0, self.live.shape)

    def narrow(self, go: MaskRows) -> tuple[TokenSet, Select]:
        kept = self.take(go).squeeze(0).nonzero().squeeze(1)
        if kept.numel() == self.shape[1]:
            return self, _same
        index = kept if self.index is None else self.index.index_select(0, kept)
        return PackedTokens(go, self.mask, index, self.width), lambda tokens: tokens.index_select(1, kept)

    @lazy
    def slots(self) -> Tensor:
        """Each token's place in the flattened grid, `(T,)` int64."""
        batch, seq = self.live.shape
        if self.mask is None:
            assert self.index is not None
            return self.index
        rows = torch.arange(batch, device=self.live.device).unsqueeze(1)
        return self.take(rows * self.width + self.positions).squeeze(0)

    @lazy
    def groups(self) -> RowGroups:
        """How these tokens' queries are regrouped by row."""
        batch, seq = self.live.shape
        if self.index is None:
            return RowGroups([Group(None, batch, seq, True)], None, None)
        lengths = [seq] * batch if self.mask is None else self.mask.sum(-1).tolist()
        return group_rows(self.index // seq, lengths)


def _everyone(x: Tensor) -> MaskRows:
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def _like(live: Tensor, tokens: Tensor) -> Tensor:
    return live.reshape(*live.shape, *(1,) * (tokens.dim() - 2))
