"""How a cache lays out its entries: an entry is a token's keys and values of one iteration, in every layer.

Rows hold their real tokens from the left, so a token's slot is its position. The entry of a token's last
iteration stands for all later ones. A call may be about tokens of several iterations.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..attention.view import KV

# A pool that is full grows by one part in so many, which bounds how often an entry is copied.
GROWTH = 64
# It is cleared once more than one part in so many of its entries is shown by nobody.
WASTE = 256
# Looking is slow: after parts of rows are forgotten, only once that may be more than one part in so many.
LOOSE = 8


@final
class Slots:
    """The places of tokens in the flattened `(batch, capacity)` slots of a cache, `flat (T,)` int64."""

    def __init__(self, flat: Tensor, capacity: int) -> None:
        self.flat, self.capacity = flat, capacity
        self._vectors: dict[tuple[int, torch.device], Tensor] = {}

    def vectors(self, heads: int, device: torch.device) -> Tensor:
        """Where their vectors stand in a flattened grid `(batch, heads, capacity)`, `(heads, T)`; made once."""
        if (heads, device) not in self._vectors:
            slot = self.flat % self.capacity
            first = (self.flat - slot) * heads + slot
            each = torch.arange(0, heads * self.capacity, self.capacity, device=self.flat.device)
            self._vectors[heads, device] = (each.unsqueeze(1) + first).to(device)
        return self._vectors[heads, device]


class Layout(ABC):
    """The entries of `batch` rows with `capacity` slots each.

    What stands beyond a row's length is finite: masked attention multiplies it by 0, not by nothing.
    """

    capacity: int

    @abstractmethod
    def place(self, parts: Sequence[tuple[int, Slots]]) -> None:
        """What is written next, part by part: an iteration, and the slots of the tokens that run it."""

    @abstractmethod
    def last(self, step: int, slots: Slots) -> None:
        """Iteration `step` was the last of the tokens in `slots`: later ones are shown what it wrote."""

    def write(self, call: int, k: Tensor, v: Tensor) -> None:
        """The keys and values `(1, kv_heads, T, head_dim)` of these tokens in attention call number `call`."""
        if k.requires_grad or v.requires_grad:
            raise ValueError(
                "A KVReuseCache is for inference, but the keys and values require gradients, which it would lose. Run "
                "the pass under torch.no_grad() or torch.inference_mode(), or without a cache."
            )
        if call < self.calls:
            for name, held, new in zip(("keys", "values"), self.held(call), (k, v), strict=True):
                _check_entry(name, call, held, new)
        self.put(call, k, v)

    @property
    @abstractmethod
    def calls(self) -> int:
        """The number of attention calls that have been written to."""

    @abstractmethod
    def held(self, call: int) -> KV:
        """All that is held of a call, `(..., kv_heads, slots, head_dim)`."""

    @abstractmethod
    def put(self, call: int, k: Tensor, v: Tensor) -> None:
        """Write what is known to fit."""

    @abstractmethod
    def read(self, call: int, step: int, rows: slice, width: int) -> KV:
        """What the first `width` slots of `rows` show in iteration `step`, `(rows, kv_heads, width, head_dim)`."""

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Give each row more slots."""

    @abstractmethod
    def take(self, rows: Tensor, used: int) -> None:
        """Row i becomes what row `rows[i]` was, of which the first `used` slots hold something."""

    @abstractmethod
    def keep(self, lengths: Sequence[int], used: int) -> None:
        """Forget what stands beyond each row's length, in the first `used` slots."""

    @abstractmethod
    def clear(self, row: int, slots: slice) -> None:
        """Forget what stands in some slots of a row: it is perhaps not finite."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Everything that is held."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move it."""


