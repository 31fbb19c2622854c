"""The tokens of a pass with a cache, or of several passes together."""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from .._lazy import lazy
from .._types import MaskRows, PositionRows
from ..attention.tokens import Packed, Read, Select, TokenSet, chosen, positions_of, same
from .layouts import Layout, Slots
from .runs import Run, Span, runs_of


@final
class Held:
    """Where the rows `live (batch, seq)` of a pass are in the `entries` of a cache: one span for each row.

    `begun` holds for each row of the cache how many of its slots are in use now, also by tokens that started later.
    `numbers (batch,)` int64 are the numbers of these rows in the cache.
    """

    def __init__(
        self, entries: Layout, spans: list[Span], begun: Mapping[int, int], live: MaskRows, mask: MaskRows | None
    ) -> None:
        self.entries, self.spans, self.begun = entries, spans, begun
        self._live, self._mask = live, mask
        each = [(row, before, row * entries.capacity + before) for row, before, _ in spans]
        sent = torch.tensor(each, dtype=torch.int64, device=live.device)  # one transfer
        self.numbers, self._first, self._slot = sent.view(-1, 3).unbind(1)

    @lazy
    def positions(self) -> PositionRows:
        """The positions of the tokens in their rows."""
        return self._first.unsqueeze(1) + positions_of(self._live, self._mask)

    @lazy
    def slots(self) -> Tensor:
        """The places of the tokens in the flattened slots of the cache, `(batch, seq)` int64."""
        return self._slot.unsqueeze(1) + positions_of(self._live, self._mask)


@final
class CachedTokens(Packed):
    """Packed, with keys and values in a cache, after those of earlier passes.

    `queries` holds how many tokens of each row run.
    """

    def __init__(self, live: MaskRows, mask: MaskRows | None, index: Tensor, held: Held, queries: list[int]) -> None:
        self.live, self.mask, self.index, self.held, self.queries = live, mask, index, held, queries

    @classmethod
    def of(
        cls, x: Tensor, mask: MaskRows | None, entries: Layout, spans: list[Span], begun: Mapping[int, int]
    ) -> "CachedTokens":
        """The real tokens of the rows `x (batch, seq, dim)`."""
        live = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        queries = [span.after - span.before for span in spans]
        index = torch.arange(live.numel(), device=x.device) if mask is None else chosen(live, sum(queries))
        return cls(live, mask, index, Held(entries, spans, begun, live, mask), queries)

    def narrow(self, go: MaskRows, step: int | None, read: Read) -> tuple[TokenSet, Select]:
        queries, tokens = read(go.sum(-1)), self.index.numel()
        if (total := sum(queries)) == tokens:
            return self, same
        here = self.take(go)
        kept = chosen(here, total)
        if step is not None:
            gone = chosen(~here, tokens - total)
            self.held.entries.last(step, Slots(self.slots.flat.index_select(0, gone), self.slots.capacity))
        fewer = CachedTokens(go, self.mask, self.index.index_select(0, kept), self.held, queries)
        return fewer, lambda tokens: tokens.index_select(1, kept)

    def finish(self, step: int) -> None:
        self.held.entries.last(step, self.slots)

    @property
    def positions(self) -> PositionRows:
        return self.held.positions

    @property
    def numbers(self) -> Tensor:
        return self.held.numbers

    @lazy
    def slots(self) -> Slots:
        """The slot of each token in the cache."""
        return Slots(self.take(self.held.slots).squeeze(0), self.held.entries.capacity)

    @property
    def runs(self) -> list[Run]:
        """The rows with active tokens, in order.

        If other tokens have already started after these in a row, only rows of equal length are read together: what
        those tokens wrote may be NaN or inf, and a mask would multiply it by 0.
        """
        later = any(self.held.begun.get(span.row, 0) > span.after for span in self.held.spans)
        return self._apart if later else self._together

    @lazy
    def _together(self) -> list[Run]:
        return list(runs_of(self.queries, self.held.spans))

    @lazy
    def _apart(self) -> list[Run]:
        return list(runs_of(self.queries, self.held.spans, fill=1.0))


@final
class JoinedTokens(TokenSet):
    """The tokens of several passes with one cache, one pass after the other; each pass has its own iteration.

    Together they have no common rows `(batch, seq)`.
    """

    mask = None

    def __init__(self, parts: Sequence[tuple[int, CachedTokens]]) -> None:
        self.parts, self.live = parts, parts[0][1].live
        self.length = sum(tokens.index.numel() for _, tokens in parts)

    @property
    def shape(self) -> tuple[int, int]:
        return 1, self.length

    @property
    def empty(self) -> bool:
        return not self.length

    def take(self, rows: Tensor) -> Tensor:
        raise _in_no_rows()

    def spread(self, rows: Tensor) -> Tensor:
        raise _in_no_rows()

    def settle(self, new: Tensor, old: Tensor) -> Tensor:
        raise _in_no_rows()

    def rows(self, tokens: Tensor) -> Tensor:
        raise _in_no_rows()

    def over(self, rows: Tensor, tokens: Tensor) -> Tensor:
        raise _in_no_rows()

    def narrow(self, go: MaskRows, step: int | None, read: Read) -> tuple[TokenSet, Select]:
        raise _in_no_rows()


def _in_no_rows() -> ValueError:
    return ValueError(
        "Tokens of several passes run in one call of the block, so they have no common rows (batch, seq). Pass a "
        "tensor with one entry for each token as block_kwargs; adadepth.rows() gives each token's row of the cache."
    )
