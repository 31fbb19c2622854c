"""The cache of an adapted model in more than one call: whose rows it holds, and what may follow them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_zoo import IDS, original, spread
from test_hf_errors import refused, texts

from adadepth.hf import AdaptiveCache
from adadepth.hf.cache import CACHE


@pytest.mark.parametrize("layers", [None, slice(1, 3)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "new"), [(1, 3), (3, 1), (2, 3)])
def test_a_cache_of_other_rows_is_refused(rows: int, new: int, masked: bool, layers: slice | None) -> None:
    model, cache = spread("llama", layers), AdaptiveCache()
    mask = torch.ones(new, 11) if masked else None
    with torch.no_grad():
        model(IDS[:rows], past_key_values=cache)
        assert refused(lambda: model(IDS[:new, :2], attention_mask=mask, past_key_values=cache)) == (
            f"The cache holds {rows} rows, got a batch of {new}. Begin with a new cache or cache.reset(), or choose "
            "rows with cache.reorder_cache(rows). For n beams or n sequences of each row, repeat its rows with "
            "cache.batch_repeat_interleave(n)."
        )


def test_a_cache_that_is_cropped_to_nothing_is_new() -> None:
    model, cache = spread("llama", slice(1, 3)), AdaptiveCache()
    with torch.no_grad():
        model(IDS[:2], past_key_values=cache)
        cache.crop(-cache.get_seq_length())
        assert (cache.batch_size, cache.get_seq_length(), cache.depth.shape) == (-1, 0, (0, 0))
        model(IDS, past_key_values=cache)
    assert cache.batch_size == 3


def test_beams_continue_from_repeated_rows() -> None:
    model, cache = spread("llama", slice(1, 3)), AdaptiveCache()
    model.generation_config.eos_token_id = None
    first = texts(model, IDS[:1], max_new_tokens=3, **{CACHE: cache})
    with pytest.raises(ValueError, match=r"^The cache holds 1 rows, got a batch of 2[.].*batch_repeat_interleave"):
        texts(model, first, max_new_tokens=4, num_beams=2, **{CACHE: cache})
    cache.batch_repeat_interleave(2)
    beams: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2}
    assert torch.equal(texts(model, first, **beams, **{CACHE: cache}), texts(model, first, **beams))


@pytest.mark.parametrize("as_embeds", [False, True])
def test_a_cache_of_beams_is_not_continued(as_embeds: bool) -> None:
    """Its rows are those of the beams that ran last; what stands before the search is whole."""
    model, ids = spread("llama", slice(1, 3)), IDS[:1]
    model.generation_config.eos_token_id = None
    search: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 3, "do_sample": False}
    given: dict[str, Any] = {"inputs_embeds": model.get_input_embeddings()(ids)} if as_embeds else {"input_ids": ids}
    out = model.generate(**given, **search, return_dict_in_generate=True)
    cache, whole = out[CACHE], torch.cat([ids.expand(3, -1), out.sequences[:, -4:]], 1)
    message = (
        "The rows of this cache are those of a beam search, which need not be the texts that it returned. Begin with a "
        "new cache or cache.reset(). cache.crop(9) keeps the prompt alone, in a row for each beam."
    )
    assert cache.depth.shape == (3, 12)
    cache.crop(-1)
    assert refused(lambda: texts(model, whole, max_new_tokens=2, **{CACHE: cache})) == message
    assert refused(lambda: model(whole[:, -1:], past_key_values=cache)) == message
    cache.crop(9)
    assert torch.equal(texts(model, whole, max_new_tokens=2, **{CACHE: cache}), texts(model, whole, max_new_tokens=2))
    texts(model, ids, max_new_tokens=4, num_beams=3, **{CACHE: (again := AdaptiveCache())})
    again.reset()
    assert torch.equal(texts(model, ids, max_new_tokens=4, **{CACHE: again}), texts(model, ids, max_new_tokens=4))


ASSISTED: dict[str, Callable[[], dict[str, Any]]] = {
    "early exit": lambda: {"assistant_early_exit": 1},
    "early exit in pieces": lambda: {"assistant_early_exit": 1, "prefill_chunk_size": 4},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "stock assistant": lambda: {"assistant_model": original("llama")},
    "adapted assistant": lambda: {"assistant_model": spread("llama", None)},
}


@pytest.mark.parametrize("layers", [None, slice(1, 3)], ids=str)
@pytest.mark.parametrize("name", ASSISTED)
def test_a_kept_cache_is_continued_with_an_assistant(name: str, layers: slice | None) -> None:
    """Only the new columns run."""
    model, cache, ids = spread("llama", layers), AdaptiveCache(), IDS[:1].repeat(1, 2)
    model.generation_config.eos_token_id = None
    options = ASSISTED[name]()
    first = texts(model, ids, max_new_tokens=6, **{CACHE: cache}, **options)
    assert torch.equal(first, texts(model, ids, max_new_tokens=6)) and cache.get_seq_length() == 18 + 5
    more, ran = torch.cat([first, ids[:, :2]], 1), list[int]()
    model.loop.register_forward_hook(lambda _part, _args, out: ran.append(out.hidden.shape[1]))
    again = texts(model, more, max_new_tokens=6, **{CACHE: cache}, **options)
    helper = options.get("assistant_early_exit") is not None  # runs the same loop, with a cache of its own
    assert helper or max(ran) < more.shape[1]
    assert torch.equal(again, texts(model, more, max_new_tokens=6)) and cache.get_seq_length() == 18 + 6 + 2 + 5
    assert torch.equal(cache.depth, model(again[:, :-1]).trace.depth)
