"""`generate` with drafts gives what `generate` gives: texts, depths, and the cache that is handed back."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import adadepth as ad

pytest.importorskip("transformers")

from hf_drafting import SPANS, STEPS, assert_same, drafting, model_of, written
from hf_words import tokenizer
from hf_zoo import EOS, PAD, VOCAB
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from adadepth.hf import AdaptiveCache
from adadepth.hf.cache import CACHE

# What guesses are drawn from: kinds, whole or sliced, and how a text is made.
KINDS = ["gpt2", "llama tied", "mistral windows", "qwen3 windows"]


def drawn(number: int) -> tuple[Any, list[list[int]], float, dict[str, Any], dict[str, Any]]:
    """A model, texts, the share of guesses that are spoiled, how texts are made, and how they are drafted."""
    chance, rows = random.Random(number), 1 if number % 4 == 0 else 3
    model = model_of(KINDS[number % 4 if number % 8 < 4 else number % 4 - 1], SPANS[number // 2 % 2])
    texts = [chance.choices(range(3, VOCAB), k=chance.randint(1, 8)) for _ in range(rows)]
    options: dict[str, Any] = {"do_sample": number % 2 == 1, "layout": ["filled", "compact"][number // 3 % 2]}
    if number % 2 == 0:
        options["no_repeat_ngram_size"] = 1 + number // 2 % 2
    drafts = {"draft_depth": 1 + number % 3, "revise_drafts": number // 2 % 2 == number % 2}
    options["min_depth"] = 3 if drafts["draft_depth"] == 3 or rows == 1 else None
    options["max_new_tokens"] = 24 if rows == 1 else 10
    return (
        model,
        texts,
        (0.0, 0.5)[number // 4 % 2],
        {"seed": number, "min_new_tokens": options["max_new_tokens"] // 2, **options},
        drafts,
    )


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if 2 <= n < 8 else [pytest.mark.every]) for n in range(96)]
)
def test_drafts_change_no_text_and_no_depth(number: int) -> None:
    model, texts, share, options, drafts = drawn(number)
    want = written(model, texts, **options)
    with drafting(model, share) as guesses:
        got = written(model, texts, **options, **drafts)
    assert_same(model, got, want)
    if number < 12:  # of the others, some guess nothing right
        guesses.assert_drafted()


def deep_at_even(ids: Tensor) -> Tensor:
    return torch.where(ids % 2 == 0, STEPS, 2)


def by_row(row: int, ids: Tensor) -> list[int]:
    return [*range(3 + 5 * row, VOCAB)] if len(ids) % 2 else [*range(3, VOCAB - 5 * row)]


class EndsAt(StoppingCriteria):  # type: ignore[misc]
    """Ends a text at certain words; without an end-of-text token."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] % 8 == 0


