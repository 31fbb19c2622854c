# ruff: noqa: E402 (the whole file is skipped without transformers)
"""Adapted Hugging Face models compute what the original does at first, and later a hand-written loop of it."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from narrow import the
from torch import Tensor, nn

import adadepth as ad

transformers = pytest.importorskip("transformers")

from hf_small import SMALL, small
from hf_zoo import (
    DIM,
    IDS,
    LABELS,
    LAYERS,
    MASK,
    POSITIONS,
    SOME,
    SOME_WAYS,
    SPANS,
    STEPS,
    VOCAB,
    logits,
    near,
    original,
    spread,
)

from adadepth.hf import AdaptiveCache, AdaptiveForCausalLM, Head, adapt
from adadepth.hf.cache import CACHE

# Each in one dtype, and `make test-every` in the others.
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NAMED_DTYPES = [
    pytest.param(name, dtype, id=f"{name}-{dtype}", marks=[pytest.mark.every] if (i + j) % 3 else [])
    for i, name in enumerate(SOME)
    for j, dtype in enumerate(DTYPES)
]


def test_transformers_warns_of_nothing() -> None:
    """What is deprecated there would be said to every user, who can do nothing about it."""
    logger, said = logging.getLogger("transformers"), []
    transformers.utils.logging.warning_once.cache_clear()  # said once for each message
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        model = adapt(original(SOME[0], torch.float32), STEPS)
        model.generate(input_ids=IDS[:1], max_new_tokens=2)
    finally:
        logger.removeHandler(handler)
    assert said == []


@pytest.mark.parametrize(("name", "dtype"), NAMED_DTYPES)
def test_an_adapted_model_begins_as_the_original(name: str, dtype: torch.dtype) -> None:
    base = original(name, dtype)
    with torch.no_grad():
        expected = base(IDS).logits
    for layers in (None, slice(None), slice(0, 2), slice(1, 3), slice(3, 4)):
        model = adapt(copy.deepcopy(base), STEPS, layers=layers)
        out = model(IDS, labels=LABELS)
        assert torch.equal(out.logits, expected)
        assert out.trace.depth.eq(STEPS).all()
        out.loss.backward()
        assert the(Tensor, the(ad.ReZero, model.loop.update).alpha.grad).abs() > 0


@pytest.mark.shapes
@pytest.mark.parametrize("kind", ["llama", "gemma2", "biogpt", "minicpm3", "granite"])  # granite scales later
def test_the_default_update_adds_the_embedding_of_the_prediction(kind: str) -> None:
    model: Any = adapt(small(kind), STEPS, check=False)
    ponder = the(ad.Ponder, the(ad.ReZero, model.loop.update).update)
    h = torch.randn(5, DIM, dtype=torch.float64)
    with torch.no_grad():
        added = ponder(torch.zeros_like(h), h, h, torch.ones(5, 1, dtype=h.dtype), 0)
        embeddings = model.get_input_embeddings()(torch.arange(len(ponder.embedding.weight)))
        assert near(added, Head(model.base)(h).softmax(-1) @ embeddings)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(SMALL[kind]())
    unloaded: Any = adapt(empty, STEPS, check=False)
    assert unloaded.loop.update.update.scale == pytest.approx(ponder.scale)


class _Normed(nn.Embedding):
    """Its result is no multiple of its row."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(input), dim=-1)


def test_the_default_update_reads_no_rows_of_an_embedding_that_does_more_than_scale() -> None:
    base = small("llama")
    base.set_input_embeddings(_Normed(VOCAB, DIM, dtype=torch.float64))
    assert isinstance(the(ad.ReZero, adapt(base, STEPS).loop.update).update, ad.Interpolate)


def test_others_of_the_same_configuration_go_on_as_they_were() -> None:
    teacher = original("llama")
    student = transformers.AutoModelForCausalLM.from_config(teacher.config).double()
    with torch.no_grad():
        before = teacher(IDS).logits
        model = adapt(student, 2)
        model(IDS)
        assert torch.equal(teacher(IDS).logits, before)
    assert all(m.config is model.base.config for m in model.base.modules() if hasattr(m, "config"))


