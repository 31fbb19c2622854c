"""`generate_batch` and the manager of requests: each request gets what `generate` gives it alone."""

import inspect
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from narrow import the
from torch import Tensor, nn

import adadepth as ad

pytest.importorskip("transformers")

from hf_served import NEW, VARIED, alone, deep_at_even, expected, made, prompts, results
from hf_zoo import EOS, SPANS, STEPS, VOCAB, original, spread
from transformers import ContinuousBatchingConfig, GenerationConfig, GenerationMixin
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching import continuous_api as api
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState, RequestStatus
from transformers.generation.continuous_batching.utils import WorkloadHints

from adadepth.hf import AdaptiveForCausalLM, adapt
from adadepth.hf.ends import head
from adadepth.hf.manager import AdaptiveBatchingManager

GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture
def model() -> AdaptiveForCausalLM:
    return spread("llama", slice(1, 3))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())  # other files may have left some in this process
    yield
    assert [thread.name for thread in threading.enumerate() if not thread.daemon and thread not in before] == []


def served(model: Any, texts: list[list[int]], **options: Any) -> list[tuple[list[int], list[int]]]:
    outs = model.generate_batch(texts, **options).values()
    assert [out.prompt_ids for out in outs] == texts
    return [*map(made, outs)]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *(("gpt2", SPANS[0]), ("qwen3 windows", SPANS[1])),
        *(pytest.param(*way, marks=pytest.mark.every) for way in (("gpt2", SPANS[1]), ("qwen3 windows", SPANS[0]))),
    ],
    ids=str,
)
def test_each_request_is_generate_alone(name: str, layers: slice | None) -> None:
    model, texts = spread(name, layers), prompts(7)
    want = [alone(model, text, **VARIED) for text in texts[:2]] + expected(model, texts[2:], **VARIED)
    assert len({depth for _, depths in want for depth in depths}) > 1
    assert served(model, texts, rows=4, width=3, **VARIED) == want


@pytest.mark.parametrize("number", [24, pytest.param(64, marks=pytest.mark.every)])
def test_many_requests_in_a_compact_cache(number: int, model: AdaptiveForCausalLM) -> None:
    texts = prompts(number, longest=14)
    want = expected(model, texts, **VARIED)
    assert len({len(row) for row, _ in want}) > 1  # some meet the end of text
    with torch.inference_mode():
        assert served(model, texts, rows=12, width=6, layout="compact", **VARIED) == want


def test_a_text_without_an_end(model: AdaptiveForCausalLM) -> None:
    model.generation_config.eos_token_id = None
    assert model.config.eos_token_id == EOS
    options = {**GREEDY, "suppress_tokens": [word for word in range(VOCAB) if word != EOS]}
    assert model.generate(torch.tensor([[3, 4]]), **options).tolist() == [[3, 4] + [EOS] * NEW]
    assert served(model, [[3, 4]], **options)[0][0] == [EOS] * NEW


def test_what_runs_at_once_is_bounded(model: AdaptiveForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tokens, texts = [], [], prompts(20)

    def counted(base: Any, anatomy: Any, hidden: Tensor, **options: Any) -> Any:
        rows.append(int(hidden.abs().sum(-1).count_nonzero()))  # others are padding
        return head(base, anatomy, hidden, **options)

    monkeypatch.setattr("adadepth.hf.outside.head", counted)
    monkeypatch.setattr("adadepth.hf.engine._PROMPTS", 6)
    model.loop.block.register_forward_hook(lambda _part, args, _out: tokens.append(args[0].shape[1]))
    with model.continuous_batching_context_manager(GenerationConfig(**VARIED), rows=8, width=4, capacity=16) as manager:
        processor = manager.batch_processor
        assert processor is not None
        served = processor.engine
        parts = [served.outside.prelude, served.loop, served.outside.coda]
        manager.add_requests(texts[:1])
        results(manager, 1)
        before = [part.cache.nbytes for part in parts if part is not None]
        manager.add_requests(texts[1:])
        outs = results(manager, 19)
        assert [part.cache.nbytes for part in parts if part is not None] == before and len(before) == 3
    assert all(made(outs[f"req_{i}"]) for i in range(1, 20))
    assert max(rows) == 4 < max(tokens) < 4 + 6 + max(map(len, texts))
    assert sum(count >= 3 for count in tokens) > len(tokens) / 2  # calls are full


ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "shallow": {"max_depth": 1},
    "deep": {"min_depth": STEPS},
    "between": {"min_depth": 2, "max_depth": torch.tensor([[2]])},
    "routed": {"min_depth": deep_at_even, "max_depth": deep_at_even},
    "replayed": {"min_depth": 1 + torch.arange(20)[None] % STEPS, "max_depth": 1 + torch.arange(20)[None] % STEPS},
    "another rule": {"rule": ad.Threshold(0.6)},
    "a third rule": {"rule": ad.Lookahead(ad.Threshold(torch.tensor([[0.4]]).double()))},
    "other ends": {"eos_token_id": [7, 8, 9, 10, 11, 12], "min_new_tokens": 3},
    "repeats": {"no_repeat_ngram_size": None, "repetition_penalty": 1.3},
    "longer": {"max_new_tokens": 11},
}


