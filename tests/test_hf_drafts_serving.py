"""Requests that are served with drafts: each gets what `generate` gives it alone, and fails where it would."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from narrow import the
from torch import Tensor, nn

import adadepth as ad

pytest.importorskip("transformers")

from hf_drafting import SPANS, STEPS, drafting, model_of
from hf_served import VARIED, alone, made, prompts, results
from hf_zoo import DIM, EOS, PAD, original
from transformers import GenerationConfig
from transformers.generation import SynthIDTextWatermarkingConfig

from adadepth.hf import AdaptiveCache, adapt
from adadepth.hf.drafts import Drafts
from adadepth.hf.engine import Chosen, Engine
from adadepth.hf.requests import Request

BAD = 11  # a word that is guessed, but never chosen
ENDLESS: dict[str, Any] = {**VARIED, "suppress_tokens": [PAD, EOS]}
NOT_BAD: dict[str, Any] = {**VARIED, "suppress_tokens": [PAD, BAD]}


def engine_of(model: Any, rows: int, width: int, capacity: int, layout: Any = "filled", depth: int = 1) -> Engine:
    return Engine(model, rows, width, AdaptiveCache(layout, capacity), Drafts(depth, always=True))


def request_of(model: Any, ids: list[int], new: int, **options: Any) -> Request:
    config, own = model._prepare_generation_config(None, **ENDLESS | options)
    return Request.of(model, config, ids, new, False, own)


def steps(engine: Engine, left: dict[Request, int]) -> Iterator[dict[Request, int]]:
    """Step by step, until no request has a token left to be made; no text has an end."""
    while left:
        for event in engine.step():
            assert isinstance(event, Chosen)
            left[event.request] -= 1
            if left[event.request]:
                engine.go_on(event.request)
            else:
                engine.end(event.request)
                del left[event.request]
        yield left


def assert_empty(engine: Engine, rows: int) -> None:
    """No request is held anywhere."""
    outside, flight = engine.outside, engine._flight
    for part in (outside.prelude, engine.loop, outside.coda):
        if part is not None:
            assert not part.cache.lengths.any() and not part.cache.depth.any()
            assert not any(run.active for run in part._passes) and not part._exited and not any(part._chunks)
            assert part.room == part.width
    assert not (
        flight._new or flight._ready or flight._running or engine._exited or engine._guesses.waiting or engine._owners
    )
    assert sorted(engine._free) == [*range(rows)]


@pytest.mark.parametrize(
    ("rows", "width", "span"),
    [(3, 9, SPANS[0]), (7, 12, SPANS[1]), pytest.param(4, 2, SPANS[1], marks=pytest.mark.every)],
)
def test_each_request_is_generate_alone(rows: int, width: int, span: Any) -> None:
    model, texts = model_of("gpt2" if span is None else "qwen3 windows", span), prompts(6)
    asked: list[dict[str, Any]] = [
        {"max_new_tokens": 3 + 2 * i, "min_new_tokens": 2, **({} if i % 2 else {"do_sample": True, "seed": i})}
        for i in range(len(texts))
    ]
    config = GenerationConfig(**VARIED | {"no_repeat_ngram_size": 2})
    sizes: dict[str, Any] = {"rows": rows, "width": width, "layout": "compact" if span else "filled"}
    with (
        drafting(model, 0.3) as guesses,
        model.continuous_batching_context_manager(config, draft_depth=1, **sizes) as manager,
    ):
        for i, (text, options) in enumerate(zip(texts, asked, strict=True)):
            manager.add_request(text, str(i), **options)
        outs = results(manager, len(texts))
        assert_empty(the_engine(manager), rows)
    for i, (text, options) in enumerate(zip(texts, asked, strict=True)):
        torch.manual_seed(options.pop("seed", 0))
        assert made(outs[str(i)]) == alone(model, text, **VARIED | {"no_repeat_ngram_size": 2} | options), i
    guesses.assert_drafted()


def test_requests_whose_processors_keep_a_state_run_without_guesses() -> None:
    """A processor that has read a guess would choose another text."""
    model, texts = model_of("llama tied", SPANS[1]), prompts(3)
    mark = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2], context_history_size=9)
    options: dict[str, Any] = {**ENDLESS, "max_new_tokens": 12, "do_sample": True, "watermarking_config": mark}
    options |= {"no_repeat_ngram_size": None}
    want = []
    for text in texts:
        torch.manual_seed(4)
        want.append(alone(model, text, **options))
    torch.manual_seed(4)
    assert want[0] != alone(model, texts[0], **options | {"watermarking_config": None})
    with drafting(model, 0.3) as guesses:
        outs = model.generate_batch(texts, rows=3, width=9, seed=4, draft_depth=1, **options).values()
        assert [*map(made, outs)] == want
        assert not guesses.right and not guesses.wrong
        model.generate_batch(texts, rows=3, width=9, seed=4, draft_depth=1, **options | {"watermarking_config": None})
    guesses.assert_drafted()


def test_a_request_without_a_limit_is_guessed_up_to_the_end_of_its_row() -> None:
    model = model_of("llama tied", SPANS[1])
    options: dict[str, Any] = {**ENDLESS, "max_new_tokens": None, "no_repeat_ngram_size": None, "capacity": 12}
    (want,) = model.generate_batch([[3, 4]], rows=1, width=4, **options).values()
    with drafting(model) as guesses:
        (got,) = model.generate_batch([[3, 4]], rows=1, width=4, draft_depth=1, **options).values()
    assert (got.generated_tokens, got.error) == (want.generated_tokens, want.error) and len(want.generated_tokens) == 11
    assert guesses.right > 0


def the_engine(manager: Any) -> Engine:
    engine: Engine = manager.batch_processor.engine
    return engine


@pytest.mark.parametrize("span", [SPANS[1], pytest.param(SPANS[0], marks=pytest.mark.every)])
def test_requests_that_are_given_up_leave_nothing_behind(span: Any) -> None:
    model, texts, chance = model_of("llama tied", span), prompts(10), random.Random(0)
    with drafting(model, 0.4) as guesses:
        engine = engine_of(model, 3, 6, 24, "compact")
        left = {request_of(model, text, 8): 8 for text in texts}
        kept = [*left][::2]
        for request in left:
            engine.add(request)
        for _ in steps(engine, left):
            others = [request for request in left if request not in kept]
            if others and chance.random() < 0.3:
                engine.end(gone := chance.choice(others))
                del left[gone]
    assert_empty(engine, 3)
    assert guesses.spoiled
    assert engine.drafts is not None and engine.drafts.right and engine.drafts.wrong
    for request, text in zip(kept, texts[::2], strict=True):
        assert (request.ids[len(text) :], request.depth) == alone(model, text, **ENDLESS | {"max_new_tokens": 8})


def failing(model: Any, texts: list[list[int]], **options: Any) -> list[tuple[Any, ...]]:
    """What became of each request, well or not."""
    outs = model.generate_batch(texts, rows=3, width=9, layout="compact", **options).values()
    return [(out.generated_tokens, out.depth, out.error) for out in outs]


def reading(span: Any, gated: bool) -> Any:
    """A model in which a word's embedding is read for that word alone; without a gate all depths are `STEPS`."""
    torch.manual_seed(2)
    gate = ad.PerIterationMLPGate(DIM, STEPS, hidden=8, bias=0.0) if gated else None
    update = ad.ReZero(ad.Interpolate())
    rule = ad.Threshold(0.5) if gated else None
    nn.init.constant_(update.alpha, 0.3)
    layers = None if span is None else slice(*span)
    return adapt(original("gpt_neox"), STEPS, gate, rule, update, layers=layers)


