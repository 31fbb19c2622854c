"""Logits processors that were made for all rows of a batch, as those of a single row."""

import copy
from typing import Any

from transformers import LogitsProcessorList
from transformers.generation import logits_process as known

# What a processor holds for each row.
_OF_ROWS: dict[type, str] = {
    known.RepetitionPenaltyLogitsProcessor: "prompt_ignore_length",
    known.EncoderRepetitionPenaltyLogitsProcessor: "encoder_input_ids",
    known.EncoderNoRepeatNGramLogitsProcessor: "generated_ngrams",
}
# They count calls, or hold what earlier ones gave, so a guess would change what comes later.
_REMEMBER = {
    known.UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    known.SynthIDTextWatermarkLogitsProcessor: "a SynthID watermark",
}


def of_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """Processors of a batch for one of its rows, as a batch of one."""
    return LogitsProcessorList([_of_row(processor, row) for processor in processors])


def remembering(processors: LogitsProcessorList) -> list[str]:
    """Names of those that may not be asked about a token that is only guessed."""
    return [name for kind, name in _REMEMBER.items() if any(isinstance(one, kind) for one in processors)]


def _of_row(processor: Any, row: int) -> Any:
    own = copy.copy(processor)
    if isinstance(processor, known.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        own._prefix_allowed_tokens_fn = lambda _, ids: allowed(row, ids)
        return own
    name = _OF_ROWS.get(type(processor))
    if name is None:
        return processor
    held = getattr(processor, name, None)
    if held is not None and not isinstance(held, int):
        setattr(own, name, held[row : row + 1])
    if name == "generated_ngrams":
        own.batch_size = 1
    return own
