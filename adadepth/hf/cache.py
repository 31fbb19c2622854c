"""The cache of an adapted model, as transformers' generation handles caches: in columns of ids."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, GenerationMixin

from ..attention.tokens import places
from ..cache.kv_reuse import KVReuseCache, LayoutName

PARTS = ("prelude", "loop", "coda")
# What transformers calls a cache in arguments and outputs: `cache` from 5.24 on.
CACHE = "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"


@final
class AdaptiveCache(Cache):
    """The cache of an adapted model. `generate` makes one; you may also pass one, as `past_key_values`.

    From transformers 5.24 on, this argument is called `cache`. The model takes both names with any version.

    Arguments:
        layout: the layout of the loop's keys and values: "filled" (fastest), "compact" (memory for the sum of
            depths), or the approximate "single". Layers that run once per token need one entry in any layout.
        capacity: the most real tokens a row may hold, allocated at once; None: it grows.

    Attributes: `parts`, the `KVReuseCache` of each of "prelude", "loop" and "coda".
    Raises: `ValueError` for what `KVReuseCache` refuses.
    """

    def __init__(self, layout: LayoutName = "filled", capacity: int | None = None) -> None:
        super().__init__(layers=[])
        self.parts = {part: KVReuseCache(layout if part == "loop" else "filled", capacity) for part in PARTS}
        self.goes_on = True  # to another turn, as far as is known: `generate` says of its own that they do not
        self._masks: list[Tensor] = []
        self._columns = 0
        self._prompt: int | None = None  # the columns before a beam search, if one has run

    @property
    def mask(self) -> Tensor:
        """True where a column holds a real token, `(batch, columns)` bool; `(0, 0)` before the first pass."""
        if len(self._masks) > 1:
            self._masks = [torch.cat(self._masks, 1)]
        return self._masks[0] if self._masks else torch.zeros(0, 0, dtype=torch.bool)

    @property
    def depth(self) -> Int[Tensor, "batch columns"]:
        """Iterations that each token ran, `(batch, columns)` int64; 0 at padding.

        Pass it as both `min_depth` and `max_depth` to repeat these depths. After a beam search, they are those of the
        beams that ran last, not of the texts that were returned.
        """
        mask = self.mask
        if not mask.any():
            return mask.long()
        return torch.where(mask, self.parts["loop"].depth.gather(1, places(mask)), 0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def batch_size(self) -> int:
        """The number of rows; -1 before the first pass."""
        return len(self._masks[0]) if self._masks else -1

    @property
    def is_linear(self) -> list[bool]:
        """False: the cache grows with the tokens, so `generate` passes only new columns."""
        return [False]

    @contextmanager
    def passing(self, x: Tensor, mask: Tensor | None) -> Iterator[None]:
        """A pass over the columns `x (batch, new, dim)`, with their mask. If it raises, the cache is as before."""
        try:
            yield
        except BaseException:
            self._shorten()
            raise
        self._masks.append(x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask)
        self._columns += x.shape[1]

    def end_beams(self, prompt: int) -> None:
        """Note that a beam search has run after `prompt` columns: rows of texts that it returned may be gone."""
        if self._columns > prompt:
            self._prompt = prompt

    def check_rows(self) -> None:
        """Check that the rows are those of texts.

        Raises: `ValueError` after a beam search.
        """
        if self._prompt is not None:
            raise ValueError(
                "The rows of this cache are those of a beam search, which need not be the texts that it returned. "
                f"Begin with a new cache or cache.reset(). cache.crop({self._prompt}) keeps the prompt alone, in "
                "a row for each beam."
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of columns, padding included."""
        return self._columns

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest columns, `-tokens_to_remove` of them.

        A positive number, as before transformers 5.20, keeps that many columns, the first ones.

        Raises: `ValueError` for more columns than are held.
        """
        if abs(tokens_to_remove) > self._columns:
            raise ValueError(
                f"crop expected how many of the {self._columns} columns held to remove, as a negative number, or how "
                f"many to keep, got {tokens_to_remove}."
            )
        if tokens_to_remove:
            mask = self.mask[:, :tokens_to_remove]
            self._columns = mask.shape[1]
            self._masks = [mask] if self._columns else []
            self._shorten()
            if self._prompt is not None and self._columns <= self._prompt:
                self._prompt = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes the former row `beam_idx[i]`."""
        rows = beam_idx.long()
        if self._masks:
            self._masks = [self.mask.index_select(0, rows.to(self.mask.device))]
        for part in self.parts.values():
            if part.steps is not None:
                part.reorder(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self._masks:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self._masks, self._columns, self._prompt = [], 0, None
        self._shorten()

    def take(self, other: "AdaptiveCache", mask: Tensor) -> None:
        """Take over the contents of another cache, whose real tokens are in the columns of `mask (batch, columns)`."""
        for name, part in other.parts.items():
            part.capacity = self.parts[name].capacity
        self.parts, self._masks, self._columns = other.parts, [mask], mask.shape[1]

    def to(self, device: torch.device | str) -> "AdaptiveCache":
        """Move the contents to a device; returns the same cache."""
        self._masks = [mask.to(device) for mask in self._masks]
        for part in self.parts.values():
            part.to(device)
        return self

    def _shorten(self) -> None:
        """Crop each part to the real tokens of the columns."""
        lengths = self.mask.sum(1)
        for part in self.parts.values():
            if part.steps is None or not self._columns:
                part.reset()
            else:
                part.crop(lengths)
