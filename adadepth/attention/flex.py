"""The view that answers all packed queries by one call of flex attention, however the rows differ."""

from functools import cache
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .how import How, answering
from .packed import PackedView

BLOCK = 128  # the queries, and the slots, of one block of the mask


@final
class FlexView(PackedView):
    """One call attends from all queries to the whole grid, with a mask of the slots that each query reads.

    The mask is made without waiting for the device, once for all layers of an iteration. Flex attention has no
    dropout and no sinks. With these, and in a loop that is not causal, groups of rows are called as in `PackedView`.
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
    """The mask with which query t reads the slots from `first[t]` to `last[t]`; it never waits for the device.

    Shapes: `(T,)` int64.
    """
    queries, device = len(first), first.device
    rows, columns = -(-queries // BLOCK), -(-slots // BLOCK)
    start = torch.arange(columns, device=device) * BLOCK
    end = (start + BLOCK - 1).clamp_max(slots - 1)
    fill = rows * BLOCK - queries
    # Queries that only fill the last block read no slot, and do not prevent a block from being whole.
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
    """How many blocks each row has, `(1, 1, rows)`, and all blocks, its own first, `(1, 1, rows, columns)`; int32."""
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
    """Flex attention, compiled on a GPU, where it is slow otherwise; compiled for a CPU it has no backward pass."""
    return flex_attention if kind == "cpu" else torch.compile(flex_attention, dynamic=True)
