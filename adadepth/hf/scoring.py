"""Losses of a language model's tokens, as `adadepth.diagnostics` reads them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._modes import evaluating
from ..diagnostics import Score
from .model import AdaptiveForCausalLM


def scorer(model: AdaptiveForCausalLM) -> Score:
    """A function `score(batch, **call)` for `adadepth.diagnostics`: the loss of each next token, and its depth.

    The depth is that of the token that predicts it. A batch is ids `(batch, seq)`, or a mapping with `input_ids` and
    perhaps `attention_mask`, as from a tokenizer. `call` are arguments of the model: `min_depth`, `max_depth`, `rule`.
    Without a mask, losses and depths are `(batch, seq - 1)`. With a mask, they are `(n,)`, for each real token that
    follows a real one. The model runs in evaluation mode.
    """

    def score(batch: Tensor | Mapping[str, Tensor], **call: Any) -> tuple[Tensor, Tensor]:
        given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        ids, mask = given["input_ids"].to(model.device), given.get("attention_mask")
        with evaluating(model):
            out = model(input_ids=ids, attention_mask=mask, **call)
        logits = out.logits[:, :-1].to(torch.promote_types(out.logits.dtype, torch.float32))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(ids[:, 1:])
        depth = out.trace.depth[:, :-1]
        if mask is None:
            return loss, depth
        real = mask.to(model.device).bool()
        counts = real[:, 1:] & real[:, :-1]
        return loss[counts], depth[counts]

    return score