def test_positions_that_are_counted_may_be_given() -> None:
    model = spread("llama", slice(1, 3))
    with torch.no_grad():
        got = model(IDS, attention_mask=MASK, position_ids=POSITIONS).logits
        assert torch.equal(got, model(IDS, attention_mask=MASK).logits)


@pytest.mark.shapes
@pytest.mark.parametrize("layers", SPANS, ids=str)
def test_several_texts_in_a_row_are_rows_of_their_own(layers: slice | None) -> None:
    model: Any = spread("llama", layers)
    lengths = MASK.sum(1).tolist()
    texts = [{"input_ids": row[mask.bool()].tolist()} for row, mask in zip(IDS, MASK, strict=True)]
    options = {"return_flash_attn_kwargs": True, "return_seq_idx": True, "return_tensors": "pt"}
    packed = transformers.DataCollatorWithFlattening(**options)(texts)
    assert packed["input_ids"].shape == (1, sum(lengths)) and "cu_seq_lens_q" in packed and "seq_idx" in packed
    depths = torch.arange(sum(lengths))[None] % STEPS + 1
    labels = torch.where(POSITIONS > 0, LABELS, -100)  # no text has a word before its first
    for own, padded in (({}, {}), ({"max_depth": depths}, {"max_depth": torch.zeros_like(IDS)})):
        if padded:
            padded["max_depth"] += 1
            padded["max_depth"][MASK.bool()] = depths[0]
        got = model(**packed, **own, output_hidden_states=True)
        want = model(IDS, MASK, labels=labels, **padded, output_hidden_states=True)
        assert near(got.logits[0], want.logits[MASK.bool()]) and near(got.loss, want.loss)
        assert torch.equal(got.trace.depth[0], want.trace.depth[MASK.bool()])
        assert all(near(a[0], b[MASK.bool()]) for a, b in zip(got.hidden_states, want.hidden_states, strict=True))


def part(base: Any, start: int, stop: int) -> Callable[[Tensor], Tensor]:
    """Some layers of an original as a model of their own: positions with the first, the norm with none."""
    base = copy.deepcopy(base)
    backbone = base.base_model
    layers = "h" if hasattr(backbone, "h") else "layers"
    setattr(backbone, layers, getattr(backbone, layers)[start:stop])
    if start and hasattr(backbone, "wpe"):
        nn.init.zeros_(backbone.wpe.weight)
    if getattr(backbone.config, "layer_types", None):
        backbone.config.layer_types = backbone.config.layer_types[start:stop]
    norm = next(name for name in ("norm", "final_layer_norm", "ln_f") if hasattr(backbone, name))
    setattr(backbone, norm, nn.Identity())
    return partial(states, backbone)


def states(backbone: Any, x: Tensor) -> Tensor:
    where = {"attention_mask": MASK, "position_ids": POSITIONS, "use_cache": False}
    return backbone(inputs_embeds=x, **where).last_hidden_state


def decoded(model: AdaptiveForCausalLM) -> Tensor:
    """The logits of a prompt and then of one token after the other, with a cache."""
    cache, found = AdaptiveCache(), []
    with torch.no_grad():
        for start, stop in [(0, 4), *((at, at + 1) for at in range(4, IDS.shape[1]))]:
            out = model(IDS[:, start:stop], attention_mask=MASK[:, :stop], past_key_values=cache)
            found.append(out.logits)
    return torch.cat(found, 1)[MASK.bool()]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.every] if i % 2 else []) for i, name in enumerate(SOME)]
)
def test_a_loop_that_nobody_leaves_is_one_written_by_hand(name: str) -> None:
    base = original(name)
    head, embedding, alpha = base.get_output_embeddings(), base.get_input_embeddings(), 0.7
    whole = copy.deepcopy(base).base_model
    norm = next(m for n, m in base.base_model.named_children() if n in ("norm", "final_layer_norm", "ln_f"))
    before, looped, after = part(base, 0, 1), part(base, 1, 3), part(base, 3, LAYERS)
    with torch.no_grad():
        x = embedding(IDS)
        for step in range(STEPS):
            h = states(whole, x)
            x = x + alpha * head(h).softmax(-1) @ embedding.weight if step < STEPS - 1 else x
        first = head(h)[MASK.bool()]
        x = before(embedding(IDS))
        for _ in range(STEPS):
            h = looped(x)
            x = x + alpha * (h - x)
        second = head(norm(after(h)))[MASK.bool()]
    for expected, layers in ((first, None), (second, slice(1, 3))):
        model = adapt(copy.deepcopy(base), STEPS, layers=layers)
        nn.init.constant_(the(ad.ReZero, model.loop.update).alpha, alpha)
        assert near(logits(model), expected) and near(decoded(model), expected)
        assert not near(logits(model, max_depth=1), expected)


