"""The view of packed tokens whose queries are answered by one call of flex attention, however rows differ."""

from functools import cache
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .how import How, answering
from .packed import PackedView

BLOCK = 128  # queries, and slots, that a block of the mask has


@final
class FlexView(PackedView):
    """All queries ask the whole grid in one call, and a mask says which slots each of them sees.

    The mask is made without a wait for the device, once for all layers of an iteration. What flex attention has not,
    dropout and sinks, and a loop that is not causal, are left to groups of rows.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        if not self.causal or how.dropout_p or how.sinks is not None:
            return super()._attend(q, k, v, how)
        mask = self._mask_of(("flex", how.window), lambda: self._mask(how.window))
        more = {"scale": how.scale, "enable_gqa": how.enable_gqa, "score_mod": _capped(how.softcap)}
        with answering():
            out: Tensor = _attention(q.device.type)(q, _flat(k), _flat(v), block_mask=mask, **more)
        return out

    def _mask(self, window: int | None) -> BlockMask:
        slots, row = self.tokens.slots, self.tokens.row
        first = row * self.tokens.width
        if window is not None:
            first = torch.maximum(first, slots - window + 1)
        return intervals(first, slots, len(self.tokens.grid_rows) * self.tokens.width)


def intervals(first: Tensor, last: Tensor, slots: int) -> BlockMask:
    """The mask under which query t sees the slots from `first[t]` to `last[t]`, of so many; no look at the data.

    Shapes: `(T,)` int64.
    """
    queries, device = len(first), first.device
    rows, columns = -(-queries // BLOCK), -(-slots // BLOCK)
    start = torch.arange(columns, device=device) * BLOCK
    end = (start + BLOCK - 1).clamp_max(slots - 1)
    fill = rows * BLOCK - queries
    # A query that is none sees nothing, and hinders no block from being whole.
    low, high = (
        F.pad(each, (0, fill), value=value).view(rows, BLOCK, 1) for each, value in ((first, slots), (last, -1))
    )
    real = F.pad(torch.ones_like(first, dtype=torch.bool), (0, fill)).view(rows, BLOCK, 1)
    whole = (((low <= start) & (high >= end)) | ~real).all(1)
    some = ((low <= end) & (high >= start)).any(1) & ~whole

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        return (slot >= first[query]) & (slot <= last[query])

    return BlockMask.from_kv_blocks(
        *_listed(some), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(queries, slots)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row how many blocks, and which, these first: `(1, 1, rows)` and `(1, 1, rows, columns)` int32."""
    blocks = blocks[None, None]
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _flat(grid: Tensor) -> Tensor:
    """The grid `(rows, kv_heads, width, head_dim)` as one row, `(1, kv_heads, rows * width, head_dim)`."""
    return grid.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0)


def _capped(softcap: float | None) -> Any:
    if softcap is None:
        return None

    def bounded(score: Tensor, *_place: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return bounded


@cache
def _attention(kind: str) -> Any:
    """Compiled where it is fast only then; on a CPU, where it has no backward pass, as it is."""
    return flex_attention if kind == "cpu" else torch.compile(flex_attention, dynamic=True)
