"""How a cache stores its entries: an entry is a token's keys and values of one iteration, in every layer.

Each row holds its real tokens from the left, so a token's slot is its position. All iterations after a token's last
one read the entry of its last one. One call may be for tokens in several iterations.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..attention.view import KV


@final
class Slots:
    """The places of tokens in the flattened `(batch, capacity)` slots of a cache, `flat (T,)` int64."""

    def __init__(self, flat: Tensor, capacity: int) -> None:
        self.flat, self.capacity = flat, capacity
        self._vectors: dict[tuple[int, torch.device], Tensor] = {}

    def vectors(self, heads: int, device: torch.device) -> Tensor:
        """The places of their vectors in a flattened grid `(batch, heads, capacity)`: `(heads, T)`, made once."""
        if (heads, device) not in self._vectors:
            slot = self.flat % self.capacity
            first = (self.flat - slot) * heads + slot
            each = torch.arange(0, heads * self.capacity, self.capacity, device=self.flat.device)
            self._vectors[heads, device] = (each.unsqueeze(1) + first).to(device)
        return self._vectors[heads, device]


class Layout(ABC):
    """The entries of `batch` rows with `capacity` slots each.

    Entries beyond a row's length must be finite, because masked attention multiplies them by 0.
    """

    capacity: int
    complete: int | None = None  # the attention calls of the block; None before it has run once without an error

    def rounded(self, capacity: int) -> int:
        """The capacity that rows get if they need `capacity` slots."""
        return capacity

    @abstractmethod
    def place(self, parts: Sequence[tuple[int, Slots]]) -> None:
        """Announce what is written next: for each part an iteration, and the slots of the tokens that run it."""

    @abstractmethod
    def last(self, step: int, slots: Slots) -> None:
        """The tokens in `slots` exited after iteration `step`: later iterations read what it wrote."""

    def write(self, call: int, k: Tensor, v: Tensor) -> None:
        """Write the keys and values `(1, kv_heads, T, head_dim)` of the tokens of `place`, in attention call `call`."""
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
        """All keys and values of an attention call, `(..., kv_heads, slots, head_dim)`."""

    @abstractmethod
    def put(self, call: int, k: Tensor, v: Tensor) -> None:
        """The same as `write`, without checks."""

    @abstractmethod
    def read(self, call: int, step: int, rows: slice, width: int) -> KV:
        """What iteration `step` reads in the first `width` slots of `rows`: `(rows, kv_heads, width, head_dim)`."""

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Give each row more slots; `capacity` is already rounded."""

    @abstractmethod
    def take(self, rows: Tensor, used: int) -> None:
        """Row i becomes a copy of row `rows[i]`; only the first `used` slots hold entries."""

    @abstractmethod
    def keep(self, lengths: Sequence[int], used: int) -> None:
        """Delete the entries beyond each row's length, in the first `used` slots."""

    @abstractmethod
    def clear(self, row: int, slots: slice) -> None:
        """Delete the entries in some slots of a row; they may be NaN or inf."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All tensors of the layout."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move all tensors to a device."""


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros with the dtype and device of `like`; not an inference tensor, which only inference mode can write."""
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
                f"The cache holds {name} of {what} {have} in attention call {call}, got {got}. A cache belongs to one "
                "wrapper, which must not change in between: cast and move it first, then begin with a new cache or "
                "cache.reset()."
            )


def longer(old: Tensor, axis: int, size: int) -> Tensor:
    """`old`, made `size` long along an axis; new places are 0."""
    new = zeros(old, *old.shape[:axis], size, *old.shape[axis + 1 :])
    new.narrow(axis, 0, old.shape[axis]).copy_(old)
    return new


def chosen(old: Tensor, axis: int, rows: Tensor) -> Tensor:
    """A copy of `rows` of `old` along an axis."""
    with torch.inference_mode(False):
        return old.index_select(axis, rows.to(old.device))
