"""A layout in pages, which a kernel for paged keys reads without a copy."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..attention.view import KV
from .grids import Planes
from .layouts import Slots, zeros


@final
class Pages(Planes):
    """In memory token by token, `(iterations, batch, capacity, kv_heads, head_dim)`; a row of a plane is some pages."""

    page = 256  # slots; FlashAttention 2 supports only multiples of this

    def rounded(self, capacity: int) -> int:
        return -(-capacity // self.page) * self.page

    def grid(self, like: Tensor, batch: int, capacity: int) -> Tensor:
        return zeros(like, self.iterations, batch, capacity, like.shape[-3], like.shape[-1]).transpose(2, 3)

    def place(self, parts: Sequence[tuple[int, Slots]]) -> None:
        super().place(parts)
        size = self.batch * self.capacity
        flat = [slots.flat + self.plane(step) * size for step, slots in parts]
        self.flat = flat[0] if len(flat) == 1 else torch.cat(flat)

    def places(self, device: torch.device) -> Tensor:
        """The places, in the slots of all planes, of the tokens that are written next: `(T,)` int64."""
        if device not in self.found:
            self.found[device] = self.flat.to(device)
        return self.found[device]

    def last(self, step: int, slots: Slots) -> None:
        later = self.plane(step) + 1
        if later == self.iterations or not slots.flat.numel():
            return
        for grid in self.tensors():
            planes, where = _slots(grid).unflatten(0, (self.iterations, -1)), slots.flat.to(grid.device)
            entries = planes[later - 1].index_select(0, where)
            planes[later:].index_copy_(1, where, entries.expand(self.iterations - later, -1, -1, -1))

    def put(self, call: int, k: Tensor, v: Tensor) -> None:
        if call == len(self.grids):
            self.grids.append((self.grid(k, self.batch, self.capacity), self.grid(v, self.batch, self.capacity)))
        places = self.places(k.device)
        for grid, new in zip(self.grids[call], (k, v), strict=True):
            _slots(grid).index_copy_(0, places, new.squeeze(0).transpose(0, 1))

    def pages(self, call: int) -> KV:
        """All entries of a call, `(pages, page, kv_heads, head_dim)`; the pages of a row of a plane are neighbours."""
        k, v = (_slots(grid).unflatten(0, (-1, self.page)) for grid in self.grids[call])
        return k, v


def _slots(grid: Tensor) -> Tensor:
    """The slots of all planes, `(iterations * batch * capacity, kv_heads, head_dim)`, without a copy."""
    return grid.transpose(2, 3).view(-1, grid.shape[2], grid.shape[4])