@pytest.mark.parametrize("layers", [SPANS[1], pytest.param(SPANS[0], marks=pytest.mark.every)], ids=str)
def test_requests_ask_for_different_things(layers: slice | None) -> None:
    model, text = spread("gpt_neox", layers), [5, 9, 31, 4, 17]
    with model.continuous_batching_context_manager(GenerationConfig(**VARIED), rows=6, width=4) as manager:
        for name, options in ASKED.items():
            assert manager.add_request(text, name, **options) == name
        outs = results(manager, len(ASKED))
    for name, options in ASKED.items():
        want, depth = alone(model, text, **VARIED | options)
        if name == "other ends":
            end = next((i for i, word in enumerate(want) if word in options["eos_token_id"]), NEW)
            want, depth = want[: end + 1], depth[: len(text) + end]
        assert made(outs[name]) == (want, depth), name
    assert len(outs["longer"].generated_tokens) > NEW == len(outs["nothing"].generated_tokens)
    assert len({tuple(out.depth) for out in outs.values()}) > 6


def test_a_replay_of_the_depths_of_a_result(model: AdaptiveForCausalLM) -> None:
    (first,) = model.generate_batch([[3, 4, 5]], **VARIED).values()
    depth = torch.tensor([first.depth])
    (again,) = model.generate_batch(
        [[3, 4, 5]], min_depth=depth, max_depth=depth, rule=ad.Threshold(2.0), **VARIED
    ).values()
    assert made(again) == made(first)


def test_sampling_with_a_seed_depends_on_no_other_request(model: AdaptiveForCausalLM) -> None:
    options: dict[str, Any] = {**GREEDY, "do_sample": True, "top_k": 20, "temperature": 1.7}
    texts = prompts(4)
    got = served(model, texts, rows=3, width=2, seed=5, **options)

    def sampled(text: list[int], seed: int) -> tuple[list[int], list[int]]:
        torch.manual_seed(seed)
        return alone(model, text, **options)

    assert got == [sampled(text, 5) for text in texts]
    outs = model.generate_batch(texts[:2], seed=5, num_return_sequences=2, **options)
    assert [*outs] == [f"req_{i}{end}" for i in range(2) for end in ("__child#0", "")]
    assert [made(out) for out in outs.values()] == [sampled(text, 5 + i) for text in texts[:2] for i in (1, 0)]
    torch.manual_seed(7)
    (free,) = served(model, texts[:1], **options)
    assert free == sampled(texts[0], 7)


def test_log_probabilities_and_timestamps(model: AdaptiveForCausalLM) -> None:
    batching = ContinuousBatchingConfig(return_logprobs=True, max_requests_per_batch=2, max_batch_tokens=1)
    (out,) = model.generate_batch(
        [[3, 4, 5]], continuous_batching_config=batching, record_timestamps=True, progress_bar=False, **VARIED
    ).values()
    given: Any = model.generate(torch.tensor([[3, 4, 5]]), return_dict_in_generate=True, output_scores=True, **VARIED)
    want = [float(scores[0].log_softmax(-1).max()) for scores in given.scores]
    assert torch.allclose(torch.tensor(out.logprobs), torch.tensor(want), atol=1e-5)
    assert len(out.timestamps) == len(out.generated_tokens)


