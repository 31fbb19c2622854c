"""What an adapted model is given, checked and brought into the loop's terms."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..attention.tokens import places
from .anatomy import Anatomy, text_config
from .cache import CACHE, AdaptiveCache

_NEEDLESS = ("return_dict", "cache_position")
# What trainers that pack several texts into a row say beside its position_ids, for kernels that need it.
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_OF_TOKENS = ("input_ids", "attention_mask", "position_ids", *_BOUNDS)
LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")


def inputs_of(batch: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    """What a batch, ids or a mapping as from a tokenizer or a collator, says of its tokens; nothing else, as labels."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    return {name: batch[name] for name in _OF_TOKENS if batch.get(name) is not None}


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """One kind of input.

    Raises: `ValueError`.
    """
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"Expected either input_ids or inputs_embeds, got {got}.")


def cache_of(use_cache: bool | None, *given: Cache | None) -> AdaptiveCache | None:
    """The cache of a pass: the one given, under whichever name, or a new one if it is asked for.

    Raises: `ValueError` for a cache of another kind, or two, or one of a beam search.
    """
    caches = [cache for cache in given if cache is not None]
    if not caches:
        return AdaptiveCache() if use_cache else None
    if len(caches) > 1:
        raise ValueError(f"past_key_values and cache are two names of the same argument, got both. Pass {CACHE} alone.")
    if not isinstance(caches[0], AdaptiveCache):
        raise ValueError(
            f"{CACHE} expected an AdaptiveCache, which holds keys and values of every iteration, got "
            f"{type(caches[0]).__name__}. Pass adadepth.hf.AdaptiveCache(), or use_cache=True for a new one."
        )
    caches[0].check_rows()
    return caches[0]


def refuse_unknown(options: dict[str, Any], positions: Tensor | None) -> None:
    """Only what the loss takes is known among further arguments; those that say nothing are dropped.

    So are bounds of texts beside the `positions` that tell them apart.
    Raises: `ValueError`.
    """
    for name, value in list(options.items()):
        if value is None or value is False or name in _NEEDLESS or (name in _BOUNDS and positions is not None):
            del options[name]
        elif name not in LOSS_OPTIONS:
            raise ValueError(f"An adapted model does not take {name}. {_INSTEAD.get(name, _OTHERWISE)}")


_OTHERWISE = f"Beside its own arguments it takes those of the loss: {', '.join(LOSS_OPTIONS)}."
_INSTEAD = {
    "output_attentions": "Its attention computes no weights.",
    **dict.fromkeys(_BOUNDS, "Pass position_ids, which begin again with each text of a row."),
}


def new_columns(attention_mask: Tensor | None, x: Tensor, cache: AdaptiveCache | None) -> Tensor | None:
    """Which of the tokens `x (batch, seq, dim)` are real, `(batch, seq)` bool.

    Raises: `ValueError` if the cache holds another number of rows, or if the mask is neither `(batch, seq)` nor longer
        by the columns of the cache.
    """
    batch, seq = x.shape[:2]
    if cache is not None and cache.batch_size not in (-1, batch):
        raise ValueError(
            f"The cache holds {cache.batch_size} rows, got a batch of {batch}. Begin with a new cache or "
            "cache.reset(), or choose rows with cache.reorder_cache(rows). For n beams or n sequences of each row, "
            "repeat its rows with cache.batch_repeat_interleave(n)."
        )
    if attention_mask is None:
        return None
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask.dim() != 2 or len(attention_mask) != batch or attention_mask.shape[1] not in (seq, past + seq):
        raise ValueError(
            f"attention_mask expected shape (batch, seq) = ({batch}, {seq})"
            + (f", or with the {past} columns of the cache before them ({batch}, {past + seq})" if past else "")
            + f", got {tuple(attention_mask.shape)}."
        )
    if attention_mask.shape[1] > seq and cache is not None:
        check_past(attention_mask[:, :past], cache)
    return attention_mask[:, attention_mask.shape[1] - seq :].to(x.device, torch.bool)


def check_past(mask: Tensor, cache: AdaptiveCache) -> None:
    """That a mask `(batch, columns)` says of the columns of a cache what they were run with.

    Raises: `ValueError`.
    """
    differs = mask.to(cache.mask.device, torch.bool) != cache.mask
    if bool(differs.any()):
        row, column = differs.nonzero()[0].tolist()
        was = "real" if bool(cache.mask[row, column]) else "padding"
        raise ValueError(
            f"attention_mask contradicts the cache: in row {row}, column {column} was {was} when it was run. Pass the "
            "mask with which the columns were run, 0 for padding and for what follows the end of a text; cache.mask "
            "holds it."
        )


def check_padding(mask: Tensor, past: int, name: str = "attention_mask") -> None:
    """Check that padding is on the left: the next token of a row is predicted from the last column of `mask`.

    Behind `past` columns of a cache, a row may have ended before. It then gets no new token, or only the one with which
    it ended, in the first new column, because that one has not run.
    Raises: `ValueError`.
    """
    new = mask[:, past:].bool()
    padded = ~new[:, -1:].all(1)
    if past:
        padded &= new[:, 1:].any(1)
    if bool(padded.any()):
        raise ValueError(
            "generate expected a real token in the last column of every row, because the next token is predicted from "
            f"it, got {name}=0 there in row {int(padded.nonzero()[0])}. Pad on the left, as "
            "tokenizer.padding_side = 'left' does, and pass the attention_mask. Each row needs at least one real token."
        )


def learned_positions(base: Any, anatomy: Anatomy) -> int | None:
    """How many positions the backbone has a table of; None where positions are rotary or the like."""
    most = getattr(text_config(base.config), "max_position_embeddings", None)
    words = base.get_input_embeddings()
    tables = [part for part in anatomy.of(base).children() if isinstance(part, nn.Embedding) and part is not words]
    # Some have two rows more, for padding before the first position.
    return most if isinstance(most, int) and any(0 <= t.num_embeddings - most <= 2 for t in tables) else None


def positions_of(x: Tensor, mask: Tensor | None, cache: AdaptiveCache | None) -> Tensor:
    """The place of each token among the real tokens of its row, `(batch, seq)` int64."""
    new = places(x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask)
    held = None if cache is None else cache.parts["loop"].lengths
    return new if held is None or not len(held) else new + held.unsqueeze(1)


def check_positions(given: Tensor | None, counted: Tensor, mask: Tensor | None, limit: int | None) -> None:
    """Positions that are given must be those that are counted, and these below what the model knows.

    Raises: `ValueError`.
    """
    real = counted if mask is None else counted.masked_fill(~mask, -1)
    if limit is not None and real.numel() and int(real.max()) >= limit:
        raise ValueError(
            f"The model has {limit} positions, but with these tokens a row holds {int(real.max()) + 1}. Pass fewer "
            "tokens, or use a model with more positions."
        )
    if given is None:
        return
    same = (given.to(real.device) == counted) | (real < 0)
    if not bool(same.all()):
        raise ValueError(
            "position_ids expected the position of each token among the real tokens of its row, from 0, as an adapted "
            "model counts them. Omit them, and pass padding as attention_mask."
        )
