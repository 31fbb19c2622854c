"""A layout that holds each entry once, and a table that says which entry an iteration reads."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..attention.view import KV
from .layouts import Layout, Slots, chosen, longer, zeros

# A full pool grows by 1/64 of its size, which limits how often entries are copied.
GROWTH = 64
# Entries that no slot uses are dropped once they are more than 1/256 of all.
WASTE = 256
# Counting them is slow: after parts of rows are deleted, it is done only if they may be more than 1/8 of all.
LOOSE = 8


@final
class Pool(Layout):
    """Only the entries that were computed, one after the other, and a table: which entry a slot has in an iteration.

    Entry 0 is zero and belongs to no token. Rows may share entries, as beams share their past.
    """

    def __init__(self, iterations: int, batch: int, capacity: int, device: torch.device) -> None:
        self.capacity, self.count = capacity, 1
        self.loose = 0  # upper bound of the entries that became unused since they were last counted
        self.table = zeros(torch.empty(0, dtype=torch.int32, device=device), iterations, batch, capacity)
        self.pools: list[KV] = []  # (entries, kv_heads, head_dim)

    def place(self, parts: Sequence[tuple[int, Slots]]) -> None:
        self.first = self.count
        for step, slots in parts:
            flat, last = slots.flat, self.count + len(slots.flat)
            entries = torch.arange(self.count, last, dtype=torch.int32, device=flat.device)
            self.count = last
            # The table is small, so all later iterations get this entry until there is a newer one.
            showing = self.table[step:].flatten(1, 2)
            showing.index_copy_(1, flat, entries.expand(len(showing), -1))
        self.shown = dict[tuple[int, int, int, int], Tensor]()

    def last(self, step: int, slots: Slots) -> None:
        del step, slots  # `place` has already written it into the table

    @property
    def calls(self) -> int:
        return len(self.pools)

    def held(self, call: int) -> KV:
        k, v = self.pools[call]
        return k.transpose(0, 1), v.transpose(0, 1)

    def put(self, call: int, k: Tensor, v: Tensor) -> None:
        k, v = (new.squeeze(0).transpose(0, 1) for new in (k, v))
        if call == len(self.pools):
            self.pools.append((zeros(k, 1, *k.shape[1:]), zeros(v, 1, *v.shape[1:])))
        if len(self.pools[call][0]) < self.count:
            k_pool, v_pool = self.pools[call]
            size = max(self.count, len(k_pool) + len(k_pool) // GROWTH)
            self.pools[call] = longer(k_pool, 0, size), longer(v_pool, 0, size)
        for pool, new in zip(self.pools[call], (k, v), strict=True):
            pool[self.first : self.count] = new

    def read(self, call: int, step: int, rows: slice, width: int) -> KV:
        k, v = self.pools[call]
        which = (step, rows.start, rows.stop, width)
        if which not in self.shown:
            self.shown[which] = self.table[step, rows, :width].flatten()
        entries = self.shown[which].to(k.device)
        shape = (rows.stop - rows.start, width)
        return (
            k.index_select(0, entries).unflatten(0, shape).transpose(1, 2),
            v.index_select(0, entries).unflatten(0, shape).transpose(1, 2),
        )

    def grow(self, capacity: int) -> None:
        self.table, self.capacity = longer(self.table, 2, capacity), capacity

    def take(self, rows: Tensor, used: int) -> None:
        self.table = chosen(self.table, 1, rows)
        self._collect()

    def keep(self, lengths: Sequence[int], used: int) -> None:
        for row, length in enumerate(lengths):
            self.table[:, row, length:used] = 0
        self._collect()

    def clear(self, row: int, slots: slice) -> None:
        gone = self.table[:, row, slots]
        self.loose += int(gone.count_nonzero())
        gone.zero_()
        if not slots.start or self.loose > self.count // LOOSE:
            self._collect()

    def tensors(self) -> list[Tensor]:
        return [self.table, *(tensor for kv in self.pools for tensor in kv)]

    def to(self, device: torch.device | str) -> None:
        self.table = self.table.to(device)
        self.pools = [(k.to(device), v.to(device)) for k, v in self.pools]

    def _collect(self) -> None:
        """Drop the entries that no slot uses, if they are too many."""
        self.loose = 0
        used = torch.cat([self.table.new_zeros(1), self.table.flatten()]).unique()
        if self.count - len(used) <= self.count // WASTE:
            return
        with torch.inference_mode(False):
            self.table = torch.searchsorted(used, self.table, out_int32=True)
        self.pools = [(chosen(k, 0, used), chosen(v, 0, used)) for k, v in self.pools]
        self.count = len(used)
