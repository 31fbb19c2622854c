"""`generate` with adapted models: cached, batched and padded as alone and without a cache; depths from outside."""

import copy
import re
from threading import Thread
from typing import Any

import pytest
import torch
from narrow import last_maps
from torch import Tensor

import adadepth as ad

pytest.importorskip("transformers")

from hf_words import tokenizer
from hf_zoo import EOS, IDS, MASK, PAD, SOME_WAYS, SPANS, STEPS, original, spread
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, pipeline
from transformers.generation.streamers import BaseStreamer

from adadepth.hf import AdaptiveCache, AdaptiveForCausalLM, adapt
from adadepth.hf.cache import CACHE

NEW = 6
# Random models repeat themselves, and a token that repeats does so at one depth.
VARIED = {"no_repeat_ngram_size": 1, "suppress_tokens": [PAD]}


@pytest.fixture
def model() -> AdaptiveForCausalLM:
    return spread("llama", None)


def texts(model: Any, ids: Tensor = IDS, mask: Tensor = MASK, cache: Any = None, **options: Any) -> list[list[int]]:
    """The new tokens of each row, up to the end of its text."""
    options = {"max_new_tokens": NEW, "do_sample": False, **VARIED} | options
    options |= {} if cache is None else {CACHE: cache}
    new = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in new]


def alone(model: Any, **options: Any) -> list[list[int]]:
    """The same, each row by itself and without padding."""
    rows = zip(IDS, MASK, strict=True)
    return [texts(model, row[None, m.bool()], m[None, m.bool()], **options)[0] for row, m in rows]


# Three of those that the other tests see.
FEWER_WAYS = [
    pytest.param(*way.values, id=way.id, marks=pytest.mark.every) if way.values[0] in ("gpt2", "qwen3 windows") else way
    for way in SOME_WAYS
]


@pytest.mark.parametrize(("name", "layers"), FEWER_WAYS)
def test_a_padded_batch_is_each_prompt_alone_is_no_cache(name: str, layers: slice | None) -> None:
    model = spread(name, layers)
    cache = AdaptiveCache()
    greedy = texts(model, cache=cache)
    assert greedy == alone(model) == texts(model, use_cache=False)
    real = cache.depth[:, -NEW:][cache.mask[:, -NEW:]]
    assert len(real.unique()) > 1 and len(cache.depth[:, : IDS.shape[1]].unique()) > 2
    beams = texts(model, num_beams=3)
    assert beams == alone(model, num_beams=3) == texts(model, num_beams=3, use_cache=False)
    assert beams != greedy


@pytest.mark.parametrize(("name", "layers"), SOME_WAYS)
def test_one_step_is_the_original(name: str, layers: slice | None) -> None:
    base = original(name)
    greedy, beams = texts(base), texts(base, num_beams=3)
    model = adapt(base, 1, layers=layers)
    assert (texts(model), texts(model, num_beams=3)) == (greedy, beams)
    assert len({tuple(text) for text in greedy}) == len(IDS)


@pytest.mark.parametrize("name", ["gpt2", "mistral windows"])
def test_the_compact_layout_and_pieces_of_a_prompt_change_nothing(name: str) -> None:
    model = spread(name, slice(1, 3))
    cache = AdaptiveCache("compact")
    assert texts(model, cache=cache, prefill_chunk_size=4) == texts(model)
    assert cache.parts["loop"].layout == "compact"
    filled = AdaptiveCache()
    texts(model, cache=filled)
    assert cache.nbytes < filled.nbytes


def test_sampling_and_several_sequences_a_prompt(model: AdaptiveForCausalLM) -> None:
    def sample(**options: Any) -> list[list[int]]:
        torch.manual_seed(3)
        return texts(model, do_sample=True, num_return_sequences=2, **options)

    assert sample() == sample(use_cache=False)
    assert len(sample()) == 2 * len(IDS)
    assert len({tuple(text) for text in sample()}) > len(IDS)


def test_embeddings_as_a_prompt(model: AdaptiveForCausalLM) -> None:
    embeds = model.get_input_embeddings()(IDS[:1])
    model.generation_config.eos_token_id = None
    ids = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
    assert ids.tolist() == texts(model, IDS[:1], MASK[:1], no_repeat_ngram_size=0, suppress_tokens=None)


