"""`KVReuseCache`: the keys and values of past tokens, as each iteration of the loop reads them."""

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, final, get_args

import torch
from jaxtyping import Int, Integer
from torch import Tensor

from .._given import integer, shown
from .grids import Grids
from .layouts import Layout, chosen, longer, zeros
from .pages import Pages
from .pool import Pool
from .runs import Span
from .tokens import CachedTokens

LayoutName = Literal["filled", "compact", "single"]


@final
class KVReuseCache:
    """The keys and values of past tokens. At iteration i, attention reads those of iteration min(i, the token's last).

    Pass it as `looped(x, cache=cache)`: first with the prompt, in one piece or several, then with each new token. The
    results are those of one pass over everything. It is for inference only, without gradients. One cache belongs to
    one `RecurrentWrapper`.

    Arguments:
        layout: what is held for a token. An entry is its keys and values of one iteration, for all layers.
            "filled": an entry for every iteration of the loop. This is the fastest. "compact": an entry for every
            iteration that the token ran. This needs memory for the sum of depths, and is slower to read.
            "single": the newest entry alone, which every iteration reads. This is an approximation: the results
            are those of one pass only if all depths are 1, or if the block carries the keys and values of its first
            iteration in its state (docs/decoding.md, "One entry for each token, exactly"). Otherwise the
            loss may be much higher (benchmarks/RESULTS.md, "single").
        capacity: the most tokens a row may hold. "filled" and "single" allocate this at once for each row; "compact"
            allocates entries as tokens run. None: it has room for the first pass, and grows when it is full.

    Attributes: `layout`, `capacity`; `steps` of the loop, None before the first pass; `layers`, the attention calls of
    the block, 0 before the first pass.
    Raises: `ValueError` for an unknown layout or a capacity below 1. When it is passed to a wrapper, also for another
    batch size, number of steps or of layers, dtype, device or head size than it holds; for more tokens than
    `capacity`; for a wrapper that is not causal; and for keys or values that require gradients. The cache is then as
    it was before the pass.
    Source: AdaPonderLM, arXiv 2603.01914: K^i = where(m^i, K^i, K^{i-1}).
    """

    def __init__(self, layout: LayoutName = "filled", capacity: int | None = None) -> None:
        if layout not in get_args(LayoutName):
            raise ValueError(f"KVReuseCache expected layout to be one of {get_args(LayoutName)}, got {layout!r}.")
        most = integer(capacity)
        if capacity is not None and (most is None or most < 1):
            raise ValueError(f"KVReuseCache needs capacity >= 1, or None to grow, got capacity={capacity!r}.")
        self.layout, self.capacity = layout, most
        self.reset()

    def reset(self) -> None:
        """Forget everything, as if the cache were new."""
        self.steps: int | None = None
        self.layers = 0
        self._lengths: list[int] = []
        self._begun: dict[int, int] = {}  # for each row, how many slots are in use, also by tokens of unfinished passes
        self._depth = torch.zeros(0, 0, dtype=torch.int64)
        self._entries: Layout | None = None
        self._owner: weakref.ref[object] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_owner": None}  # which wrapper filled it can be told in one process only

    def __setstate__(self, state: dict[str, object]) -> None:
        if torch.is_inference_mode_enabled():  # tensors that are loaded there could be written only there
            with torch.inference_mode(False):
                state = copy.deepcopy(state)
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, object]) -> "KVReuseCache":
        new = copy.copy(self)
        with torch.inference_mode(False):
            new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        new._owner = self._owner
        return new

    def __repr__(self) -> str:
        """The arguments, and what is held."""
        arguments = f"layout={self.layout!r}, capacity={self.capacity}"
        if self.steps is None:
            return f"KVReuseCache({arguments}, empty)"
        return (
            f"KVReuseCache({arguments}, steps={self.steps}, layers={self.layers}, rows={len(self._lengths)} of "
            f"{_range(self._lengths)} tokens, {self.nbytes:,} bytes on {self._depth.device})"
        )

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        """The number of real tokens in each row, `(batch,)` int64; of shape (0,) before the first pass."""
        return torch.tensor(self._lengths, dtype=torch.int64, device=self._depth.device)

    @property
    def depth(self) -> Int[Tensor, "batch longest"]:
        """The iterations that each token ran, by position, `(batch, longest)` int64; 0 beyond its row's length."""
        return self._depth[:, : max(self._lengths, default=0)].clone()

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        held = [self._depth] + ([] if self._entries is None else self._entries.tensors())
        return sum(tensor.nbytes for tensor in held)

    def reorder(self, rows: Integer[Tensor, "new_batch"]) -> None:
        """Row i becomes the former row `rows[i]`, with its length, positions and depths: for beams, or to select rows.

        Shapes: `(new_batch,)` int64; a row may come several times or not at all.
        Raises: `ValueError` for another shape or dtype, or rows that the cache does not have.
        """
        batch = len(self._lengths)
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
            raise ValueError(f"reorder expected row numbers of shape (new_batch,), integers, got {shown(rows)}.")
        rows = rows.long()
        order = rows.tolist()
        if any(not 0 <= row < batch for row in order):
            raise ValueError(f"reorder expected numbers of the {batch} rows that are held, from 0, got {order}.")
        if order == list(range(batch)):
            return
        if self._entries is not None:
            self._entries.take(rows, max(self._lengths, default=0))
        self._lengths = [self._lengths[row] for row in order]
        self._depth = chosen(self._depth, 0, rows)

    def crop(self, length: int | Integer[Tensor, "batch"]) -> None:
        """Keep at most the first `length` real tokens of each row.

        Shapes: an int, or `(batch,)` integers.
        Raises: `ValueError` for a negative length or one for another number of rows.
        """
        batch = len(self._lengths)
        limits = torch.as_tensor(length)
        if limits.is_floating_point() or limits.dtype == torch.bool or limits.shape not in ((), (batch,)):
            raise ValueError(
                f"crop expected an int, or integers of shape (batch,) = ({batch},), got {tuple(limits.shape)} "
                f"{limits.dtype}."
            )
        if bool((limits < 0).any()):
            raise ValueError(f"crop expected lengths of 0 or more, got {length}.")
        used = max(self._lengths, default=0)
        each = limits.expand(batch).tolist()
        self._lengths = [min(held, limit) for held, limit in zip(self._lengths, each, strict=True)]
        self._forget_beyond(used)

    def to(self, device: torch.device | str) -> "KVReuseCache":
        """Move the keys and values to a device; returns the same cache."""
        with torch.inference_mode(False):
            self._depth = self._depth.to(device)
            if self._entries is not None:
                self._entries.to(device)
        return self

    @contextmanager
    def open(
        self, x: Tensor, mask: Tensor | None, steps: int, causal: bool, owner: object, one_call: bool
    ) -> Iterator[CachedTokens]:
        """The tokens of a pass over the rows `x (batch, seq, dim)`. If it raises, the cache is as before.

        Arguments: `owner`, an object that stands for the wrapper; `one_call`, whether attention runs once for all
            rows. The first pass decides by it how entries lie in memory.
        """
        self._check(x, steps, causal, owner)
        batch, seq = x.shape[:2]
        before = self._lengths or [0] * batch
        new = [seq] * batch if mask is None else mask.sum(-1).tolist()
        after = [old + more for old, more in zip(before, new, strict=True)]
        longest = max(after, default=0)
        self._check_capacity(longest)
        try:
            entries = self._with_room(longest, batch, steps, x.device, one_call)
            yield CachedTokens.of(x, mask, entries, list(map(Span, range(batch), before, after)), {})
            self._owner = weakref.ref(owner)
        except BaseException:
            self._forget_beyond(longest)
            raise

    def commit(self, tokens: CachedTokens, depth: Int[Tensor, "batch seq"]) -> None:
        """Keep what the pass over `tokens` wrote."""
        self._depth.view(-1).index_copy_(0, tokens.slots.flat, tokens.take(depth).squeeze(0))
        self._lengths, self.layers = [span.after for span in tokens.held.spans], tokens.held.entries.calls

    def reserve(self, rows: int, steps: int, device: torch.device, owner: object, one_call: bool) -> None:
        """Make room for `rows` empty rows, for passes over some of them.

        Raises: `ValueError` for a cache that holds something, or without a capacity.
        """
        if self.steps is not None or self.capacity is None:
            held = "no capacity" if self.capacity is None else "one that is not empty"
            raise ValueError(
                f"Expected a new KVReuseCache with a capacity, the most tokens that a row may hold, got {held}. Pass "
                f"one, such as adadepth.KVReuseCache(layout={self.layout!r}, capacity=2048)."
            )
        self._with_room(self.capacity, rows, steps, device, one_call)
        self._lengths, self._owner = [0] * rows, weakref.ref(owner)

    def behind(self, x: Tensor, mask: Tensor | None, starts: Mapping[int, int]) -> CachedTokens:
        """The tokens `x (batch, seq, dim)` of a pass over some rows. `starts` maps each row to its first new slot."""
        assert self._entries is not None, "reserve comes first"
        new = [x.shape[1]] * len(x) if mask is None else mask.sum(-1).tolist()
        spans = [Span(row, start, start + more) for (row, start), more in zip(starts.items(), new, strict=True)]
        if self.capacity is not None and (full := [span for span in spans if span.after > self.capacity]):
            raise ValueError(
                f"Row {full[0].row} would hold {full[0].after} tokens, more than the {self.capacity} of "
                f"KVReuseCache(capacity={self.capacity}). End its text here, or give the cache the capacity of the "
                "longest prompt and its new tokens together."
            )
        self._begun |= {span.row: span.after for span in spans}
        return CachedTokens.of(x, mask, self._entries, spans, self._begun)

    def hold(self, row: int, depth: Int[Tensor, "tokens"]) -> None:
        """Keep the next tokens of a row, which have exited after `depth` iterations."""
        start = self._lengths[row]
        self._depth[row, start : start + len(depth)] = depth
        self._lengths[row] += len(depth)
        self.layers = 0 if self._entries is None else self._entries.calls

    def forget(self, row: int, slots: slice) -> None:
        """Forget the tokens in the last slots of a row, also those of passes that are not done."""
        self._depth[row, slots] = 0
        self._lengths[row] = min(slots.start, self._lengths[row])
        self._begun[row] = min(slots.start, self._begun.get(row, 0))
        if self._entries is not None:
            self._entries.clear(row, slots)

    def _check(self, x: Tensor, steps: int, causal: bool, owner: object) -> None:
        if not causal:
            raise ValueError(
                "A KVReuseCache expected RecurrentWrapper(causal=True), got causal=False: the tokens that it holds "
                "would have to attend to the new ones. Run without a cache."
            )
        if self.steps is None:
            return
        if len(self._lengths) != len(x):
            raise ValueError(
                f"The cache holds {len(self._lengths)} rows, got a batch of {len(x)}. Begin with a new cache or "
                "cache.reset(), or choose rows with cache.reorder(rows)."
            )
        if steps != self.steps:
            raise ValueError(
                f"The cache was filled by a loop of {self.steps} steps, got one of {steps}. Each RecurrentWrapper "
                "needs a cache of its own."
            )
        if self._owner is not None and self._owner() is not owner:
            raise ValueError(
                "The cache holds keys and values of another RecurrentWrapper. Each needs a cache of its own: begin "
                "with a new one, or call cache.reset()."
            )
        if x.device != self._depth.device:
            raise ValueError(f"The cache is on {self._depth.device}, got x on {x.device}. Move it: cache.to(device).")

    def _check_capacity(self, longest: int) -> None:
        if self.capacity is not None and longest > self.capacity:
            raise ValueError(
                f"KVReuseCache(capacity={self.capacity}) is too small: with the new tokens its longest row would hold "
                f"{longest}. Give it the capacity of prompt and new tokens together, or None."
            )

    def _with_room(self, longest: int, batch: int, steps: int, device: torch.device, one_call: bool) -> Layout:
        if self._entries is None:
            room = self.capacity or longest
            kind, planes = {"filled": steps, "single": 1}.get(self.layout), Pages if one_call else Grids
            self._entries = Pool(steps, batch, room, device) if kind is None else planes(kind, batch, room)
            self._depth = zeros(torch.empty(0, dtype=torch.int64, device=device), batch, self._entries.capacity)
            self.steps = steps
        if longest > self._entries.capacity:
            room = self._entries.rounded(max(longest, self._entries.capacity * 3 // 2))
            depth = longer(self._depth, 1, room)
            self._entries.grow(room)
            self._depth = depth
        return self._entries

    def _forget_beyond(self, used: int) -> None:
        """Zero what stands beyond the lengths, in the first `used` slots; it is perhaps not finite."""
        if not self._lengths or self._entries is None:
            return self.reset()
        for row, length in enumerate(self._lengths):
            self._depth[row, length:used] = 0
        self._entries.keep(self._lengths, used)


def _range(lengths: list[int]) -> str:
    low, high = min(lengths, default=0), max(lengths, default=0)
    return str(low) if low == high else f"{low} to {high}"
