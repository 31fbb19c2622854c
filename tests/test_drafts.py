"""Whether drafts pay, the noise that they share with what is chosen, and what they refuse."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import adadepth as ad

pytest.importorskip("transformers")

from hf_drafting import model_of, padded
from hf_zoo import DIM, PAD
from transformers import StoppingCriteria
from transformers.generation import SynthIDTextWatermarkingConfig
from transformers.generation.streamers import BaseStreamer

from adadepth.hf import AdaptiveCache
from adadepth.hf.cache import CACHE
from adadepth.hf.drafts import PROBE, Drafts, Line
from adadepth.hf.noise import Noise

TEXTS = [[5, 6, 7], [8, 9, 10, 11]]


def measured(saved: int, lost: int, reads: int = 0, base: float = 4.0, slope: float = 1.0) -> Drafts:
    """Drafts after some guesses, where a call costs `base` and `slope` for each token, and a read state 1."""
    drafts = Drafts(1)
    for x in (1, 2, 3):
        drafts.calls.see(x, base + slope * x)
        drafts.reads.see(x, float(x))
    for _ in range(6):
        drafts.resolved(saved > 0, saved, lost, reads)
    return drafts


def asked(drafts: Drafts, rows: int, times: int = 2 * PROBE) -> list[int]:
    """Which of so many questions are answered by yes."""
    return [i for i in range(times) if drafts.pays(rows)]


@pytest.mark.parametrize(
    ("drafts", "rows", "pays"),
    [
        (measured(2, 0), 1, True),
        (measured(2, 0), 50, True),  # what costs nothing always pays
        (measured(2, 1), 7, True),  # 2 * 4 / 7 > 1 * 1
        (measured(2, 1), 9, False),
        (measured(2, 1, slope=2.0), 5, False),  # 2 * 4 / 5 < 1 * 2
        (measured(2, 1, slope=2.0), 3, True),
        (measured(2, 1, base=1.0), 3, False),
        (measured(2, 0, reads=3), 2, True),  # 2 * 4 / 2 > 3 * 1
        (measured(2, 0, reads=3), 3, False),
        (measured(0, 1), 1, False),
    ],
)
def test_drafts_pay_where_calls_that_are_saved_cost_more_than_what_is_lost(
    drafts: Drafts, rows: int, pays: bool
) -> None:
    assert asked(drafts, rows) == ([*range(2 * PROBE)] if pays else [PROBE - 1, 2 * PROBE - 1])


def test_the_more_rows_share_a_call_the_less_drafts_pay() -> None:
    drafts = measured(3, 1)
    answers = [asked(drafts, rows, 1) == [0] for rows in range(1, PROBE)]
    assert answers == sorted(answers, reverse=True) and len({*answers}) == 2


def test_what_costs_nothing_known_is_tried_first() -> None:
    drafts = measured(0, 9)
    fresh = Drafts(1)
    fresh.calls, fresh.reads = drafts.calls, drafts.reads
    for _ in range(4):
        assert asked(fresh, 1) == [*range(2 * PROBE)]
        fresh.resolved(False, 0, 9, 1)
    assert asked(fresh, 1) == [PROBE - 1, 2 * PROBE - 1]
    fresh.always = True
    assert asked(fresh, 1) == [*range(2 * PROBE)]


def test_what_guesses_come_to_is_known_anew_after_a_while() -> None:
    drafts = measured(3, 0)
    for _ in range(40):
        drafts.resolved(False, 0, 2, 1)
    assert not asked(drafts, 1, PROBE - 1)
    for _ in range(40):
        drafts.resolved(True, 3, 0, 0)
    assert asked(drafts, 1, 3) == [0, 1, 2]
    assert (drafts.right, drafts.wrong, drafts.agreement) == (46, 40, 46 / 86)
    assert Drafts(2).agreement == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_line_is_the_weighted_fit(seed: int) -> None:
    chance = np.random.default_rng(seed)
    x = chance.integers(1, 9, 30)
    y = 5 + 0.7 * x + chance.normal(0, 0.2, 30) * x
    line = Line()
    for one, two in zip(x.tolist(), y.tolist(), strict=True):
        line.see(one, two)
    slope, base = np.polyfit(x, y, 1, w=0.9 ** (np.arange(29, -1, -1) / 2))
    assert (line.slope, line.base) == pytest.approx((slope, base), rel=1e-9)


@pytest.mark.parametrize(
    ("points", "slope", "base"),
    [
        ([], 0, 0),
        ([(3, 2), (3, 2)], 0, 2),
        ([(1, 5), (2, 1)], 0, (0.9 * 5 + 1) / 1.9),  # it would fall: the weighted mean
        ([(1, 0), (2, 10)], 10, 0),
    ],
)
def test_a_line_is_never_below_0(points: list[tuple[int, int]], slope: float, base: float) -> None:
    line = Line()
    for x, y in points:
        line.see(x, float(y))
    assert (line.slope, line.base) == pytest.approx((slope, base))


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("seeded", [True, False])
def test_noise_is_that_of_multinomial(rows: int, seeded: bool) -> None:
    probabilities = torch.rand(4, rows, 11, dtype=torch.float64).softmax(-1)
    generator = torch.Generator().manual_seed(5) if seeded else None
    torch.manual_seed(5)
    want = [torch.multinomial(each, 1, generator=generator).flatten().tolist() for each in probabilities]
    noise = Noise(rows, torch.Generator().manual_seed(5) if seeded else None)
    torch.manual_seed(5)
    orders = {1: [0, 0, 1, 2, 3], 2: [2, 0, 1, 3, 3], 3: [3, 0, 2, 1, 0]}  # some ask early, and twice
    got = [[-1] * rows for _ in range(4)]
    for step in range(5):
        for row in range(rows):
            column = orders[row + 1][step]
            some = probabilities[column, row : row + 1]
            got[column][row] = int((some / noise.of(row, column, some)).argmax(-1))
    assert got == want


def sizes(noise: Noise) -> list[int]:
    """How many columns are held for each row."""
    return [0 if held is None else len(held) for held in noise._held]


def test_noise_is_held_until_it_is_used() -> None:
    noise, like = Noise(3), torch.rand(1, 5)
    noise.of(0, 4, like)
    assert sizes(noise) == [5, 5, 5]
    kept = noise.of(1, 3, like)
    noise.end(2)
    noise.forget(0, 5)
    noise.forget(1, 3)
    assert sizes(noise) == [0, 2, 0]
    assert noise.of(1, 3, like) is kept
    noise.of(0, 5, like)
    assert sizes(noise) == [1, 3, 0]
    noise.forget(0, 9)  # more than was drawn
    assert not noise._held[0]


class Uneven(StoppingCriteria):  # type: ignore[misc]
    """Ends one text before the other."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids[:, 0] == PAD) | (input_ids.shape[1] > 7)