@pytest.mark.parametrize("span", [SPANS[1], pytest.param(SPANS[0], marks=pytest.mark.every)])
def test_a_request_fails_where_it_would_without_drafts(span: Any) -> None:
    """For a depth that cannot be had, or a state that is no number."""
    model, texts = reading(span, True), prompts(6)
    answers = [alone(model, text, **ENDLESS)[0] for text in texts]
    words = [word for i in (1, 2, 3) for answer in answers for word in answer[i : i + 1]]
    broken = next(word for word in words if 0 < sum(word in [*a, *t] for a, t in zip(answers, texts, strict=True)) < 5)

    longest = {text[0]: len(text) + 2 for text in texts[::2]}

    def raises(ids: Tensor) -> Tensor:
        if ids.shape[1] > longest.get(int(ids[0, 0]), 99):
            raise RuntimeError(f"no depth for {ids[0].tolist()}")
        return 2 + ids % (STEPS - 1)

    for options in ({"max_depth": raises}, {}):
        if not options:
            _put(model, broken, float("nan"))
        want = failing(model, texts, **ENDLESS, **options)
        with drafting(model, 0.3) as guesses:
            got = failing(model, texts, **ENDLESS, **options, draft_depth=1)
        assert got == want
        assert {error is None for _, _, error in want} == {True, False}
        assert any(tokens for tokens, _, error in want if error)
        guesses.assert_drafted()