@final
class Grids(Layout):
    """A grid of slots for each of the first `iterations`; the last serves all that follow.

    With as many as the loop has steps, every iteration's grid is complete (the fastest to read); with
    one, each token shows its newest entry to every iteration.
    """

    def __init__(self, iterations: int, batch: int, capacity: int) -> None:
        self.iterations, self.batch, self.capacity = iterations, batch, capacity
        self.grids: list[KV] = []  # (iterations, batch, kv_heads, capacity, head_dim): a head is read in one run

    def place(self, parts: Sequence[tuple[int, Slots]]) -> None:
        self.parts = parts
        self.found = dict[tuple[int, torch.device], Tensor]()

    def last(self, step: int, slots: Slots) -> None:
        later = self._plane(step) + 1
        if later == self.iterations or not slots.flat.numel():
            return
        for grid in self.tensors():
            planes = grid.view(self.iterations, -1, grid.shape[-1])
            where = slots.vectors(grid.shape[2], grid.device).flatten()
            entries = planes[later - 1].index_select(0, where)
            planes[later:].index_copy_(1, where, entries.expand(self.iterations - later, -1, -1))

    def _plane(self, step: int) -> int:
        return min(step, self.iterations - 1)

    def _where(self, heads: int, device: torch.device) -> Tensor:
        """Where the vectors that are written next stand in all planes, `(heads * T,)`, head by head."""
        size = self.batch * heads * self.capacity
        planes = [slots.vectors(heads, device) + self._plane(step) * size for step, slots in self.parts]
        return (planes[0] if len(planes) == 1 else torch.cat(planes, 1)).flatten()

    @property
    def calls(self) -> int:
        return len(self.grids)

    def held(self, call: int) -> KV:
        return self.grids[call]

    def put(self, call: int, k: Tensor, v: Tensor) -> None:
        if call == len(self.grids):
            self.grids.append((self._grid(k), self._grid(v)))
        which = k.shape[1], k.device
        if which not in self.found:
            self.found[which] = self._where(*which)
        for grid, new in zip(self.grids[call], (k, v), strict=True):
            grid.view(-1, grid.shape[-1]).index_copy_(0, self.found[which], new.reshape(-1, new.shape[-1]))

    def _grid(self, new: Tensor) -> Tensor:
        heads, _, head_dim = new.shape[1:]
        return zeros(new, self.iterations, self.batch, heads, self.capacity, head_dim)

    def read(self, call: int, step: int, rows: slice, width: int) -> KV:
        k, v = self.grids[call]
        plane = self._plane(step)
        return _part(k, plane, rows, width), _part(v, plane, rows, width)

    def grow(self, capacity: int) -> None:
        self.grids = [(longer(k, 3, capacity), longer(v, 3, capacity)) for k, v in self.grids]
        self.capacity = capacity

    def take(self, rows: Tensor, used: int) -> None:
        self.grids = [(self._taken(k, rows, used), self._taken(v, rows, used)) for k, v in self.grids]
        self.batch = len(rows)

    def _taken(self, grid: Tensor, rows: Tensor, used: int) -> Tensor:
        return longer(chosen(grid[:, :, :, :used], 1, rows), 3, self.capacity)

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
class Pool(Layout):
    """Only the entries that were made, one after the other, and a table of which one a slot shows when.

    Entry 0 is zero and belongs to no token. Rows may show the same entries: beams share their past.
    """

    def __init__(self, iterations: int, batch: int, capacity: int, device: torch.device) -> None:
        self.capacity, self.count = capacity, 1
        self.loose = 0  # at most so many entries are shown by nobody since it was last looked at
        self.table = zeros(torch.empty(0, dtype=torch.int32, device=device), iterations, batch, capacity)
        self.pools: list[KV] = []  # (entries, kv_heads, head_dim)

    def place(self, parts: Sequence[tuple[int, Slots]]) -> None:
        self.first = self.count
        for step, slots in parts:
            flat, last = slots.flat, self.count + len(slots.flat)
            entries = torch.arange(self.count, last, dtype=torch.int32, device=flat.device)
            self.count = last
            # Numbers are small: all later iterations are shown this entry until there is another.
            showing = self.table[step:].flatten(1, 2)
            showing.index_copy_(1, flat, entries.expand(len(showing), -1))
        self.shown = dict[tuple[int, int, int, int], Tensor]()

    def last(self, step: int, slots: Slots) -> None:
        del step, slots  # the table shows it

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
        """Drop the entries that no slot shows, once they are too many."""
        self.loose = 0
        used = torch.cat([self.table.new_zeros(1), self.table.flatten()]).unique()
        if self.count - len(used) <= self.count // WASTE:
            return
        with torch.inference_mode(False):
            self.table = torch.searchsorted(used, self.table, out_int32=True)
        self.pools = [(chosen(k, 0, used), chosen(v, 0, used)) for k, v in self.pools]
        self.count = len(used)


def _part(grid: Tensor, plane: int, rows: slice, width: int) -> Tensor:
    """`grid[plane, rows, :, :width]`, in one step: it is made for every row of every attention call."""
    heads, head_dim = grid.shape[2], grid.shape[4]
    by_plane, *strides = grid.stride()
    first = plane * by_plane + rows.start * strides[0]
    return grid.as_strided((rows.stop - rows.start, heads, width, head_dim), strides, first)


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros like `like`; never an inference tensor, which only inference mode could write."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


def _check_entry(name: str, call: int, held: Tensor, new: Tensor) -> None:
    same = held.size(-3) == new.size(-3) and held.size(-1) == new.size(-1)
    if same and held.dtype is new.dtype and held.device == new.device:
        return
    for what, have, got in (
        ("dtype", held.dtype, new.dtype),
        ("device", held.device, new.device),
        ("(kv_heads, head_dim)", tuple(held.shape[-3::2]), tuple(new.shape[-3::2])),
    ):
        if have != got:
            raise ValueError(
                f"The cache holds {name} of {what} {have} in attention call {call}, got {got}. A cache serves one "
                "wrapper as it was when the cache was begun: cast and move first, then begin with a new cache or "
                "cache.reset()."
            )


def longer(old: Tensor, axis: int, size: int) -> Tensor:
    """`old` with `size` places along an axis; the new ones are 0."""
    new = zeros(old, *old.shape[:axis], size, *old.shape[axis + 1 :])
    new.narrow(axis, 0, old.shape[axis]).copy_(old)
    return new


def chosen(old: Tensor, axis: int, rows: Tensor) -> Tensor:
    """A copy of `rows` of `old` along an axis."""
    with torch.inference_mode(False):
        return old.index_select(axis, rows.to(old.device))
