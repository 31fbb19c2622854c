"""Guidance: its second pass over a prompt of its own, at the depths and by the rule of the call."""

import copy
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from .cache import CACHE
from .depths import DEPTHS, GivenDepth, of_columns
from .inputs import check_padding


def guided(model: Any, processors: LogitsProcessorList, options: Mapping[str, Any]) -> LogitsProcessorList:
    """The processors, of which guidance runs `model` with the depths and the rule in the `options` of `generate`.

    Raises: `ValueError` for depths of columns.
    """
    return LogitsProcessorList([_guided(model, processor, options) for processor in processors])


def _guided(model: Any, processor: Any, options: Mapping[str, Any]) -> Any:
    if not isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) or processor.model is not model:
        return processor
    own = copy.copy(processor)
    own.model = _Unconditional(model, {name: options.get(name) for name in DEPTHS}, options.get("rule"))
    return own


@final
class _Unconditional:
    """The model as guidance calls it: with the ids of its own prompt, and then with each new token."""

    def __init__(self, model: Any, depths: Mapping[str, GivenDepth], rule: Any) -> None:
        for name, depth in depths.items():
            if isinstance(depth, Tensor) and depth.dim() > 0 and depth.shape[-1] > 1:
                raise ValueError(
                    f"{name} gives the depths of {depth.shape[-1]} columns, but guidance also runs a prompt with "
                    "columns of its own. Pass an int, one depth per row, (batch, 1), or a function of the ids."
                )
        self.model, self.depths, self.rule = model, depths, rule
        self.ids: Tensor | None = None

    def __call__(self, input_ids: Tensor, **given: Any) -> Any:
        past = 0 if given.get(CACHE) is None else given[CACHE].get_seq_length()
        if not past and given.get("attention_mask") is not None:
            check_padding(given["attention_mask"], 0, "negative_prompt_attention_mask")
        self.ids = input_ids if not past or self.ids is None else torch.cat([self.ids, input_ids], 1)
        depths = {
            name: of_columns(name, depth, self.ids, past, self.ids.shape[1]) for name, depth in self.depths.items()
        }
        return self.model(input_ids, **given, **depths, rule=self.rule)