def _put(model: Any, word: int, value: float) -> None:
    """Another embedding of a word."""
    with torch.no_grad():
        the(nn.Embedding, model.get_input_embeddings()).weight[word] = value


@pytest.mark.parametrize(
    ("span", "gated"),
    [
        (SPANS[0], True),
        *(pytest.param(SPANS[i], gated, marks=pytest.mark.every) for i, gated in ((0, False), (1, True), (1, False))),
    ],
)
def test_a_guess_that_cannot_run_fails_nothing(span: Any, gated: bool) -> None:
    model = reading(span, gated)
    seen: list[int] = []

    def raises(ids: Tensor) -> Tensor:
        if BAD in ids:
            seen.append(len(ids[0]))
            raise RuntimeError("no depth for a guess")
        return torch.full_like(ids, STEPS)

    # Of almost one length: their tokens are read together.
    texts = [[3 + (i + j) % 8 for j in range(5 + i)] for i in range(3)]
    for name in ("depth", "state"):
        options = {**NOT_BAD, "max_depth": raises, "min_depth": 2} if name == "depth" else {**NOT_BAD, "min_depth": 2}
        want = failing(model, texts, **options)
        assert not seen and not any(error for _, _, error in want)
        if name == "state":
            _put(model, BAD, float("nan"))
        with drafting(model, 0.4, to=BAD) as guesses:
            got = failing(model, texts, **options, draft_depth=1)
        assert got == want, name
        assert guesses.spoiled and guesses.right
        assert bool(seen) == (name == "depth")
        seen.clear()


@pytest.mark.parametrize("longest", [1, 6])
def test_what_runs_at_once_is_bounded(longest: int) -> None:
    """Calls are as wide as asked for, prompts aside; no row holds more than its text needs."""
    model, new, width = model_of("qwen3 windows", SPANS[1]), 9, 4
    texts = [[3 + i] * (1 + i % longest) for i in range(8)]
    engine = engine_of(model, 3, width, longest + new - 1)
    left, ran = {request_of(model, text, new): new for text in texts}, list[int]()
    for request in left:
        engine.add(request)
    handle = model.loop.block.register_forward_hook(lambda _part, args, _out: ran.append(args[0].shape[1]))
    for _ in steps(engine, left):
        prompt = [one for one in left if one.row >= 0 and len(one.ids) == one.prompt > 1]
        held = {one: engine.loop.length(one.row) for one in left if one.row >= 0}
        assert all(length <= one.prompt + new - 1 for one, length in held.items())
        assert not ran or ran.pop() <= width + sum(one.prompt for one in prompt)
    handle.remove()
    assert_empty(engine, 3)
    assert engine.drafts is not None and engine.drafts.right > 10


def test_calls_are_filled_with_guesses() -> None:
    model, ran = model_of("llama", None), list[int]()
    engine = engine_of(model, 1, 3, 30)
    left = {request_of(model, [5], 20, min_depth=STEPS, no_repeat_ngram_size=None): 20}
    engine.add(next(iter(left)))
    handle = model.loop.block.register_forward_hook(lambda _part, args, _out: ran.append(args[0].shape[1]))
    assert [*steps(engine, left)][-1] == {}
    handle.remove()
    assert max(ran) == 3 and sum(count == 3 for count in ran) > len(ran) / 3 and len(ran) < 0.7 * 20 * STEPS


def test_entries_of_dropped_guesses_are_collected() -> None:
    model, new = model_of("gpt2", None), 40
    sizes = []
    for share in (0.0, 0.8):
        with drafting(model, share) as guesses:
            engine = engine_of(model, 1, 4, 64, "compact")
            left = {request_of(model, [5], new, min_depth=2, no_repeat_ngram_size=2): new}
            engine.add(next(iter(left)))
            largest = 0
            for _ in steps(engine, left):
                largest = max(largest, engine.loop.cache.nbytes)
        sizes.append(largest)
    drafts = engine.drafts
    assert drafts is not None and drafts.wrong > 20 and guesses.spoiled > 20
    assert sizes[1] < 1.25 * sizes[0]


def test_noise_is_held_no_longer_than_a_guess() -> None:
    model = model_of("llama tied", SPANS[1])
    engine = engine_of(model, 2, 8, 24)
    left = {request_of(model, [5 + i], 12, do_sample=True, seed=i): 12 for i in range(2)}
    for request in left:
        engine.add(request)
    most = 0
    for _ in steps(engine, left):
        held = [one.noise._held[0] for one in left]
        most = max(most, *(0 if some is None else len(some) for some in held), 0)
    assert 1 < most <= STEPS
