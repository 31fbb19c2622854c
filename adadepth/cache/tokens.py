"""The tokens of a pass with a cache."""

from typing import NamedTuple, final

import torch
from torch import Tensor

from .._lazy import lazy
from .._types import MaskRows, PositionRows
from ..attention.tokens import Packed, Select, TokenSet, positions_of, same
from .layouts import Layout
from .runs import Run, runs_of


class Held(NamedTuple):
    """What a cache knows of a pass: each row held `before` and is to hold `after` real tokens, in `entries`.

    `positions (batch, seq)` int64 are those of the pass's tokens, their slots in their rows.
    """

    entries: Layout
    before: list[int]
    after: list[int]
    positions: PositionRows


@final
class CachedTokens(Packed):
    """Packed, with keys and values in a cache, behind those of earlier passes."""

    def __init__(self, live: MaskRows, mask: MaskRows | None, index: Tensor, held: Held) -> None:
        self.live, self.mask, self.index, self.held = live, mask, index, held
        self.positions = held.positions  # goes before the lazy one

    @classmethod
    def of(
        cls, x: Tensor, mask: MaskRows | None, entries: Layout, before: list[int], after: list[int]
    ) -> "CachedTokens":
        live = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        positions = torch.tensor(before, dtype=torch.int64, device=x.device).unsqueeze(1) + positions_of(live, mask)
        return cls(live, mask, live.flatten().nonzero().squeeze(1), Held(entries, before, after, positions))

    def narrow(self, go: MaskRows) -> tuple[TokenSet, Select]:
        kept = self.take(go).squeeze(0).nonzero().squeeze(1)
        if kept.numel() == self.index.numel():
            return self, same
        fewer = CachedTokens(go, self.mask, self.index.index_select(0, kept), self.held)
        return fewer, lambda tokens: tokens.index_select(1, kept)

    @lazy
    def slots(self) -> Tensor:
        """Each token's place in the flattened `(batch, capacity)` slots of the cache, `(T,)` int64."""
        row = self.index // self.live.shape[1]
        return row * self.held.entries.capacity + self.take(self.positions).squeeze(0)

    @lazy
    def runs(self) -> list[Run]:
        """The rows that ask, in order."""
        return list(runs_of(self.live.sum(-1).tolist(), self.held.before, self.held.after))