class _Stream(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


class _After(StoppingCriteria):  # type: ignore[misc]
    """Ends each row at a length of its own."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.lengths <= input_ids.shape[1]


def test_streamers_and_stopping_criteria(model: AdaptiveForCausalLM) -> None:
    stream = _Stream()
    out = model.generate(IDS[:1], max_new_tokens=NEW, do_sample=False, streamer=stream)
    assert stream.tokens == [*out[0].tolist(), -1]
    stop = StoppingCriteriaList([_After([11, 11, 11])])
    assert model.generate(IDS, attention_mask=MASK, stopping_criteria=stop, max_new_tokens=NEW).shape[1] == 11


def test_a_finished_row_costs_nothing(model: AdaptiveForCausalLM) -> None:
    length = IDS.shape[1]
    stop = StoppingCriteriaList([_After([length + 2, length + 4, length + NEW])])
    cache = AdaptiveCache()
    ids = model.generate(
        IDS, attention_mask=MASK, stopping_criteria=stop, max_new_tokens=NEW, do_sample=False, **{CACHE: cache}
    )
    assert (ids[0, length + 2 :] == 0).all() and (ids[1, length + 4 :] == 0).all()
    # A row keeps the token with which it ended, and nothing of what follows.
    assert cache.parts["loop"].lengths.tolist() == [length + 2, 6 + 4, 2 + NEW - 1]
    assert cache.depth.gt(0).sum(1).tolist() == cache.parts["loop"].lengths.tolist()


def test_a_row_that_no_turn_follows_does_not_run_its_last_token(model: AdaptiveForCausalLM) -> None:
    stop = StoppingCriteriaList([_After([IDS.shape[1] + 2, IDS.shape[1] + 4, IDS.shape[1] + NEW])])
    seen: list[int] = []
    model.loop.register_forward_hook(lambda _part, _args, out: seen.append(int(out.trace.live[..., 0].sum())))
    model.generate(IDS, attention_mask=MASK, stopping_criteria=stop, max_new_tokens=NEW, do_sample=False)
    assert seen == [int(MASK.sum()), 3, 2, 2, *[1] * (NEW - 4)]


def test_rows_without_an_end_of_text_go_on(model: AdaptiveForCausalLM) -> None:
    stop = StoppingCriteriaList([_After([10, 16, 16])])
    options = {"attention_mask": MASK, "max_new_tokens": NEW, "do_sample": False}
    model.generation_config.eos_token_id = None
    assert torch.equal(model.generate(IDS, **options, stopping_criteria=stop), model.generate(IDS, **options))


@pytest.mark.parametrize("layers", [SPANS[1], pytest.param(SPANS[0], marks=pytest.mark.every)], ids=str)
def test_assisted_decoding(layers: slice | None) -> None:
    model = spread("gpt_neox", layers)
    model.generation_config.eos_token_id = None
    ids = IDS[:1].repeat(1, 3)
    mask = torch.ones_like(ids)
    greedy = texts(model, ids, mask, max_new_tokens=10)
    assert texts(model, ids, mask, max_new_tokens=10, prompt_lookup_num_tokens=4) == greedy
    assistant = original("gpt_neox")
    assert texts(model, ids, mask, max_new_tokens=10, assistant_model=assistant) == greedy
    assert texts(model, ids, mask, max_new_tokens=10, assistant_model=spread("gpt_neox", None)) == greedy
    assistant.generation_config.eos_token_id = None
    alone = texts(assistant, ids, mask, max_new_tokens=10)
    assert texts(assistant, ids, mask, max_new_tokens=10, assistant_model=model) == alone


@pytest.mark.parametrize("assistant", ["stock", "fewer steps"])
def test_depths_of_a_call_are_not_those_of_its_assistant(assistant: str, model: AdaptiveForCausalLM) -> None:
    model.generation_config.eos_token_id = None
    helper = original("llama") if assistant == "stock" else spread("llama", None, steps=2)
    ids = IDS[:1].repeat(1, 3)
    of_calls: list[dict[str, Any]] = [
        {"max_depth": STEPS, "min_depth": STEPS},
        {"max_depth": torch.tensor([[2]])},
        {"max_depth": lambda ids: 1 + ids % STEPS},
        {"rule": ad.Threshold(0.6)},
    ]
    for of_call in of_calls:
        options = {"max_new_tokens": 8, "do_sample": False, **of_call}
        assert torch.equal(model.generate(ids, assistant_model=helper, **options), model.generate(ids, **options))
    message = "^generate[(]draft_depth=[)] cannot be used with beams or an assistant[.] Remove one or the other[.]$"
    with pytest.raises(ValueError, match=message):
        model.generate(ids, assistant_model=helper, max_new_tokens=8, draft_depth=1)


def test_a_model_drafts_for_itself(model: AdaptiveForCausalLM) -> None:
    model.generation_config.eos_token_id = None
    ids = IDS[:1].repeat(1, 3)
    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(ids, assistant_early_exit=1, **options), model.generate(ids, **options))


def test_guidance(model: AdaptiveForCausalLM) -> None:
    """Two passes a token, the second with a cache of its own, or with none."""
    options: dict[str, Any] = {
        "guidance_scale": 1.5,
        "no_repeat_ngram_size": 0,
        "suppress_tokens": None,
        "eos_token_id": None,
    }
    guided = texts(model, **options)
    assert guided == texts(model, **options, use_cache=False)
    assert guided != texts(model, **options | {"guidance_scale": 1.0})


def deep_at_even(ids: Tensor) -> Tensor:
    return torch.where(ids % 2 == 0, STEPS, 1)


GUIDED: dict[str, dict[str, Any]] = {
    "depth": {"max_depth": 1},
    "depth of a row": {"min_depth": torch.tensor([[2]]), "max_depth": torch.tensor([[2]])},
    "function": {"min_depth": deep_at_even, "max_depth": deep_at_even},
    "rule": {"rule": ad.Threshold(0.6)},
}


@pytest.mark.parametrize("negative", [None, torch.tensor([[7, 8, 9]])], ids=["last token", "a prompt"])
@pytest.mark.parametrize("name", GUIDED)
def test_guidance_runs_both_passes_at_the_depths_of_the_call(
    name: str, negative: Tensor | None, model: AdaptiveForCausalLM
) -> None:
    """Against a loop that runs both passes whole."""
    model.generation_config.eos_token_id = None
    options = GUIDED[name]
    ids, other = IDS[:1], IDS[:1, -1:] if negative is None else negative
    for _ in range(NEW):
        scores = []
        for seen in (ids, other):
            call: dict[str, Any] = {
                name: given(seen) if given is deep_at_even else given for name, given in options.items()
            }
            with torch.no_grad():
                scores.append(model(seen, **call).logits[:, -1].log_softmax(-1))
        newest = (1.5 * (scores[0] - scores[1]) + scores[1]).argmax(-1, keepdim=True)
        ids, other = torch.cat([ids, newest], 1), torch.cat([other, newest], 1)
    guide: dict[str, Any] = {"guidance_scale": 1.5, "negative_prompt_ids": negative, "max_new_tokens": NEW}
    for use_cache in (True, False):
        assert torch.equal(model.generate(IDS[:1], do_sample=False, use_cache=use_cache, **guide, **options), ids)
    assert not torch.equal(model.generate(IDS[:1], do_sample=False, **guide), ids)


def test_text_in_and_text_out(model: AdaptiveForCausalLM) -> None:
    model = model.float()
    model.generation_config.eos_token_id = None
    words = tokenizer(padding_side="left")
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [0, 1, 2]}  # a letter each
    prompt = words(["abc"], return_tensors="pt", return_token_type_ids=False)
    text = words.decode(model.generate(**prompt, **options)[0, 3:])
    stream = TextIteratorStreamer(words, skip_prompt=True)
    thread = Thread(target=model.generate, kwargs={**prompt, **options, "streamer": stream})
    thread.start()
    assert "".join(stream) == text
    thread.join()
    stopped = model.generate(**prompt, **options, stop_strings=[text[2:4]], tokenizer=words)
    assert words.decode(stopped[0, 3:]) == text[:4]
    talks = [[{"role": "user", "content": said}] for said in ("abc", "a b c d e")]
    pipe = pipeline("text-generation", model=model, tokenizer=words)
    together = pipe(talks, batch_size=2, **options)
    assert together == [pipe(talk, **options) for talk in talks]
    answers = [said[0]["generated_text"][-1] for said in together]
    assert [answer["role"] for answer in answers] == ["assistant"] * 2 and answers[0] != answers[1]


def test_a_cache_goes_on_where_it_ended(model: AdaptiveForCausalLM) -> None:
    cache = AdaptiveCache()
    model.generation_config.eos_token_id = None
    first = model.generate(IDS, attention_mask=MASK, max_new_tokens=3, do_sample=False, **{CACHE: cache})
    mask = torch.cat([MASK, torch.ones(3, 3, dtype=MASK.dtype)], 1)
    on = model.generate(first, attention_mask=mask, max_new_tokens=4, do_sample=False, **{CACHE: cache})
    assert torch.equal(on, model.generate(IDS, attention_mask=MASK, max_new_tokens=7, do_sample=False))


def depths(model: AdaptiveForCausalLM, **options: Any) -> Tensor:
    cache = AdaptiveCache()
    texts(model, cache=cache, **options)
    return cache.depth


def test_depths_from_outside(model: AdaptiveForCausalLM) -> None:
    model.generation_config.eos_token_id = None
    real = torch.cat([MASK, torch.ones(3, NEW - 1, dtype=MASK.dtype)], 1)
    assert torch.equal(depths(model, max_depth=1), real)
    assert torch.equal(depths(model, min_depth=STEPS), STEPS * real)
    rows = torch.tensor([[1], [2], [3]])
    assert torch.equal(depths(model, min_depth=rows, max_depth=rows), rows * real)
    columns = 1 + torch.arange(real.shape[1])[None] % STEPS
    assert torch.equal(depths(model, min_depth=columns, max_depth=columns), columns * real)

    def router(ids: Tensor) -> Tensor:
        return 1 + ids % STEPS

    routed = {"min_depth": router, "max_depth": router}
    ids = model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False, **VARIED, **routed)
    assert torch.equal(depths(model, **routed), router(ids[:, :-1]) * real)
    assert depths(model, max_depth=lambda ids: 2).max() == 2


def test_depths_follow_their_rows_into_beams_and_sequences(model: AdaptiveForCausalLM) -> None:
    model.generation_config.eos_token_id = None
    rows = torch.tensor([[1], [2], [3]])
    options = {"min_depth": rows, "max_depth": rows}
    for many in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        assert depths(model, **options, **many).amax(1).tolist() == [1, 1, 2, 2, 3, 3]
    columns = torch.full((1, 20), 2)
    assert depths(model, num_beams=2, min_depth=columns, max_depth=columns).amax() == 2
    tau = ad.Lookahead(ad.Threshold(torch.tensor([[2.0], [0.5], [0.0]]).double()))
    assert depths(model, num_beams=2, rule=tau).amax(1).tolist() == [2, 2, 3, 3, 3, 3]
    assert texts(model, num_beams=2, rule=tau) == texts(model, num_beams=2, rule=tau, use_cache=False)


def test_a_recorded_trace_is_replayed(model: AdaptiveForCausalLM) -> None:
    cache = AdaptiveCache()
    text = texts(model, cache=cache)
    recorded = cache.depth
    model.loop.rule = ad.Threshold(2.0)
    assert texts(model) != text
    assert texts(model, min_depth=recorded, max_depth=recorded) == text
    assert torch.equal(depths(model, min_depth=recorded, max_depth=recorded), recorded)


def test_the_rule_of_a_call(model: AdaptiveForCausalLM) -> None:
    rule = model.loop.rule
    tau = torch.tensor([[2.0], [0.5], [0.0]])
    each = depths(model, rule=ad.Threshold(tau))
    for row, threshold in enumerate((ad.Threshold(2.0), ad.Threshold(0.5), ad.Threshold(0.0))):
        width = (MASK[row].sum() + NEW - 1).item()
        expected = depths(model, rule=threshold)
        assert torch.equal(each[row, -width:][: expected.shape[1]], expected[row, -width:])
    assert model.loop.rule is rule


def test_rows_that_have_ended_need_no_new_tokens(model: AdaptiveForCausalLM) -> None:
    """The first row ended early, and the second with the last token, which has not run yet."""
    length, cache = IDS.shape[1], AdaptiveCache()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
    stop = StoppingCriteriaList([_After([length + 2, length + NEW, length + NEW])])
    first = model.generate(IDS, attention_mask=MASK, stopping_criteria=stop, **options, **{CACHE: cache})
    turn = torch.tensor([[PAD, PAD], [PAD, PAD], [7, 8]])
    ids = torch.cat([first, turn], 1)
    mask = torch.cat([cache.mask, torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 1]])], 1).long()
    right = mask.clone()
    right[1, -2] = 1
    with pytest.raises(ValueError, match=r"attention_mask=0 there in row 1\. Pad on the left"):
        model.generate(ids, attention_mask=right, **options, **{CACHE: cache})
    for width in (ids.shape[1], first.shape[1]):  # with another turn, and without
        given = {"attention_mask": mask[:, :width], CACHE: copy.deepcopy(cache)}
        more = model.generate(ids[:, :width], **options, **given)
        prompt = ids[2:, length - 2 : width]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert more[2, width:].tolist() == alone[0, -NEW:].tolist()


RIGHT = (
    "generate expected a real token in the last column of every row, because the next token is predicted from it, got "
    "{}=0 there in row {}. Pad on the left, as tokenizer.padding_side = 'left' does, and pass the attention_mask. Each "
    "row needs at least one real token."
)
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "padding on the right": (
        {"mask": torch.tensor([[1] * 9, [1] * 9, [1] * 6 + [0] * 3])},
        RIGHT.format("attention_mask", 2),
    ),
    "a row of padding": (
        {"mask": torch.tensor([[1] * 9, [0] * 9, [1] * 9]), "num_beams": 2},
        RIGHT.format("attention_mask", 1),
    ),
    "guidance padded on the right": (
        {
            "guidance_scale": 1.5,
            "negative_prompt_ids": torch.tensor([[7, 8, PAD]] * 3),
            "negative_prompt_attention_mask": torch.tensor([[1, 1, 0]] * 3),
        },
        RIGHT.format("negative_prompt_attention_mask", 0),
    ),
    "short": (
        {"max_depth": torch.full((3, 11), 2)},
        "max_depth gives the depths of 11 columns, but this pass needs those of 12, for prompt, padding and new "
        "tokens. Give one for each of these columns (the last new token needs none), or one per row, (batch, 1).",
    ),
    "chunks": (
        {"min_depth": lambda ids: ids, "prefill_chunk_size": 4},
        "min_depth is a function of all ids so far, but got only 4 of 8. Pass all ids, not embeddings, and "
        "no prefill_chunk_size.",
    ),
    "guidance of columns": (
        {"max_depth": torch.full((3, 20), 2), "guidance_scale": 1.5},
        "max_depth gives the depths of 20 columns, but guidance also runs a prompt with columns of its own. Pass an "
        "int, one depth per row, (batch, 1), or a function of the ids.",
    ),
    "implementation": (
        {"cache_implementation": "static"},
        "An adapted model generates with a cache of its own, got cache_implementation='static'. Choose its layout: "
        f"{CACHE}=adadepth.hf.AdaptiveCache(layout='compact').",
    ),
    "cache": (
        {"cache": DynamicCache()},
        f"{CACHE} expected an AdaptiveCache, which holds keys and values of every iteration, got DynamicCache. "
        "Pass adadepth.hf.AdaptiveCache(), or use_cache=True for a new one.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, model: AdaptiveForCausalLM) -> None:
    options, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        texts(model, **{"eos_token_id": None, **options})


@pytest.mark.shapes
def test_a_cache_is_cropped_reordered_and_forgotten(model: AdaptiveForCausalLM) -> None:
    cache = AdaptiveCache()
    assert (cache.batch_size, cache.get_seq_length(), cache.depth.shape) == (-1, 0, (0, 0))
    with torch.no_grad():
        model(IDS, attention_mask=MASK, past_key_values=cache)
        depth = cache.depth
        cache.crop(-4)
        assert torch.equal(cache.depth, depth[:, :5]) and cache.get_seq_length() == 5
        cache.crop(5)
        cache.crop(0)
        model(IDS[:, 5:], attention_mask=MASK, past_key_values=cache)
        assert torch.equal(cache.depth, depth)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0]))
    assert torch.equal(cache.depth, depth[[2, 0]]) and cache.batch_size == 2
    assert cache.to("cpu") is cache
    message = (
        "crop expected how many of the 9 columns held to remove, as a negative number, or how many to keep, got -10."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cache.crop(-10)
    cache.reset()
    assert (cache.batch_size, cache.get_seq_length(), cache.depth.shape) == (-1, 0, (0, 0))


@pytest.mark.parametrize("layers", SPANS, ids=str)
def test_an_error_leaves_the_cache_as_it_was(layers: slice | None) -> None:
    model, cache = spread("gpt2", layers), AdaptiveCache()
    with torch.no_grad():
        for held in (0, 6):
            model(IDS[:, :held], attention_mask=MASK[:, :held], past_key_values=cache) if held else None
            before = cache.depth
            last_maps(model.loop.gate)[0].bias.fill_(float("nan"))
            with pytest.raises(ValueError, match="scored NaN"):
                model(IDS[:, held:], attention_mask=MASK, past_key_values=cache)
            last_maps(model.loop.gate)[0].bias.zero_()
            assert torch.equal(cache.depth, before) and cache.get_seq_length() == held
        logits = model(IDS[:, 6:], attention_mask=MASK, past_key_values=cache).logits
        whole = model(IDS, attention_mask=MASK).logits[:, 6:]
    assert (logits - whole)[MASK[:, 6:].bool()].abs().max() < 1e-10 * whole.abs().max()
