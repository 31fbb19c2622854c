# ruff: noqa: E402 (the whole file is skipped without transformers)
"""What adapted models refuse, whole messages."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adadepth as ad

transformers = pytest.importorskip("transformers")

from hf_small import SMALL, small
from hf_zoo import (
    DIM,
    IDS,
    MASK,
    POSITIONS,
    STEPS,
    VOCAB,
    original,
    spread,
)
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from adadepth.hf import AdaptiveCache, AdaptiveConfig, AdaptiveForCausalLM, adapt, load_gates
from adadepth.hf.cache import CACHE


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError, match=r"[.]$") as error:
        call()
    return str(error.value)


def base_with(kind: str = "llama", **changed: Any) -> Any:
    base = original(kind)
    for name, value in changed.items():
        setattr(base.config, name, value)
    return base


ADAPT = {
    "a backbone without a head": (
        lambda: adapt(original("llama").base_model, 2),
        "adapt expected a causal language model with a head, got LlamaModel of 'llama'. Load it with "
        "AutoModelForCausalLM, and adapt it before peft wraps it.",
    ),
    "an adapted model": (
        lambda: adapt(adapt(original("llama"), 2), 2),
        "adapt expected a model that is not adapted yet, got AdaptiveForCausalLM. Adapt its base: adapt(model.base, "
        "...).",
    ),
    "no positions": (
        lambda: adapt(small("bart"), 2),
        "adapt expected a backbone whose forward takes inputs_embeds and position_ids, but that of BartForCausalLM, "
        "BartDecoder, does not take position_ids. Loop layers of attention by hand: adadepth.RecurrentWrapper(block, "
        "steps).",
    ),
    "layers that recur": (
        lambda: adapt(small("mamba"), 2, check=False),
        "adapt expected layers of full or sliding attention, which can read the keys and values of exited tokens, got "
        "layers of linear_attention in MambaForCausalLM. Loop layers of attention by hand: "
        "adadepth.RecurrentWrapper(block, steps).",
    ),
    "layers that convolve": (
        lambda: adapt(convolving(), 2, check=False),
        "adapt expected layers that mix tokens by attention alone; those of LlamaForCausalLM have a recurrence or a "
        "convolution (Conv1d): their state would lack the exited tokens. Loop layers of attention by hand: "
        "adadepth.RecurrentWrapper(block, steps).",
    ),
    "windows in a mask": (
        lambda: adapt(windows_in_a_mask(), 2),
        "PhimoeForCausalLM cannot be looped as it is: its layers see a window, but 0 of 4 attention calls name one: it "
        "is in a mask, and only the loop makes masks. Its layers may mix tokens outside of attention, or count "
        "positions without position_ids. Loop its layers by hand: adadepth.RecurrentWrapper(layers, steps).",
    ),
    "a base that does not run": (
        lambda: adapt(raising(rows=2), 2),
        "adapt expected a model that runs, but LlamaForCausalLM raised RuntimeError: 2 rows in a pass of a few tokens "
        "without a loop. Make it run by itself, then adapt it.",
    ),
    "a base that fails an assertion without a text": (
        lambda: adapt(raising(rows=2, error=AssertionError()), 2),
        "adapt expected a model that runs, but LlamaForCausalLM raised AssertionError in a pass of a few tokens "
        "without a loop. Make it run by itself, then adapt it.",
    ),
    "layers that need all rows": (
        lambda: adapt(raising(rows=1), 2),
        "LlamaForCausalLM cannot be looped as it is: a pass of a few tokens raised RuntimeError: 1 rows. Its layers "
        "may mix tokens outside of attention, or count positions without position_ids. Loop its layers by hand: "
        "adadepth.RecurrentWrapper(layers, steps).",
    ),
    "meta": (
        lambda: adapt(original("llama").to("meta"), 2),
        "The model's weights are on the meta device, so there is nothing to check. Pass check=False, and call "
        "model.check() once it has its weights.",
    ),
    "rotary positions that follow the batch": (
        lambda: adapt(base_with(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), 2),
        "adapt expected rotary positions that depend on the position alone, got rope_type='dynamic', which follows the "
        "longest sequence of the batch. Choose another, such as 'yarn' or 'linear', in config.rope_parameters.",
    ),
    "cross-attention": (
        lambda: adapt(base_with("gpt2", add_cross_attention=True), 2),
        "adapt expected a decoder in which a token attends only to itself and to earlier tokens, got "
        "config.add_cross_attention=True. Set it to False.",
    ),
    "no causality": (
        lambda: adapt(base_with(is_causal=False), 2),
        "adapt expected a decoder in which a token attends only to itself and to earlier tokens, got "
        "config.is_causal=False. Set it to True.",
    ),
    "layers by number": (
        lambda: adapt(original("llama"), 2, layers=2),  # type: ignore[arg-type]
        "adapt expected layers to be a slice, such as slice(8, 20), or None, got 2.",
    ),
    "no steps": (lambda: adapt(original("llama"), 0), "RecurrentWrapper needs steps >= 1, got steps=0."),
}


def convolving() -> Any:
    base = original("llama")
    base.model.layers[1].mlp.extra = nn.Conv1d(1, 1, 1)
    return base


def raising(rows: int, error: Exception | None = None) -> Any:
    """A layer that fails on so many rows."""

    def fail(module: nn.Module, given: tuple[Tensor]) -> None:
        if len(given[0]) == rows:
            raise error or RuntimeError(f"{rows} rows.")

    base = original("llama")
    base.model.layers[1].mlp.register_forward_pre_hook(fail)
    return base


def windows_in_a_mask() -> Any:
    """A window that the check's few tokens do not reach."""
    config = SMALL["phimoe"]()
    config.sliding_window = 32
    return AutoModelForCausalLM.from_config(config)


