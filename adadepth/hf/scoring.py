"""Losses of a language model's tokens, as `adadepth.diagnostics` reads them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._modes import evaluating
from ..diagnostics import Score
from .inputs import inputs_of
from .model import AdaptiveForCausalLM


def scorer(model: AdaptiveForCausalLM) -> Score:
    """A function `score(batch, **call)` for `adadepth.diagnostics`: the loss of each next token, and its depth.

    The depth is that of the token that predicts it. A batch is ids `(batch, seq)`, or a mapping with `input_ids` and
    perhaps `attention_mask` and `position_ids`, as from a tokenizer or a collator. `call` are arguments of the model:
    `min_depth`, `max_depth`, `rule`. For ids alone, losses and depths are `(batch, seq - 1)`. With a mask or positions,
    they are `(n,)`, for each real token that follows a real one of its text: positions that begin again begin another
    text. The model runs in evaluation mode.
    """

    def score(batch: Tensor | Mapping[str, Tensor], **call: Any) -> tuple[Tensor, Tensor]:
        given = inputs_of(batch)
        given |= {name: part.to(model.device) for name, part in given.items() if isinstance(part, Tensor)}
        ids, mask, positions = given["input_ids"], given.get("attention_mask"), given.get("position_ids")
        with evaluating(model):
            out = model(**given, **call)
        logits = out.logits[:, :-1].to(torch.promote_types(out.logits.dtype, torch.float32))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(ids[:, 1:])
        depth = out.trace.depth[:, :-1]
        if mask is None and positions is None:
            return loss, depth
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        counts = real[:, 1:] & real[:, :-1]
        if positions is not None:
            counts &= positions.expand_as(ids)[:, 1:] != 0
        return loss[counts], depth[counts]

    return score
