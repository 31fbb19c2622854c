"""`generate` with drafts: the next token starts as a guess while the token before it still runs."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from .cache import CACHE, AdaptiveCache
from .depths import DEPTHS, check_rows, row_of
from .drafts import Drafts
from .engine import Engine, Refused
from .noise import Noise
from .processors import of_row, remembering
from .requests import Request

_OUTPUTS = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")


def drafted(
    model: Any,
    drafts: Drafts,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    **given: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """The result of `generate` for `input_ids (batch, columns)`. Each row runs as a request, at its own pace.

    Raises: `ValueError` for options that cannot be used with drafts, and the error of a row that fails.
    """
    cache, config = given.get(CACHE), generation_config
    mask = given["attention_mask"].bool() if given.get("attention_mask") is not None else input_ids >= 0
    _check(mask, cache, config, streamer, given | {"processors": logits_processor})
    assert isinstance(cache, AdaptiveCache), "checked"
    noise, options = Noise(len(input_ids)), {name: given.get(name) for name in (*DEPTHS, "rule")}
    for name, value in options.items():
        check_rows(name, value, len(input_ids))
    most, new = cache.parts["loop"].capacity or sys.maxsize, config.max_length - input_ids.shape[1]
    longest = [min(most, real + new - 1) for real in mask.sum(1).tolist()]
    requests = [
        Request(
            ids=row[mask[i]].tolist(),
            longest=longest[i],
            processors=of_row(logits_processor, i),
            sample=bool(config.do_sample),
            noise=noise,
            number=i,
            padding=row[~mask[i]].tolist(),
            **{name: row_of(value, i) for name, value in options.items()},
        )
        for i, row in enumerate(input_ids)
    ]
    filled = AdaptiveCache(cache.parts["loop"].layout, max(longest))
    engine = Engine(model, len(requests), len(requests) * model.loop.steps, filled, drafts)
    _run(engine, requests, stopping_criteria, streamer)
    texts = [torch.tensor(request.columns, device=input_ids.device) for request in requests]
    columns = max(map(len, texts))
    if cache.goes_on:  # a later call continues all rows, so rows that ended early run their last token
        engine.run_last_tokens([one for one, text in zip(requests, texts, strict=True) if len(text) < columns])
    cache.take(filled, _real(requests, input_ids.device)[:, : columns - 1])
    sequences = pad_sequence(texts, batch_first=True, padding_value=_padding(texts, stopping_criteria, config))
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE: cache})


def _run(engine: Engine, requests: list[Request], criteria: StoppingCriteriaList, streamer: Any) -> None:
    """Run requests until `criteria` end each of them. Their rows are not freed."""
    for request in requests:
        engine.add(request)
    in_progress = len(requests)
    while in_progress:
        for event in engine.step():
            if isinstance(event, Refused):
                raise event.error
            if streamer is not None:
                streamer.put(torch.tensor([event.token]))
            request = event.request
            if bool(criteria(torch.tensor([request.columns], device=engine.outside.device), None).all()):
                engine.stop(request)
                in_progress -= 1
            else:
                engine.go_on(request)
    if streamer is not None:
        streamer.end()


def _real(requests: list[Request], device: torch.device) -> Tensor:
    """True where a column of a row holds a real token, `(batch, longest)` bool."""
    rows = [torch.arange(len(one.columns), device=device) >= len(one.padding) for one in requests]
    return pad_sequence(rows, batch_first=True)


def _padding(texts: list[Tensor], criteria: StoppingCriteriaList, config: Any) -> int:
    """The id that pads the texts that are shorter than the longest.

    Raises: `ValueError` if there is no end-of-text token: `generate` would continue the rows that have ended.
    """
    if len({len(text) for text in texts}) == 1:
        return 0
    if config._pad_token_tensor is None or not any(hasattr(criterion, "eos_token_id") for criterion in criteria):
        raise ValueError(
            "Rows of a batch have ended at different lengths without an end-of-text token. Without drafts, generate "
            "would continue the rows that have ended. Pass eos_token_id, or one row at a time."
        )
    return int(config._pad_token_tensor)


def _check(mask: Tensor, cache: Any, config: GenerationConfig, streamer: Any, given: Mapping[str, Any]) -> None:
    """Check that all options can be used with drafts.

    Raises: `ValueError`.
    """
    refused = [name for name in _OUTPUTS if config.return_dict_in_generate and getattr(config, name, None)]
    if given.get("inputs_embeds") is not None:
        refused.append("inputs_embeds")
    if given.get("synced_gpus"):
        refused.append("synced_gpus")
    refused += remembering(given["processors"])
    if cache is None:
        refused.append("use_cache=False")
    elif cache.get_seq_length():
        refused.append(f"a {CACHE} that holds tokens")
    if streamer is not None and len(mask) > 1:
        refused.append("a streamer for more than one row")
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        refused.append("padding between real tokens")
    if refused:
        raise ValueError(f"generate(draft_depth=) cannot be used with {', '.join(refused)}. Remove one or the other.")