def falcon_with_alibi() -> Any:
    config = SMALL["falcon"]()
    config.alibi = True
    return AutoModelForCausalLM.from_config(config)


BIASED: dict[str, tuple[Callable[[], Any], str]] = {
    "BloomForCausalLM": (partial(small, "bloom"), "alibi"),
    "CpmAntForCausalLM": (partial(small, "cpmant"), "position_bias"),
    "FalconForCausalLM": (falcon_with_alibi, "alibi"),
    "MptForCausalLM": (partial(small, "mpt"), "position_bias"),
}


@pytest.mark.plain
@pytest.mark.parametrize("name", BIASED)
def test_adapt_refuses_biases_on_scores(name: str) -> None:
    make, bias = BIASED[name]
    assert refused(lambda: adapt(make(), 2)) == (
        f"adapt expected attention that adds nothing to its scores, but the layers of {name} take {bias}. A loop's "
        "attention takes no biases, so looping the layers by hand does not help. Choose a model with rotary or learned "
        "positions."
    )


@pytest.mark.plain
@pytest.mark.parametrize("name", ADAPT)
def test_adapt_refuses(name: str) -> None:
    call, message = ADAPT[name]
    assert refused(call) == message


def load_other_gates(base: Any, path: Path) -> None:
    adapt(original("gpt2"), 2).save_gates(path)
    load_gates(base, path)


