"""Requests, what `generate` gives each of them alone, and what a manager gave."""

import random
import time
from typing import Any

import torch
from hf_zoo import EOS, PAD, STEPS, VOCAB
from torch import Tensor
from transformers.generation.continuous_batching.requests import RequestStatus

from adadepth.hf import AdaptiveCache
from adadepth.hf.cache import CACHE
from adadepth.hf.manager import AdaptiveBatchingManager

NEW = 6
# Random models repeat themselves, and a token that repeats does so at one depth.
VARIED: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [PAD],
}


def prompts(number: int, longest: int = 9) -> list[list[int]]:
    chance = random.Random(number)
    return [chance.choices(range(3, VOCAB), k=chance.randint(1, longest)) for _ in range(number)]


def expected(model: Any, texts: list[list[int]], **options: Any) -> list[tuple[list[int], list[int]]]:
    """New tokens and depths of each prompt, by one `generate` over all of them."""
    cache, width = AdaptiveCache(), max(map(len, texts))
    ids = torch.tensor([[PAD] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    new = model.generate(ids, attention_mask=mask, **{CACHE: cache}, **options)[:, width:].tolist()
    new = [row[: row.index(EOS) + 1] if EOS in row else row for row in new]
    depths = [row[row > 0].tolist() for row in cache.depth]
    return [(row, depth[: len(text) + len(row) - 1]) for text, row, depth in zip(texts, new, depths, strict=True)]


def alone(model: Any, text: list[int], **options: Any) -> tuple[list[int], list[int]]:
    return expected(model, [text], **options)[0]


def made(out: Any) -> tuple[list[int], list[int]]:
    """New tokens and depths of a request that ended well."""
    assert (out.error, out.status, len(out.depth)) == (
        None,
        RequestStatus.FINISHED,
        len(out.prompt_ids) + len(out.generated_tokens) - 1,
    )
    return out.generated_tokens, out.depth


def results(manager: AdaptiveBatchingManager, number: int) -> dict[str, Any]:
    """The results of so many requests; streamed ones only at their end."""
    results: dict[str, Any] = {}
    deadline = time.monotonic() + 60
    while len(results) < number and time.monotonic() < deadline:
        out = manager.get_result(timeout=1)
        if out is not None and out.is_finished():
            results[out.request_id] = out
    assert len(results) == number
    return results


def deep_at_even(ids: Tensor) -> Tensor:
    return torch.where(ids % 2 == 0, STEPS, 1)