def test_streaming_and_cancelling(model: AdaptiveForCausalLM) -> None:
    endless: dict[str, Any] = {"max_new_tokens": 3000, "eos_token_id": -1, "no_repeat_ngram_size": None}
    with model.continuous_batching_context_manager(GenerationConfig(**VARIED), rows=2, capacity=4000) as manager:
        manager.add_request([4, 5], "endless", streaming=True, **endless)
        manager.add_request([4, 5], "waits", **endless)
        first = next(manager.request_id_iter("endless"))
        assert not first.is_finished() and len(first.generated_tokens) >= 1
        for name in ("endless", "waits", "unknown"):
            manager.cancel_request(name)
        manager.add_request([4, 5, 6], "short", streaming=True)
        parts = [*manager.request_id_iter("short")]
        assert [len(part.generated_tokens) for part in parts] == [*range(1, len(parts) + 1)]
        assert [len(part.depth) for part in parts] == [*range(3, len(parts) + 3)]
        assert made(parts[-1]) == alone(model, [4, 5, 6], **VARIED)
        processor: Any = manager.batch_processor
        assert not processor.has_pending_requests() and sorted(processor.engine._free) == [0, 1]


def test_all_answers_to_a_request_are_cancelled(model: AdaptiveForCausalLM) -> None:
    endless: dict[str, Any] = {"max_new_tokens": 3000, "eos_token_id": -1, "do_sample": True}
    config = GenerationConfig(**endless, num_return_sequences=3)
    with model.continuous_batching_context_manager(config, rows=4, capacity=4000) as manager:
        manager.add_request([4, 5], "endless", streaming=True)
        manager.add_request([4, 5], "other", max_new_tokens=2)
        next(manager.request_id_iter("endless__child#1"))
        manager.cancel_request("endless")
        assert results(manager, 3).keys() == {"other", "other__child#0", "other__child#1"}
        assert not manager.batch_processor.has_pending_requests()  # type: ignore[union-attr]
        assert manager.output_router.result_handlers == {}


def test_one_request_fails_alone(model: AdaptiveForCausalLM) -> None:
    """For its prompt, its options, what it asks of a function, or a state that is no number."""
    good = [[5, 6, 7], [8, 9]]
    want = expected(model, good, **VARIED)
    broken = next(word for word in range(10, VOCAB) if not any(word in row for row, _ in want))
    with torch.no_grad():
        the(nn.Embedding, model.get_input_embeddings()).weight[broken] = float("nan")

    def raises(ids: Tensor) -> Tensor:
        if ids.shape[1] > 4:
            raise RuntimeError("no depth today")
        return torch.full_like(ids, 2)

    def wordless(ids: Tensor) -> Tensor:
        raise StopAsyncIteration

    def no_key(ids: Tensor) -> Tensor:
        raise KeyError(3)

    ids_expected = f"A request expected the ids of a prompt, each from 0 to {VOCAB - 1}, got "
    bad: dict[str, tuple[Any, dict[str, Any], str]] = {
        "empty": ([], {}, f"{ids_expected}none."),
        "unknown": ([3, VOCAB], {}, f"{ids_expected}{VOCAB}."),
        "text": ("ab", {}, f"{ids_expected}'a'."),
        "long": (
            [3] * 20,
            {},
            f"The request needs room for {19 + NEW} tokens, of its prompt and of all new ones but the last, got a "
            "capacity of 24. Pass a larger capacity=, within the positions of the model, or ask for fewer new tokens.",
        ),
        "nan": ([3, broken, 4], {}, "scored NaN"),
        "deep": ([3, 4], {"max_depth": STEPS + 1}, f"max_depth expected an int from 1 to steps={STEPS}, got"),
        "raises": ([3, 4], {"max_depth": raises}, "no depth today"),
        "short": ([3, 4], {"max_depth": torch.ones(1, 3).long()}, "max_depth gives the depths of 3 columns"),
        "rows": ([3, 4], {"rule": ad.Threshold(torch.rand(3, 1))}, "Threshold expected to return how much of each"),
        "warm": ([3, 4], {"temperature": -1.0, "do_sample": True}, "temperature"),
        "no rule": ([3, 4], {"rule": ad.Threshold}, "RecurrentWrapper expected rule to be a function or a callable"),
        "wordless": ([3, 4], {"max_depth": wordless}, "StopAsyncIteration"),
        "key": ([3, 4], {"max_depth": no_key}, "KeyError: 3"),
    }
    with model.continuous_batching_context_manager(GenerationConfig(**VARIED), rows=3, width=2, capacity=24) as manager:
        manager.add_request(good[0], "first")
        for name, (ids, options, _) in bad.items():
            manager.add_request(ids, name, **options)
        manager.add_request(torch.tensor([good[1]]), "second")
        outs = results(manager, len(bad) + 2)
        processor: Any = manager.batch_processor
        assert sorted(processor.engine._free) == [0, 1, 2]
    assert [made(outs[name]) for name in ("first", "second")] == want
    for name, (_, _, message) in bad.items():
        assert outs[name].status == RequestStatus.FAILED and message in outs[name].error, (name, outs[name].error)
    assert len(outs["raises"].generated_tokens) == 3
    exact = {"raises": "RuntimeError: no depth today", "wordless": "StopAsyncIteration", "key": "KeyError: 3"}
    assert {name: outs[name].error for name in exact} == exact


