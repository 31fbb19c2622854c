"""What an adapted model is given, checked and brought into the loop's terms."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..attention.tokens import places
from .cache import CACHE, AdaptiveCache

_NEEDLESS = ("return_dict", "cache_position")
_LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """One kind of input.

    Raises: `ValueError`.
    """
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"Expected either input_ids or inputs_embeds, got {got}.")


def cache_of(use_cache: bool | None, *given: Cache | None) -> AdaptiveCache | None:
    """The cache of a pass: the one given, under whichever name, or a new one if it is asked for.

    Raises: `ValueError` for a cache of another kind, or two.
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
    return caches[0]


def refuse_unknown(options: dict[str, Any]) -> None:
    """Only what the loss takes is known among further arguments; those that say nothing are dropped.

    Raises: `ValueError`.
    """
    for name, value in list(options.items()):
        if value is None or value is False or name in _NEEDLESS:
            del options[name]
        elif name not in _LOSS_OPTIONS:
            raise ValueError(f"An adapted model does not take {name}. {_INSTEAD.get(name, _OTHERWISE)}")


_OTHERWISE = f"Beside its own arguments it knows those of the loss: {', '.join(_LOSS_OPTIONS)}."
_INSTEAD = {
    "output_hidden_states": "Pass states=True for the loop's state after every iteration.",
    "output_attentions": "Its attention computes no weights.",
}


def new_columns(attention_mask: Tensor | None, x: Tensor, cache: AdaptiveCache | None) -> Tensor | None:
    """Which of the tokens `x (batch, seq, dim)` are real, `(batch, seq)` bool.

    Raises: `ValueError` if the mask is neither `(batch, seq)` nor longer by the columns of the cache.
    """
    if attention_mask is None:
        return None
    batch, seq = x.shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask.dim() != 2 or len(attention_mask) != batch or attention_mask.shape[1] not in (seq, past + seq):
        raise ValueError(
            f"attention_mask expected shape (batch, seq) = ({batch}, {seq})"
            + (f", or with the {past} columns of the cache before them ({batch}, {past + seq})" if past else "")
            + f", got {tuple(attention_mask.shape)}."
        )
    return attention_mask[:, attention_mask.shape[1] - seq :].to(x.device, torch.bool)


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
            f"The model knows {limit} positions, but with these tokens a row holds {int(real.max()) + 1}. Pass fewer, "
            "or take a model with more."
        )
    if given is None:
        return
    same = (given.to(real.device) == counted) | (real < 0)
    if not bool(same.all()):
        raise ValueError(
            "position_ids expected what an adapted model counts, the place of each token among its row's real tokens, "
            "from 0. Leave them away, and pass padding as attention_mask."
        )
