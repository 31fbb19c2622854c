"""Layouts with a grid of slots for each iteration: an iteration reads all its keys and values from one grid."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from ..attention.view import KV
from .layouts import Layout, Slots, chosen, zeros


class Planes(Layout):
    """A grid of slots for each of the first `iterations`; all later iterations read the last grid.

    If `iterations` is the number of steps, each iteration has a complete grid of its own, which is the fastest to
    read. If it is 1, every iteration reads each token's newest entry. The subclass decides how a grid is stored in
    memory.
    """

    def __init__(self, iterations: int, batch: int, capacity: int) -> None:
        self.iterations, self.batch, self.capacity = iterations, batch, self.rounded(capacity)
        self.grids: list[KV] = []  # (iterations, batch, kv_heads, capacity, head_dim)

    @abstractmethod
    def grid(self, like: Tensor, batch: int, capacity: int) -> Tensor:
        """A grid of zeros for entries of the same heads, size and dtype as `like (..., kv_heads, slots, head_dim)`."""

    def place(self, parts: Sequence[tuple[int, Slots]]) -> None:
        self.parts = parts
        self.found = dict[Any, Tensor]()

    def plane(self, step: int) -> int:
        """The number of an iteration's grid."""
        return min(step, self.iterations - 1)

    @property
    def calls(self) -> int:
        return len(self.grids)

    def held(self, call: int) -> KV:
        return self.grids[call]

    def read(self, call: int, step: int, rows: slice, width: int) -> KV:
        k, v = self.grids[call]
        plane = self.plane(step)
        return _part(k, plane, rows, width), _part(v, plane, rows, width)

    def grow(self, capacity: int) -> None:
        self.grids = [(self._copied(k, capacity), self._copied(v, capacity)) for k, v in self.grids]
        self.capacity = capacity

    def take(self, rows: Tensor, used: int) -> None:
        self.grids = [(self._taken(k, rows, used), self._taken(v, rows, used)) for k, v in self.grids]
        self.batch = len(rows)

    def _taken(self, grid: Tensor, rows: Tensor, used: int) -> Tensor:
        return self._copied(chosen(grid[:, :, :, :used], 1, rows), self.capacity)

    def _copied(self, grid: Tensor, capacity: int) -> Tensor:
        new = self.grid(grid, grid.shape[1], capacity)
        new[:, :, :, : grid.shape[3]] = grid
        return new

    def keep(self, lengths: Sequence[int], used: int) -> None:
        for grid in self.tensors():
            for row, length in enumerate(lengths):
                grid[:, row, :, length:used] = 0

    def clear(self, row: int, slots: slice) -> None:
        for grid in self.tensors():
            grid[:, row, :, slots] = 0

    def tensors(self) -> list[Tensor]:
        return [tensor for kv in self.grids for tensor in kv]

    def to(self, device: torch.device | str) -> None:
        self.grids = [(k.to(device), v.to(device)) for k, v in self.grids]


@final
class Grids(Planes):
    """In memory head by head: the entries of one row and head are contiguous."""

    def grid(self, like: Tensor, batch: int, capacity: int) -> Tensor:
        return zeros(like, self.iterations, batch, like.shape[-3], capacity, like.shape[-1])

    def last(self, step: int, slots: Slots) -> None:
        later = self.plane(step) + 1
        if later == self.iterations or not slots.flat.numel():
            return
        for grid in self.tensors():
            planes = grid.view(self.iterations, -1, grid.shape[-1])
            where = slots.vectors(grid.shape[2], grid.device).flatten()
            entries = planes[later - 1].index_select(0, where)
            planes[later:].index_copy_(1, where, entries.expand(self.iterations - later, -1, -1))

    def put(self, call: int, k: Tensor, v: Tensor) -> None:
        if call == len(self.grids):
            self.grids.append((self.grid(k, self.batch, self.capacity), self.grid(v, self.batch, self.capacity)))
        which = k.shape[1], k.device
        if which not in self.found:
            self.found[which] = self._where(*which)
        for grid, new in zip(self.grids[call], (k, v), strict=True):
            grid.view(-1, grid.shape[-1]).index_copy_(0, self.found[which], new.reshape(-1, new.shape[-1]))

    def _where(self, heads: int, device: torch.device) -> Tensor:
        """The places, in all planes, of the vectors that are written next: `(heads * T,)`, head by head."""
        size = self.batch * heads * self.capacity
        planes = [slots.vectors(heads, device) + self.plane(step) * size for step, slots in self.parts]
        return (planes[0] if len(planes) == 1 else torch.cat(planes, 1)).flatten()


def _part(grid: Tensor, plane: int, rows: slice, width: int) -> Tensor:
    """`grid[plane, rows, :, :width]`, in one step, because every row of every attention call needs it."""
    heads, head_dim = grid.shape[2], grid.shape[4]
    by_plane, *strides = grid.stride()
    first = plane * by_plane + rows.start * strides[0]
    return grid.as_strided((rows.stop - rows.start, heads, width, head_dim), strides, first)