def test_logits_that_are_no_number_fail_their_request_alone() -> None:
    model, options = adapt(original("gpt_neox"), STEPS, layers=slice(1, 3)), {**GREEDY, "suppress_tokens": [20]}
    want = expected(model, [[5, 6, 7]], **options)
    with torch.no_grad():
        the(nn.Embedding, model.get_input_embeddings()).weight[20] = float("nan")
    good, bad = model.generate_batch([[5, 6, 7], [3, 20, 4]], **options).values()
    assert [made(good)] == want and bad.error.startswith("The model's logits of this request's next token are NaN.")


def test_a_request_without_a_limit_ends_where_its_row_does(model: AdaptiveForCausalLM) -> None:
    options = {**VARIED, "max_new_tokens": None, "no_repeat_ngram_size": None, "eos_token_id": -1}
    (out,) = model.generate_batch([[3, 4]], capacity=9, **options).values()
    assert out.error.startswith("The request needs room for 10 tokens") and len(out.generated_tokens) == 8


@pytest.mark.parametrize("new", [None, 3])
def test_an_end_is_forced_at_the_limit_if_there_is_one(new: int | None, model: AdaptiveForCausalLM) -> None:
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "capacity": 12, "max_new_tokens": new}
    each: list[dict[str, Any]] = [{}, {"forced_eos_token_id": 7}]
    outs = [out for forces in each for out in model.generate_batch([[5, 6, 7]], **options, **forces).values()]
    free, forced = (out.generated_tokens for out in outs)
    assert len(free) == 10 if new is None else len(free) == new
    assert forced == (free if new is None else [*free[:-1], 7])


def test_prompts_are_integers_of_any_kind(model: AdaptiveForCausalLM) -> None:
    want = served(model, [[5, 6, 7]] * 6, **GREEDY)
    each: list[Any] = [np.array([5, 6, 7]), [*np.array([5, 6, 7])], torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]])]
    each += [(5, 6, 7), [*torch.tensor([5, 6, 7])]]
    outs = model.generate_batch(each, **GREEDY).values()
    assert [*map(made, outs)] == want
    assert all(type(word) is int for out in outs for word in out.prompt_ids)