ENDS = (EOS, 7, 9, 11, 20, 30)
EACH = torch.tensor([[0.0], [0.01], [0.3]]).double()
OPTIONS: dict[str, dict[str, Any]] = {
    "a depth for each row": {"min_depth": torch.tensor([[1], [2], [3]]), "max_depth": torch.tensor([[2], [4], [3]])},
    "a function of the ids": {"min_depth": deep_at_even, "max_depth": deep_at_even},
    "depths of all columns": {"min_depth": 2 + torch.arange(20)[None] % 3, "max_depth": 2 + torch.arange(20)[None] % 3},
    "another rule": {"rule": ad.Threshold(0.6)},
    "all tokens as deep": {"rule": ad.Threshold(-1.0), "draft_depth": 3},
    "a rule for each row": {
        "rule": ad.Threshold(torch.tensor([[0.0], [0.01], [0.3]]).double()),
        "no_repeat_ngram_size": 1,
    },
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[4], [5, 6]]},
    "processors of rows": {"prefix_allowed_tokens_fn": by_row, "encoder_repetition_penalty": 1.4},
    "more of rows": {"repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 1},
    "warpers": {"do_sample": True, "temperature": 1.7, "top_k": 12, "top_p": 0.9},
    "ends": {"eos_token_id": [*ENDS], "no_repeat_ngram_size": 1},
    "stop strings": {"stop_strings": ["ab", "i", "u"], "tokenizer": tokenizer(), "no_repeat_ngram_size": 1},
    "stopping criteria": {"stopping_criteria": [EndsAt()], "no_repeat_ngram_size": 1},
    "no end": {"eos_token_id": None, "min_new_tokens": None},
}
# Each of a kind that another of these has.
SELDOM = {"depths of all columns", "all tokens as deep", "more of rows", "stopping criteria"}
DRAFT: dict[str, Any] = {"draft_depth": 1}
TEXTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.every] if name in SELDOM else []) for name in OPTIONS]
)
def test_drafts_go_with_the_options_of_generate(name: str) -> None:
    number = [*OPTIONS].index(name)
    model, options = model_of(KINDS[number % 4], SPANS[number // 4 % 2]), {**OPTIONS[name]}
    drafts: dict[str, Any] = {"draft_depth": options.pop("draft_depth", 1), "revise_drafts": number % 3 == 0}
    options = {"do_sample": False, "suppress_tokens": [PAD], **options, "layout": ["filled", "compact"][number % 2]}
    want = written(model, TEXTS, **options)
    with drafting(model, 0.4) as guesses:
        got = written(model, TEXTS, **options, **drafts)
    assert_same(model, got, want)
    guesses.assert_drafted()
    if name in ("ends", "stop strings", "stopping criteria"):
        lengths = [int(row.sum()) for row in want[CACHE].mask]
        assert len({length - len(text) for length, text in zip(lengths, TEXTS, strict=True)}) > 1


class Collected(BaseStreamer):  # type: ignore[misc]
    """What was streamed."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_text_is_streamed_as_it_is_chosen() -> None:
    model, streams = model_of("gpt2", None), [Collected(), Collected()]
    want = written(model, [[5, 6]], streamer=streams[0], no_repeat_ngram_size=1, do_sample=False)
    with drafting(model, 0.4) as guesses:
        written(model, [[5, 6]], streamer=streams[1], no_repeat_ngram_size=1, do_sample=False, draft_depth=1)
    guesses.assert_drafted()
    assert streams[0].ids == streams[1].ids == want.sequences[0].tolist()
    assert streams[1].ended


def test_ids_alone_are_returned_where_no_more_is_asked_for() -> None:
    model = model_of("qwen3 windows", SPANS[1])
    texts = [written(model, TEXTS, return_dict_in_generate=False, do_sample=False, **draft) for draft in ({}, DRAFT)]
    assert isinstance(texts[1], Tensor) and texts[0].tolist() == texts[1].tolist()


def test_a_configuration_may_say_when_to_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of("llama tied", SPANS[1]), torch.tensor([[5, 6, 7]])
    own: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": [EOS]}
    config = GenerationConfig(**own, draft_depth=1, revise_drafts=True)
    with drafting(model) as guesses:
        model.generate(ids, generation_config=config)
        model.generate_batch([[5, 6, 7]], generation_config=config)
        assert [(drafts.depth, drafts.revise) for drafts in guesses.made] == [(1, True), (1, False)]
        model.generate(ids, generation_config=config, draft_depth=None, revise_drafts=False)
        assert len(guesses.made) == 2
        monkeypatch.setitem(vars(model.generation_config), "draft_depth", 2)
        model.generate(ids, **own)
        model.generate(ids, **own, draft_depth=3)
        model.generate_batch([[5, 6, 7]], **own)
        model.generate_batch([[5, 6, 7]], **own, draft_depth=3)
    assert [drafts.depth for drafts in guesses.made[2:]] == [2, 3, 2, 3]
    assert model.init_continuous_batching().sizes.draft_depth == 2


def test_a_cache_holds_no_more_than_its_capacity() -> None:
    """A text that ends within it is the same as without drafts, whatever length was allowed."""
    model, end = model_of("llama tied", None), {"no_repeat_ngram_size": 1, "do_sample": False}
    whole = written(model, [[5, 6]], max_new_tokens=6, eos_token_id=None, **end).sequences[0].tolist()
    got, want = (
        model.generate(
            torch.tensor([[5, 6]]),
            max_new_tokens=30,
            eos_token_id=whole[5],
            **end,
            **{CACHE: AdaptiveCache(capacity=5)},
            **draft,
        ).tolist()
        for draft in (DRAFT, {})
    )
    assert got == want == [whole[:6]]


@pytest.mark.parametrize("rows", [96, pytest.param(480, marks=pytest.mark.every)])
def test_sampled_texts_are_those_of_the_same_noise(rows: int) -> None:
    model = model_of("llama tied", SPANS[1])
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 4, "eos_token_id": None}
    want = written(model, [[5, 6, 7]] * rows, **options)
    with drafting(model, 0.2) as guesses:
        got = written(model, [[5, 6, 7]] * rows, draft_depth=1, **options)
    assert got.sequences.tolist() == want.sequences.tolist()
    assert len({tuple(row) for row in got.sequences.tolist()}) > rows / 8
    guesses.assert_drafted()
    assert guesses.wrong > rows / 8


def test_sampled_tokens_are_as_frequent_as_they_are_likely() -> None:
    """Those behind a prompt of one token, which were guessed before they were chosen."""
    model, texts, words = model_of("llama tied", None), 480, 12
    options: dict[str, Any] = {
        "suppress_tokens": [*range(words, VOCAB)],
        "min_depth": STEPS,
        "temperature": 2.0,
        "do_sample": True,
    }
    with drafting(model) as guesses:
        got = written(model, [[20]] * texts, max_new_tokens=2, eos_token_id=None, draft_depth=1, **options)
    assert min(guesses.right, guesses.wrong) > texts / 8
    each: dict[str, Any] = {name: torch.tensor([[1], [STEPS]]) for name in ("min_depth", "max_depth")}
    with torch.no_grad():
        shallow, deep = (model(torch.tensor([[20], [20]]), **each).logits[:, -1, :words] / 2).softmax(-1)
    seen = got.sequences[:, 1].bincount(minlength=words)
    far = [float(((seen - texts * p) ** 2 / (texts * p)).sum()) for p in (deep, shallow)]
    assert far[0] < 31.3 < 100 < far[1]  # chance reaches 31.3 once in 1,000 times, for 11 degrees of freedom