@pytest.mark.parametrize(
    "refused",
    [
        lambda base, _: adapt(base, 0),
        lambda base, _: adapt(base, 2, rule=5),  # type: ignore[arg-type]
        lambda base, _: adapt(base, 2, layers=slice(3, 9)),
        load_other_gates,
    ],
)
def test_a_base_that_was_refused_runs_as_before(refused: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    base = original("llama", torch.float32)
    config = base.config
    with pytest.raises(ValueError):  # noqa: PT011
        refused(base, tmp_path)
    assert base.config is base.model.config is base.model.layers[0].self_attn.config is config
    with torch.no_grad():
        assert torch.equal(base(IDS).logits, original("llama", torch.float32)(IDS).logits)


def test_a_base_that_failed_the_check_runs_as_before() -> None:
    base = small("phimoe")
    with torch.no_grad():
        before = base(input_ids=IDS, use_cache=False).logits
        with pytest.raises(ValueError, match=r"^PhimoeForCausalLM cannot be looped as it is: at depth 1"):
            adapt(base, 2)
        assert torch.equal(base(input_ids=IDS, use_cache=False).logits, before)


@pytest.mark.parametrize("layers", [slice(2, 2), slice(3, 1), slice(0, 9), slice(-1, None), slice(0, 4, 2)], ids=str)
def test_adapt_refuses_layers_that_it_does_not_have(layers: slice) -> None:
    assert refused(lambda: adapt(original("llama"), 2, layers=layers)) == (
        f"adapt expected layers to be a slice of one or more of the 4 layers, from 0 to 4, got {layers}. slice(None) "
        "loops all of them, with the final norm outside."
    )


FORWARD: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"input_ids": None}, "Expected either input_ids or inputs_embeds, got neither."),
    "two inputs": ({"inputs_embeds": torch.ones(3, 9, DIM)}, "Expected either input_ids or inputs_embeds, got both."),
    "positions": (
        {"position_ids": POSITIONS + 1},
        "position_ids expected the position of each token among the real tokens of its row, from 0, as an adapted "
        "model counts them. Omit them, and pass padding as attention_mask.",
    ),
    "attentions": (
        {"output_attentions": True},
        "An adapted model does not take output_attentions. Its attention computes no weights.",
    ),
    "bounds of texts without positions": (
        {"cu_seq_lens_q": torch.tensor([0, 4, 9])},
        "An adapted model does not take cu_seq_lens_q. Pass position_ids, which begin again with each text of a row.",
    ),
    "positions that begin again elsewhere": (
        {"position_ids": torch.tensor([0, 1, 2, 3, 0, 1, 3, 4, 5]).expand(3, 9), "attention_mask": None},
        "position_ids begin again, so a row holds several texts, but within one they do not count its real tokens from "
        "0. Pass those of each text as 0, 1, 2, ...; an adapted model takes no others.",
    ),
    "a typo": (
        {"max_dept": 2},
        "An adapted model does not take max_dept. Beside its own arguments it takes those of the loss: "
        "num_items_in_batch, ignore_index, shift_labels.",
    ),
    "a mask of four axes": (
        {"attention_mask": torch.ones(3, 1, 9, 9)},
        "attention_mask expected shape (batch, seq) = (3, 9), got (3, 1, 9, 9).",
    ),
    "a short mask": (
        {"attention_mask": torch.ones(3, 8)},
        "attention_mask expected shape (batch, seq) = (3, 9), got (3, 8).",
    ),
    "a long mask": (
        {"attention_mask": torch.ones(3, 12)},
        "attention_mask expected shape (batch, seq) = (3, 9), got (3, 12).",
    ),
    "another cache": (
        {"past_key_values": DynamicCache()},
        f"{CACHE} expected an AdaptiveCache, which holds keys and values of every iteration, got DynamicCache. "
        "Pass adadepth.hf.AdaptiveCache(), or use_cache=True for a new one.",
    ),
    "a cache under both its names": (
        {"past_key_values": AdaptiveCache(), "cache": AdaptiveCache()},
        f"past_key_values and cache are two names of the same argument, got both. Pass {CACHE} alone.",
    ),
    "no rule": (
        {"rule": "x"},
        "RecurrentWrapper expected rule to be a function or a callable object, got str. The order is block, steps, "
        "gate, rule, update.",
    ),
    "a class of rules": (
        {"rule": ad.Threshold},
        "RecurrentWrapper expected rule to be a function or a callable object, got the class Threshold; call it. The "
        "order is block, steps, gate, rule, update.",
    ),
    "a cache while gradients flow": (
        {"use_cache": True},
        "A KVReuseCache is for inference, but the keys and values require gradients, which it would lose. Run the pass "
        "under torch.no_grad() or torch.inference_mode(), or without a cache.",
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_refuses(name: str) -> None:
    options, message = FORWARD[name]
    assert refused(lambda: spread("llama", None)(**{"input_ids": IDS, "attention_mask": MASK} | options)) == message


def test_more_tokens_than_the_model_has_positions_are_refused() -> None:
    """Real tokens count, however much padding stands before them, and those that a cache holds."""
    message = (
        "The model has 64 positions, but with these tokens a row holds 65. Pass fewer tokens, or use a model with more "
        "positions."
    )
    ids = torch.randint(3, VOCAB, (2, 80), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(80).expand(2, 80) >= torch.tensor([[16], [40]])
    for layers in (None, slice(1, 3)):
        model = adapt(original("gpt2"), 2, layers=layers)
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            assert model(ids, attention_mask=mask).logits.isfinite().all()
            assert refused(partial(model, ids[:, :65])) == message
            assert refused(partial(model.generate, ids[:, :60], max_new_tokens=9)) == message


def texts(model: AdaptiveForCausalLM, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)


@pytest.mark.plain
def test_generate_refuses_a_cache_of_other_ids_or_of_another_kind() -> None:
    model = spread("llama", None)
    model.generation_config.eos_token_id = None
    cache = AdaptiveCache()
    first = texts(model, IDS[:1], max_new_tokens=3, **{CACHE: cache})
    assert refused(lambda: texts(model, IDS[:1], max_new_tokens=3, **{CACHE: cache})) == (
        "generate expected all ids so far, those that the cache holds before the new ones, got 9 columns with a cache "
        "of 11. Pass them all, with the attention_mask of all."
    )
    assert torch.equal(texts(model, first, max_new_tokens=2, **{CACHE: cache}), texts(model, IDS[:1], max_new_tokens=5))
    assert refused(lambda: model.generate(IDS[:1], max_new_tokens=3, **{CACHE: ad.KVReuseCache()})) == (
        f"{CACHE} expected an AdaptiveCache, which holds keys and values of every iteration, got KVReuseCache. "
        "Pass adadepth.hf.AdaptiveCache(), or use_cache=True for a new one."
    )


def test_attention_refuses_what_it_cannot_honour() -> None:
    model = adapt(original("llama"), 2)
    with pytest.raises(RuntimeError) as error:
        model.base(IDS)
    assert str(error.value) == (
        "LlamaAttention expected to run in an adapted model, got a call of the model that was adapted (model.base). "
        "Call the model that adapt returned."
    )
    attention = model.base.model.layers[0].self_attn
    plain = attention.forward
    for given, message in (
        (
            {"attention_mask": MASK},
            "LlamaAttention passes an attention mask of its own. In an adapted model, a token attends only to itself "
            "and to earlier tokens, and the loop masks padding. Pass padding as attention_mask to the model, and set "
            "config.is_causal to True or None.",
        ),
        (
            {"is_causal": False},
            "LlamaAttention passes is_causal=False. In an adapted model, a token attends only to itself and to earlier "
            "tokens, and the loop masks padding. Pass padding as attention_mask to the model, and set config.is_causal "
            "to True or None.",
        ),
        (
            {"indices": torch.ones(4), "position_bias": torch.ones(4)},
            "LlamaAttention attends with indices, position_bias, which an adapted model does not support. It supports "
            "scaling, dropout, sliding_window, softcap and s_aux (sinks).",
        ),
    ):
        attention.forward = lambda *args, given=given, **kwargs: plain(*args, **{**kwargs, **given})
        assert refused(lambda: model(IDS)) == message
    attention.forward = plain
    model.base.set_attn_implementation("sdpa")
    assert refused(lambda: model(IDS)) == (
        "An adapted model attends through the loop, but its attention was set to 'sdpa'. Set it back: "
        "model.base.set_attn_implementation('adadepth')."
    )


class Lost(ad.Gate):
    """Has a buffer that is not saved."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(()), persistent=False)

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        return self.table.expand(h.shape[:-1])


def _rule(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    return remaining


class Nothing:
    def __init__(self, tau: float) -> None:
        pass

    def __call__(self, scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
        return remaining


SAVING: dict[str, tuple[dict[str, Any], str]] = {
    "a function": (
        {"rule": _rule},
        "Only gates, rules, updates, numbers, strings, lists of them and modules of the base can be saved in the "
        "configuration, got function. Write it as a class with the interface of a piece, or save without it: "
        "model.base.save_pretrained(path).",
    ),
    "a head of its own": (
        {"gate": ad.MaxProbGate(nn.Linear(DIM, VOCAB))},
        "Only gates, rules, updates, numbers, strings, lists of them and modules of the base can be saved in the "
        "configuration, got Linear. Write it as a class with the interface of a piece, or save without it: "
        "model.base.save_pretrained(path).",
    ),
    "a lost buffer": (
        {"gate": Lost()},
        "Lost has buffers that would not be saved: table. Register them with persistent=True.",
    ),
    "a threshold for each row": (
        {"rule": ad.Threshold(torch.ones(3, 1))},
        "Threshold holds a tensor of shape (3, 1) as tau, which belongs to a call rather than to a model. Pass the "
        "piece to the call, rule=, and give the model one with a number.",
    ),
    "a rule that keeps nothing": (
        {"rule": ad.Lookahead(Nothing(1.0))},
        "Nothing takes tau, but has no attribute of that name, so it cannot be saved. Write self.tau = tau in its "
        "constructor.",
    ),
}


@pytest.mark.parametrize("name", SAVING)
def test_saving_refuses_pieces_that_would_not_come_back(name: str, tmp_path: Path) -> None:
    pieces, message = SAVING[name]
    assert refused(lambda: adapt(original("llama"), 2, **pieces).save_pretrained(tmp_path)) == message


def test_loading_refuses_what_is_not_this_model(tmp_path: Path) -> None:
    model = spread("llama", None, torch.float32)
    model.save_pretrained(tmp_path / "model")
    model.save_gates(tmp_path / "gates")
    original("llama", torch.float32).save_pretrained(tmp_path / "base")
    assert refused(lambda: AdaptiveForCausalLM.from_pretrained(tmp_path / "base")) == (
        "Expected the configuration of an adapted model, got one of model_type 'llama'. Adapt that model: "
        "adapt(AutoModelForCausalLM.from_pretrained(path), steps=...)."
    )
    load = partial(AdaptiveForCausalLM.from_pretrained, tmp_path / "model")
    wider = ad.PerIterationMLPGate(DIM, STEPS, hidden=9)
    assert refused(lambda: load(gate=wider)) == (
        "The checkpoint is of another model: it has loop.gate.mlps.0.0.bias of shape (8,) in place of (9,), "
        "loop.gate.mlps.0.0.weight of shape (8, 16) in place of (9, 16), loop.gate.mlps.0.2.weight of shape (1, 8) in "
        "place of (1, 9), loop.gate.mlps.1.0.bias of shape (8,) in place of (9,), loop.gate.mlps.1.0.weight of shape "
        "(8, 16) in place of (9, 16), loop.gate.mlps.1.2.weight of shape (1, 8) in place of (1, 9). Load it with the "
        "configuration, and the gate=, rule= and update=, that it was saved with."
    )
    assert refused(lambda: load(update=ad.Interpolate(), gate=ad.LinearGate(DIM))).startswith(
        "The checkpoint is of another model: it lacks loop.gate.proj.bias, loop.gate.proj.weight; it has no place for "
        "loop.gate.mlps.0.0.bias, "
    )
    assert refused(lambda: load_gates(original("llama"), tmp_path / "gates", gaet=None)) == (
        "load_gates expected gate, rule, update beside base and path, got gaet."
    )
    assert refused(lambda: load_gates(original("llama"), tmp_path / "nowhere")) == (
        f"{tmp_path / 'nowhere'} holds no gates.safetensors. Give load_gates the folder that model.save_gates wrote."
    )
    assert refused(lambda: load_gates(original("gpt2"), tmp_path / "gates")) == (
        "The gates were saved from a base of model_type='llama', got one of 'gpt2'. Give load_gates the model that "
        "they were trained on."
    )
    assert refused(lambda: load_gates(original("llama", torch.float32), tmp_path / "gates", gate=wider)).startswith(
        "The checkpoint is of another model: it has loop.gate.mlps.0.0.bias of shape (8,) in place of (9,), "
    )


@pytest.mark.plain
def test_gates_are_not_loaded_onto_a_base_that_fails_the_check(tmp_path: Path) -> None:
    adapt(windows_in_a_mask(), 2, check=False).save_gates(tmp_path)
    assert refused(lambda: load_gates(windows_in_a_mask(), tmp_path)) == ADAPT["windows in a mask"][1]
    assert load_gates(windows_in_a_mask(), tmp_path, check=False).loop.steps == 2


@pytest.mark.parametrize("name", ["subprocess.Popen", "os.system", "nowhere.Gate", "adadepth.gates.Nothing", "Gate"])
def test_only_pieces_that_are_imported_are_made(name: str, tmp_path: Path) -> None:
    model = spread("llama", None, torch.float32)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, AdaptiveConfig) and config.pieces is not None
    config.pieces["gate"] = {"class": name, "arguments": {}}
    config.save_pretrained(tmp_path)
    assert refused(lambda: AdaptiveForCausalLM.from_pretrained(tmp_path)) == (
        f"The configuration names the piece {name}, which this program has not imported. Import it before loading, or "
        "pass gate=, rule= or update= to from_pretrained."
    )
    config.pieces["gate"] = {"class": "adadepth.rules.Survival", "arguments": {}}
    config.save_pretrained(tmp_path)
    assert refused(lambda: AdaptiveForCausalLM.from_pretrained(tmp_path)) == (
        "The configuration gives a Survival as gate. Pass gate= instead."
    )