def test_max_length_counts_prompt_and_answer(model: AdaptiveForCausalLM) -> None:
    model.generation_config.eos_token_id = None
    texts, options = [[3, 4, 5], [6, 7], [8] * 7], {**VARIED, "max_new_tokens": None, "no_repeat_ngram_size": None}
    each_size: list[dict[str, Any]] = [{}, {"capacity": 40}]
    for sizes in each_size:
        outs = [*model.generate_batch([*texts, [9] * 10], max_length=10, **options, **sizes).values()]
        assert [*map(made, outs[:3])] == [alone(model, text, max_length=10, **options) for text in texts]
        assert outs[3].error == (
            "A request expected room for 1 or more new tokens after its prompt of 10, got 0. Pass a larger "
            "max_new_tokens or max_length."
        )
    with model.continuous_batching_context_manager(GenerationConfig(**VARIED), capacity=40) as manager:
        asked: dict[str, dict[str, Any]] = {
            "own": {"max_length": 9},
            "both": {"max_length": 9, "max_new_tokens": 3},
            "none": {"max_new_tokens": 0},
        }
        for name, each in asked.items():
            manager.add_request([3, 4, 5], name, **each)
        manager.add_request([3, 4, 5], "default")
        ran = results(manager, 4)
    assert ran.pop("none").error.startswith("A request expected room for 1 or more new tokens after its prompt of 3")
    assert {name: len(out.generated_tokens) for name, out in ran.items()} == {"own": 6, "both": 3, "default": NEW}
    model.generation_config.max_length = 5
    assert [len(row) for row, _ in served(model, texts[:2], **options)] == [2, 3]
    assert [len(row) for row, _ in served(model, texts[:2], **GREEDY)] == [NEW, NEW]


@pytest.mark.parametrize("options", [{"max_depth": 1}, {"min_depth": STEPS}, {"rule": ad.Threshold(2.0)}], ids=str)
def test_depths_and_a_rule_of_a_configuration(options: dict[str, Any], model: AdaptiveForCausalLM) -> None:
    """In that of a call, of a manager or of the model; a call that names its own wins."""
    text, other = [3, 4, 5, 6], dict[str, Any](min_depth=2, max_depth=2, rule=None)
    plain, want, overridden = (alone(model, text, **VARIED, **each) for each in ({}, options, other))
    assert want[1] != plain[1] != overridden[1] != want[1]
    config = GenerationConfig(**VARIED, **options)
    assert alone(model, text, generation_config=config) == want
    assert alone(model, text, generation_config=config, **other) == overridden
    assert served(model, [text], generation_config=config) == [want]
    assert served(model, [text], generation_config=config, **other) == [overridden]
    for manager_config in (config, GenerationConfig(**VARIED)):
        with model.continuous_batching_context_manager(manager_config) as manager:
            manager.add_request(text, "configured")
            manager.add_request(text, "own", **other)
            ran = results(manager, 2)
        assert (made(ran["configured"]), made(ran["own"])) == (want, overridden)
        vars(model.generation_config).update(options)  # for the next one
    assert alone(model, text, **VARIED) == want
    assert alone(model, text, **VARIED, **other) == overridden
    assert served(model, [text], **VARIED) == [want]


def test_a_seed_of_a_configuration(model: AdaptiveForCausalLM) -> None:
    config = {**GREEDY, "do_sample": True}
    want = served(model, [[3, 4]], seed=5, **config)
    assert served(model, [[3, 4]], generation_config=GenerationConfig(**config, seed=5)) == want