class Silent(BaseStreamer):  # type: ignore[misc]
    """Takes what comes."""

    def put(self, value: Tensor) -> None:
        pass

    def end(self) -> None:
        pass


def run(texts: Any = None, **options: Any) -> Any:
    ids, mask = padded(texts or TEXTS)
    given = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "draft_depth": 1} | options
    return model_of("llama tied", None).generate(ids, **given)


def _filled() -> AdaptiveCache:
    held = AdaptiveCache()
    ids, mask = padded(TEXTS)
    with torch.no_grad():
        model_of("llama tied", None)(ids[:, :2], attention_mask=mask[:, :2], past_key_values=held)
    return held


RIGHT = (
    "generate expected a real token in the last column of every row, because the next token is predicted from it, got "
    "attention_mask=0 there in row {}. Pad on the left, as tokenizer.padding_side = 'left' does, and pass the "
    "attention_mask. Each row needs at least one real token."
)
BOTH = "generate(draft_depth=) cannot be used with {}. Remove one or the other."
WHOLE: dict[str, Any] = {"return_dict_in_generate": True}
ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "no iteration": (
        lambda: run(draft_depth=0),
        "draft_depth expected the iterations after which the next token is guessed, 1 or more, got 0.",
    ),
    "beams": (lambda: run(num_beams=2), BOTH.format("beams or an assistant")),
    "revised without": (
        lambda: run(draft_depth=None, revise_drafts=True),
        "revise_drafts=True expected draft_depth, got None. Pass draft_depth=n as well.",
    ),
    "scores": (lambda: run(output_scores=True, **WHOLE), BOTH.format("output_scores")),
    "states": (
        lambda: run(output_logits=True, output_hidden_states=True, **WHOLE),
        BOTH.format("output_logits, output_hidden_states"),
    ),
    "embeddings": (
        lambda: model_of("llama tied", None).generate(
            inputs_embeds=torch.zeros(1, 3, DIM).double(), max_new_tokens=2, draft_depth=1
        ),
        BOTH.format("inputs_embeds"),
    ),
    "no cache": (lambda: run(use_cache=False), BOTH.format("use_cache=False")),
    "a filled cache": (lambda: run(**{CACHE: _filled()}), BOTH.format(f"a {CACHE} that holds tokens")),
    "a streamer": (
        lambda: run(streamer=Silent()),
        BOTH.format("a streamer for more than one row"),
    ),
    "right padding": (
        lambda: run(attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])),
        RIGHT.format(0),
    ),
    "a row of padding": (lambda: run(attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])), RIGHT.format(1)),
    "padding in between": (
        lambda: run(attention_mask=torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])),
        BOTH.format("padding between real tokens"),
    ),
    "depths of other rows": (
        lambda: run(max_depth=torch.ones(3, 1).long()),
        "max_depth expected one row, or one for each of the 2 rows of the batch, got a tensor of shape (3, 1).",
    ),
    "depths of too few rows": (
        lambda: run([[5], [6], [7]], min_depth=torch.ones(2, 20).long()),
        "min_depth expected one row, or one for each of the 3 rows of the batch, got a tensor of shape (2, 20).",
    ),
    "a rule of other rows": (
        lambda: run(rule=ad.Lookahead(ad.Threshold(torch.rand(3, 1)))),
        "rule expected one row, or one for each of the 2 rows of the batch, got a tensor of shape (3, 1).",
    ),
    "no rule": (
        lambda: run(rule=ad.Threshold),
        "RecurrentWrapper expected rule to be a function or a callable object, got the class Threshold; call it. The "
        "order is block, steps, gate, rule, update.",
    ),
    "a small cache": (
        lambda: run(**{CACHE: AdaptiveCache(capacity=5)}, min_new_tokens=4),
        "The request needs room for 6 tokens, of its prompt and of all new ones but the last, got a capacity of 5. "
        "Pass a larger capacity=, within the positions of the model, or ask for fewer new tokens.",
    ),
    "a small cache for the prompt": (
        lambda: run(**{CACHE: AdaptiveCache(capacity=3)}),
        "The request needs room for 4 tokens, of its prompt and of all new ones but the last, got a capacity of 3. "
        "Pass a larger capacity=, within the positions of the model, or ask for fewer new tokens.",
    ),
    "an early exit": (
        lambda: run(TEXTS[:1], assistant_early_exit=1, revise_drafts=True),
        BOTH.format("beams or an assistant"),
    ),
    "guidance": (lambda: run(guidance_scale=2.0), BOTH.format("guidance_scale")),
    "a watermark that remembers": (
        lambda: run(
            do_sample=True,
            watermarking_config=SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2], context_history_size=9),
        ),
        BOTH.format("a SynthID watermark"),
    ),
    "ends and no padding": (
        lambda: run(stopping_criteria=[Uneven()], eos_token_id=None, pad_token_id=None),
        "Rows of a batch have ended at different lengths without an end-of-text token. Without drafts, generate would "
        "continue the rows that have ended. Pass eos_token_id, or one row at a time.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