@pytest.mark.parametrize(("name", "layers"), SOME_WAYS)
def test_packed_is_dense(name: str, layers: slice | None) -> None:
    model = spread(name, layers)
    packed = model(IDS, attention_mask=MASK)
    assert len(packed.trace.depth[MASK.bool()].unique()) > 1
    model.loop.skip = False
    dense = model(IDS, attention_mask=MASK)
    assert torch.equal(packed.trace.live, dense.trace.live)
    assert near(packed.logits[MASK.bool()], dense.logits[MASK.bool()])


def test_arguments() -> None:
    model = spread("gpt2", slice(1, 3))
    whole = logits(model)
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=MASK.bool()).logits[MASK.bool()], whole)
    out = model(IDS, attention_mask=MASK, states=True, logits_to_keep=2, use_cache=False, output_attentions=None)
    assert near(out.logits[0], whole[7:9]) and the(Tensor, out.states).shape == (3, 9, STEPS, DIM)
    assert near(model(IDS, attention_mask=MASK, logits_to_keep=torch.tensor([8])).logits[0], whole[8:9])
    loss, values, trace = model(IDS, attention_mask=MASK, labels=LABELS, return_dict=False)
    assert near(values[MASK.bool()], whole) and trace.depth.shape == IDS.shape
    shifted = nn.functional.cross_entropy(values[:, :-1].flatten(0, 1).float(), LABELS[:, 1:].flatten())
    assert near(loss, shifted)
    rule = model.loop.rule
    assert torch.equal(model(IDS, attention_mask=MASK, rule=ad.Threshold(2.0)).trace.depth, MASK)
    assert model.loop.rule is rule


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_goes_by_both_its_names(name: str) -> None:
    model, cache = spread("llama", None), AdaptiveCache()
    with torch.no_grad():
        out = model(IDS[:, :6], attention_mask=MASK[:, :6], **{name: cache})
        assert out.past_key_values is getattr(out, CACHE) is out[CACHE] is out[1] is cache
        on = model(IDS[:, 6:], attention_mask=MASK, **{name: out.past_key_values}, return_dict=False)
    assert on[1] is cache and cache.get_seq_length() == 9
    assert near(on[0][MASK[:, 6:].bool()], model(IDS, attention_mask=MASK).logits[:, 6:][MASK[:, 6:].bool()])


@pytest.mark.shapes
def test_hidden_states_by_their_numbers() -> None:
    model: Any = spread("llama", slice(1, 3))
    with torch.no_grad():
        every = model(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        some = model(IDS, attention_mask=MASK, output_hidden_states=[0, 2, -1]).hidden_states
        (second,) = (h for h in model(IDS, attention_mask=MASK, output_hidden_states=1).hidden_states if h is not None)
    assert len(every) == len(some) == 1 + 1 + STEPS + 1
    assert [h is not None for h in some] == [True, False, True, False, False, True]
    assert all(h is None or torch.equal(h, other) for h, other in zip(some, every, strict=True))
    assert torch.equal(second, every[1])


def test_what_is_seen_of_layers_is_of_the_pass_and_not_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop checks itself before it first skips tokens, and runs its layers for that."""
    model: Any = adapt(small("mixtral"), STEPS, ad.LinearGate(DIM), ad.Threshold(0.5), layers=slice(1, 3))
    asked = {"attention_mask": MASK, "output_hidden_states": True, "output_router_logits": True}
    with torch.no_grad():
        without = model(IDS, **asked, labels=LABELS)
        monkeypatch.setattr(ad.RecurrentWrapper, "self_check", True)
        checked = model(IDS, **asked, labels=LABELS)
    assert model.prelude._checked and model.loop._checked
    for mine, other in ((checked.hidden_states, without.hidden_states), (checked.router_logits, without.router_logits)):
        assert len(mine) == len(other) and all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert torch.equal(checked.aux_loss, without.aux_loss)