def test_several_answers_are_for_all_requests_of_a_manager(model: AdaptiveForCausalLM) -> None:
    config = GenerationConfig(**GREEDY | {"do_sample": True}, num_return_sequences=2)
    with model.continuous_batching_context_manager(config) as manager:
        manager.add_request([3, 4], num_return_sequences=2)
        assert len(results(manager, 2)) == 2
        message = (
            "The manager has num_return_sequences=2 for all its requests, got 3 for one of them. Pass it in the "
            "generation_config of the manager, or add the request several times."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            manager.add_request([3, 4], num_return_sequences=3)


def test_learned_positions_end_a_row() -> None:
    model = spread("gpt2", None)
    outs = [*model.generate_batch([[3] * 60, [3] * 59, [4]], **VARIED).values()]
    assert outs[0].error.startswith("The request needs room for 65 tokens") and "capacity of 64" in outs[0].error
    assert made(outs[1]) and made(outs[2]) == alone(model, [4], **VARIED)


def test_an_error_of_the_block_fails_all_requests_and_ends_the_thread(model: AdaptiveForCausalLM) -> None:
    calls: list[int] = []

    def fails(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 5:
            raise MemoryError("no room")

    model.loop.block.register_forward_hook(fails)
    outs = model.generate_batch(prompts(9), rows=4, **VARIED)
    assert len(outs) == 9 and {out.error for out in outs.values() if out.error} == {"MemoryError: no room"}
    calls.clear()
    manager = model.init_continuous_batching(GenerationConfig(**VARIED))
    manager.start()
    manager.add_requests(prompts(3))
    results(manager, 3)
    assert manager.add_request([3, 4]) is None
    manager.stop()


def test_the_thread_ends_with_the_context(model: AdaptiveForCausalLM) -> None:
    begun: list[AdaptiveBatchingManager] = []

    def interrupted() -> None:
        with model.continuous_batching_context_manager(GenerationConfig(**VARIED), capacity=100_000) as manager:
            manager.add_request([3, 4], max_new_tokens=90_000, eos_token_id=-1, no_repeat_ngram_size=None)
            begun.append(manager)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not begun[0].is_running()


def test_a_pause_and_a_manager_that_is_kept(model: AdaptiveForCausalLM) -> None:
    with model.continuous_batching_context_manager(GenerationConfig(**VARIED), persistent_manager=True) as manager:
        with manager.pause():
            model.loop.rule = ad.Threshold(0.5)
        manager.add_request([3, 4], "first")
        first = results(manager, 1)["first"]
    with torch.inference_mode(), model.continuous_batching_context_manager() as again:
        assert again is manager
        again.add_request([3, 4], "second")
        assert made(results(again, 1)["second"]) == made(first) == alone(model, [3, 4], **VARIED)
    (longer,) = model.generate_batch([[3, 4]], persistent_manager=True, **VARIED | {"max_new_tokens": NEW + 2}).values()
    assert made(longer) == alone(model, [3, 4], **VARIED | {"max_new_tokens": NEW + 2}) != made(first)
    model.destroy_cached_continuous_batching_manager()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": (
        {"num_beams": 2, **GREEDY},
        "Requests use greedy search or sampling, got beam_search. Call model.generate for other modes.",
    ),
    "guidance and strings": (
        {"guidance_scale": 2.0, "stop_strings": ["a"], **GREEDY},
        "Requests use greedy search or sampling, got stop_strings, guidance_scale. Call model.generate for other "
        "modes.",
    ),
    "a misspelling": (
        {"max_dpeth": 2, **GREEDY},
        "A request does not take max_dpeth. It takes the options of a GenerationConfig, and min_depth, max_depth, "
        "rule, seed.",
    ),
    "no end": (
        {},
        "generate_batch expected max_new_tokens, or a capacity, got neither, so a row could grow without end. Pass "
        "max_new_tokens=256, say.",
    ),
    **{
        f"{name} {size}": ({name: size, **GREEDY}, f"{name} expected 1 or more, or None for the default, got {size}.")
        for name in ("rows", "width", "capacity")
        for size in (-1, 0, 2.5)
    },
    "no rows in a budget": (
        {"rows": 0, "memory": "1MiB", **GREEDY},
        "rows expected 1 or more, or None for the default, got 0.",
    ),
    "revised guesses": (
        {"revise_drafts": True, **GREEDY},
        "A request does not take revise_drafts. It takes the options of a GenerationConfig, and min_depth, max_depth, "
        "rule, seed.",
    ),
}
PROMPTS: dict[str, tuple[Any, str]] = {
    "a tensor": (torch.tensor([[3, 4]]), "a tensor of shape (1, 2) torch.int64"),
    "an array": (np.array([[3, 4]]), "ndarray"),
    "a text": ("ab", "'ab'"),
    "a flat list": ([3, 4], "3 as a prompt"),
    "a flat list of tensors": ([*torch.tensor([3, 4])], "a tensor of shape () torch.int64 as a prompt"),
    "nothing": ([[3], None], "None as a prompt"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_what_is_no_list_of_prompts(name: str, model: AdaptiveForCausalLM) -> None:
    inputs, got = PROMPTS[name]
    message = (
        f"generate_batch expected a list of prompts, each a list of token ids without padding, got {got}. For a single "
        "prompt, pass [ids]."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model.generate_batch(inputs, **GREEDY)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, model: AdaptiveForCausalLM) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model.generate_batch([[3, 4]], **options)


def test_a_rule_for_rows_is_no_rule_for_requests(model: AdaptiveForCausalLM) -> None:
    model.loop.rule = ad.Threshold(torch.rand(2, 1))
    expected = "^Threshold expected to return how much of each token continues, for any request, shape"
    with pytest.raises(ValueError, match=expected):
        model.generate_batch([[3, 4], [5, 6]], **GREEDY)
    assert model.generate_batch([]) == {}


MOVED = (
    "transformers has moved what adadepth/hf/manager.py stands on: {}. Read its generation/continuous_batching (and "
    "GenerationMixin for the last three), bring Processor and AdaptiveBatchingManager up to date so that both the "
    "oldest and the newest version in pyproject.toml work, and correct this list."
)
NAMES: list[tuple[Any, str]] = [
    *((ContinuousBatchingManager, name) for name in ("_create_batch_processor", "switch_to_cb_friendly_attn")),
    *((ContinuousBatchingManager, name) for name in ("add_request", "add_requests", "get_result", "warmup", "start")),
    *((ContinuousBatchingManager, name) for name in ("stop", "destroy", "is_running")),
    *((api.OutputRouter, name) for name in ("deliver", "deliver_batch")),
    *((api.BackgroundThreadStatus, name) for name in ("local_status", "tp_status", "update_with_tp_status")),
    *((api.BackgroundThreadStatus, name) for name in ("HARD_STOP", "is_pause_requested", "pause_and_wait")),
    *(
        (RequestState, name)
        for name in ("fork", "generated_len", "update_and_check_completion", "to_generation_output")
    ),
    *((RequestState("one", [1]), name) for name in ("num_children", "logit_processor_kwargs", "_eos_token_ids")),
    *(
        (RequestState("one", [1]), name)
        for name in ("initial_tokens", "max_new_tokens", "streaming", "status", "error")
    ),
    *((RequestStatus, name) for name in ("DECODING", "FINISHED", "FAILED")),
    *((WorkloadHints(), name) for name in ("max_prompt_length", "max_generated_length", "num_requests")),
    *((ContinuousBatchingConfig(), n) for n in ("max_requests_per_batch", "max_batch_tokens", "return_logprobs")),
    *((GenerationMixin, name) for name in ("_prepare_generation_config", "_prepare_special_tokens")),
    (GenerationMixin, "_get_logits_processor"),
]


def test_the_private_names_that_serving_stands_on() -> None:
    missing = [f"{getattr(at, '__name__', type(at).__name__)}.{name}" for at, name in NAMES if not hasattr(at, name)]
    assert not missing, MOVED.format(f"{missing} are not there")


def test_what_the_manager_asks_of_a_processor(model: AdaptiveForCausalLM) -> None:
    source = inspect.getsource(ContinuousBatchingManager)
    asked = set(re.findall(r"batch_processor\.(\w+)", source))
    with model.continuous_batching_context_manager(GenerationConfig(**VARIED)) as manager:
        missing = {name for name in asked if not hasattr(manager.batch_processor, name)}
    assert not missing, MOVED.format(f"a processor is also asked for {sorted(missing)}")
    of_manager = set(re.findall(r"self\.(\w+)", inspect.getsource(ContinuousBatchingManager.__init__)))
    needed = {"background_thread_status", "input_queue", "cancel_queue", "output_router", "generation_config"}
    gone = (needed | {"num_return_sequences", "continuous_batching_config", "batch_processor"}) - of_manager
    assert not gone, MOVED.format(f"the manager no longer has {sorted(gone)}")
    assert issubclass(GenerationOutput, object)
