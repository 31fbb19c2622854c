# ruff: noqa: E402 (the whole file is skipped without transformers)
"""What tools ask of an adapted model: backbone, hidden states, configuration, packed texts, turns, a saved folder."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import adadepth as ad

transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

from blocks_zoo import Quantised
from hf_small import SMALL, small
from hf_zoo import DIM, IDS, LABELS, LAYERS, MASK, PAD, POSITIONS, SPANS, STEPS, VOCAB, logits, near, original, spread
from narrow import last_maps, the
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast
from transformers.trainer_pt_utils import nested_concat, nested_detach

from adadepth.hf import AdaptiveCache, AdaptiveConfig, AdaptiveForCausalLM, Head, adapt, traces
from adadepth.hf.cache import CACHE


@pytest.fixture(params=SPANS, ids=str)
def model(request: pytest.FixtureRequest) -> AdaptiveForCausalLM:
    return spread("llama", request.param)


def test_adapting_does_not_pack_quantised_layers() -> None:
    base = original("llama", torch.float32)
    layer = base.model.layers[1].self_attn.o_proj = Quantised(DIM).eval()
    adapted = adapt(base, STEPS)
    assert not layer.packed
    assert not any(part.training for part in adapted.modules())


# The backbone.


def test_the_backbone_gives_what_the_head_reads(model: AdaptiveForCausalLM) -> None:
    backbone = model.base_model
    assert backbone is not model and backbone is model.get_decoder() is model.base_model
    out = backbone(input_ids=IDS, attention_mask=MASK)
    whole = model(IDS, attention_mask=MASK)
    assert torch.equal(model.get_output_embeddings()(out.last_hidden_state), whole.logits)
    assert torch.equal(out.trace.depth, whole.trace.depth)
    out.last_hidden_state.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lm_head" not in name)
    assert "backbone" not in " ".join(model.state_dict())


def test_a_copy_has_a_backbone_of_its_own(model: AdaptiveForCausalLM) -> None:
    assert model.base_model is not None
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.base.lm_head.weight)
    assert twin.base_model.model is twin and model.base_model.model is model
    assert not twin(IDS).logits.any() and model(IDS).logits.any()


def test_traces_are_seen_where_the_output_is_not(model: AdaptiveForCausalLM) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor) -> Tensor:
            loss: Tensor = self.inner(ids, labels=ids).loss
            return loss

    with traces(Wrapped()) as seen:
        Wrapped()(IDS[:1])
        model(IDS[1:2])
    model(IDS)
    assert [trace.depth.shape for trace in seen] == [(1, 9), (1, 9)]
    message = r"^traces expected an adapted model, or one that is wrapped, got Linear\.$"
    with pytest.raises(ValueError, match=message), traces(nn.Linear(1, 1)):
        pass


# Hidden states.


@pytest.mark.parametrize("skip", [True, False])
def test_hidden_states_are_embeddings_layers_and_iterations(model: AdaptiveForCausalLM, skip: bool) -> None:
    model.loop.skip = skip
    out = model(IDS, attention_mask=MASK, output_hidden_states=True)
    states = model(IDS, attention_mask=MASK, states=True).states
    assert states is not None and out.states is None and out.hidden_states is not None
    outside = 0 if model.config.span is None else LAYERS - 2
    first = 0 if model.config.span is None else 1
    assert len(out.hidden_states) == 1 + outside + STEPS
    real = MASK.bool()
    assert near(out.hidden_states[0][real], model.get_input_embeddings()(IDS)[real])
    for step in range(STEPS - 1):
        assert near(out.hidden_states[1 + first + step][real], states[:, :, step][real])
    assert near(model.get_output_embeddings()(out.hidden_states[-1][real]), out.logits[real])
    assert torch.equal(model.base_model(IDS, attention_mask=MASK, output_hidden_states=True)[0], out.hidden_states[-1])


def test_hidden_states_of_layers_that_run_once_are_the_bases() -> None:
    base = original("llama")
    with torch.no_grad():
        expected = base(IDS[:1], output_hidden_states=True).hidden_states
        model = adapt(base, STEPS, layers=slice(2, 3))
        got = model(IDS[:1], output_hidden_states=True).hidden_states
        model.config.output_hidden_states = True
        assert len(model(IDS[:1]).hidden_states) == len(got)
    for i, j in enumerate([0, 1, 2, 3, 3, 3, 4]):  # a fresh loop gives at every iteration what its layers give once
        assert near(got[i], expected[j])


def test_hidden_states_come_with_a_cache_and_in_generation(model: AdaptiveForCausalLM) -> None:
    whole, cache = model(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states, AdaptiveCache()
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        now: dict[str, Any] = {"attention_mask": MASK[:, :stop], "output_hidden_states": True}
        with torch.no_grad():
            got = model(IDS[:, start:stop], past_key_values=cache, **now).hidden_states
        for one, every in zip(got, whole, strict=True):
            real = MASK[:, start:stop].bool()
            assert near(one[real], every[:, start:stop][real])
    options: dict[str, Any] = {"output_hidden_states": True, "return_dict_in_generate": True, "do_sample": False}
    out = model.generate(IDS, attention_mask=MASK, max_new_tokens=3, **options)
    assert [states[-1].shape for states in out.hidden_states] == [(3, 9, DIM), (3, 1, DIM), (3, 1, DIM)]


# The configuration.


def test_a_setting_of_the_base_is_written_where_the_base_reads_it() -> None:
    model: Any = adapt(small("mixtral"), STEPS)
    config, own = model.config, dict(vars(model.config))
    assert model(IDS, labels=IDS).aux_loss is None
    config.output_router_logits = True
    assert model(IDS, labels=IDS).aux_loss is not None
    every = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    other = transformers.MixtralConfig()
    for name in {field.name for field in dataclasses.fields(other)} - every:
        setattr(config, name, getattr(other, name))
        assert getattr(config.text_config, name) == getattr(other, name) and vars(config) == own
    assert config.hidden_size == config.text_config.hidden_size == other.hidden_size != DIM
    for name, value in {"output_hidden_states": True, "steps": 2, "quantization_config": {}, "nonsense": 1}.items():
        setattr(config, name, value)
        assert vars(config)[name] == value != getattr(config.text_config, name, None)


def test_settings_given_to_from_pretrained_reach_the_base_and_are_saved(tmp_path: Path) -> None:
    adapt(small("mixtral"), STEPS).save_pretrained(tmp_path / "saved")
    given = {"output_router_logits": True, "attention_dropout": 0.5, "attn_implementation": "eager"}
    for loader in (AdaptiveForCausalLM, AutoModelForCausalLM):
        model = loader.from_pretrained(tmp_path / "saved", **given, experts_implementation="eager")
        assert model.attention == model.base.config._experts_implementation == "eager"
        assert model.base.model.layers[0].self_attn.attention_dropout == 0.5
        assert model(IDS, labels=IDS).aux_loss is not None
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert not given.keys() & written.keys() and written["text_config"]["output_router_logits"] is True
    (tmp_path / "again" / "config.json").write_text(json.dumps(written | {"router_aux_loss_coef": 0.25}))
    loaded = AdaptiveForCausalLM.from_pretrained(tmp_path / "again")
    assert loaded.base.config.attention_dropout == 0.5 and loaded.base.config.router_aux_loss_coef == 0.25


def test_adapt_keeps_how_the_base_was_told_to_compute() -> None:
    told = {"attn_implementation": "eager", "experts_implementation": "eager"}
    base = AutoModelForCausalLM.from_config(SMALL["mixtral"](), **told)
    rotary = base.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}
    model = adapt(base, STEPS, check=False)
    assert model.attention == model.base.config._experts_implementation == "eager"
    assert model.base.config.rope_parameters == rotary


def test_the_configuration_answers_for_the_base(tmp_path: Path) -> None:
    base = original("llama")
    base.config._name_or_path = "somewhere/small"
    config = adapt(base, STEPS).config
    for name in ("hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings", "eos_token_id"):
        assert getattr(config, name) == getattr(config.text_config, name)
    assert config._name_or_path == "somewhere/small" and not hasattr(config, "nonsense")
    assert config.get_text_config() is config.text_config
    config.save_pretrained(tmp_path)
    again = AdaptiveConfig.from_pretrained(tmp_path)
    assert again.hidden_size == DIM and "hidden_size" not in again.to_diff_dict()
    varied = adapt(small("gemma4_unified_text"), 2).config  # whose layers have sizes of their own
    assert varied.vocab_size == VOCAB and not hasattr(varied, "head_dim")


# Weights that are made later.


def test_a_model_made_on_meta_is_initialised_as_a_new_one() -> None:
    torch.manual_seed(0)
    gate = ad.PerIterationMLPGate(DIM, STEPS, hidden=8, bias=1.5)
    made = adapt(original("llama", torch.float32), STEPS, gate, layers=slice(1, 3))
    made._describe()
    with torch.device("meta"):
        model = AdaptiveForCausalLM(made.config)
    model.to_empty(device="cpu")
    for weight in (*model.parameters(), *model.buffers()):
        nn.init.constant_(weight, torch.nan)
    model.init_weights()
    assert all(bool(weight.isfinite().all()) for weight in (*model.parameters(), *model.buffers()))
    assert bool(model.eval()(IDS).logits.isfinite().all())
    assert all(float(last.bias.detach()) == 1.5 for last in last_maps(model.loop.gate))
    assert not the(Tensor, model.loop.update.alpha).any()
    kept = {name: weight.clone() for name, weight in made.state_dict().items()}
    twin = AdaptiveForCausalLM(made.config, made.base, {"gate": made.loop.gate, "update": made.loop.update})
    assert all(torch.equal(kept[name], weight) for name, weight in twin.state_dict().items())


# Outputs in the hands of others.


def test_outputs_are_taken_apart_and_put_together(model: AdaptiveForCausalLM) -> None:
    out = model(IDS, attention_mask=MASK)
    parts = tuple(value for key, value in out.items() if key not in ("past_key_values", CACHE))
    twice = nested_concat(nested_detach(parts), nested_detach(parts))
    assert isinstance(twice[1], ad.Trace)
    assert torch.equal(twice[1].depth, torch.cat([out.trace.depth] * 2))


# Generation.


def letters() -> Any:
    """A tokenizer of single letters."""
    words = [chr(97 + i) for i in range(26)] + [chr(65 + i) for i in range(VOCAB - 26)]
    inner: Any = Tokenizer(models.BPE({letter: i for i, letter in enumerate(words)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="c", pad_token="a")


@pytest.mark.filterwarnings("ignore")
def test_strings_that_stop(model: AdaptiveForCausalLM) -> None:
    model.generation_config.eos_token_id = None
    plain = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    tokenizer = letters()
    stop = tokenizer.decode(plain[0, 10:12])
    got = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert 9 < got.shape[1] <= 12 and torch.equal(got, plain[:, : got.shape[1]])
    assert stop in tokenizer.decode(got[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("depth", [1, 2])
def test_a_model_drafts_for_itself_at_a_lower_depth(model: AdaptiveForCausalLM, depth: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with traces(model) as seen:
        got = model.generate(IDS[:1], assistant_early_exit=depth, **options)
    assert torch.equal(got, model.generate(IDS[:1], **options))
    deepest = [int(trace.depth.max()) for trace in seen]
    assert min(deepest) <= depth < max(deepest)


class Say(LogitsProcessor):  # type: ignore[misc]
    """Writes given texts, `(batch, new)`."""

    def __init__(self, texts: list[list[int]], length: int) -> None:
        self.texts, self.length = torch.tensor(texts), length

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        words = self.texts[:, ids.shape[1] - self.length]
        return torch.full_like(scores, -1e9).scatter(1, words[:, None], 0)


def test_turns_of_different_lengths_are_one_pass_over_everything(model: AdaptiveForCausalLM) -> None:
    """Three turns: what a row says ends early in one, late in another; its last word is seen ever after."""
    generator = torch.Generator().manual_seed(5)
    ids, mask, cache = IDS[:2, 3:], MASK[:2, 3:], AdaptiveCache()
    for said in ([[5, 2, 0, 0], [6, 7, 8, 2]], [[9, 8, 7, 2], [2, 0, 0, 0]], [[4, 2, 0, 0], [3, 2, 0, 0]]):
        processors = LogitsProcessorList([Say(said, ids.shape[1])])
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, CACHE: cache}
        ids = model.generate(ids, attention_mask=mask, logits_processor=processors, **options)
        new = ids.shape[1] - mask.shape[1]
        mask = torch.cat([mask, (torch.tensor(said) != PAD).long()[:, :new]], 1)
        ids = torch.cat([ids, torch.randint(3, VOCAB, (2, 2), generator=generator)], 1)
        mask = torch.cat([mask, torch.ones_like(ids[:, :2])], 1)
    with torch.no_grad():
        past = cache.get_seq_length()
        got = model(ids[:, past:], attention_mask=mask, **{CACHE: cache}).logits[:, -1]
        assert near(got, model(ids, attention_mask=mask).logits[:, -1])
    assert torch.equal(cache.mask.long(), mask)


def test_a_mask_that_contradicts_the_cache_is_refused(model: AdaptiveForCausalLM) -> None:
    cache = AdaptiveCache()
    wrong = torch.cat([MASK[:, :6], torch.ones(3, 3).long()], 1)
    wrong[1, 4] = 0
    message = (
        "attention_mask contradicts the cache: in row 1, column 4 was real when it was run. Pass the mask with which "
        "the columns were run, 0 for padding and for what follows the end of a text; cache.mask holds it."
    )
    with torch.no_grad():
        model(IDS[:, :6], attention_mask=MASK[:, :6], past_key_values=cache)
        for call in (
            lambda: model(IDS[:, 6:], attention_mask=wrong, past_key_values=cache),
            lambda: model.generate(IDS, attention_mask=wrong, max_new_tokens=2, **{CACHE: cache}),
        ):
            with pytest.raises(ValueError, match="contradicts the cache") as error:
                call()
            assert str(error.value) == message
        assert cache.get_seq_length() == 6


# Several texts in a row.


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the batch one after the other in two rows: ids, positions and mask."""
    texts = [ids[mask.bool()] for ids, mask in zip(IDS, MASK, strict=True)]
    first, places = torch.cat([texts[0], texts[2]]), torch.cat([torch.arange(len(texts[i])) for i in (0, 2)])
    around = (1, len(first) - len(texts[1]) - 1)
    second = nn.functional.pad(texts[1], around)
    mask = torch.stack([torch.ones(len(first)), nn.functional.pad(torch.ones(len(texts[1])), around)])
    counted = (mask[1].cumsum(0) - 1).clamp_min(0).long()
    return torch.stack([first, second]), torch.stack([places, counted]), mask.long()


def test_texts_in_one_row_are_rows_of_their_own(model: AdaptiveForCausalLM) -> None:
    ids, positions, mask = packed()
    alone = model(IDS, attention_mask=MASK, states=True, output_hidden_states=True)
    out = model(ids, attention_mask=mask, position_ids=positions, states=True, output_hidden_states=True)
    assert out.states is not None and alone.states is not None and out.hidden_states is not None

    def same(packed: Tensor, rows: Tensor) -> bool:
        own = [row[real] for row, real in zip(rows, MASK.bool(), strict=True)]
        got = [packed[0, : len(own[0])], packed[1, 1 : 1 + len(own[1])], packed[0, len(own[0]) :]]
        return all(near(a, b) for a, b in zip(got, own, strict=True))

    assert same(out.logits, alone.logits) and same(out.states, alone.states)
    assert same(out.trace.scores, alone.trace.scores) and same(out.trace.depth, alone.trace.depth)
    assert all(same(a, b) for a, b in zip(out.hidden_states, alone.hidden_states, strict=True))
    depth = torch.where(mask.bool(), 1 + (torch.arange(mask.numel()) % STEPS).view_as(mask), 1)
    fixed = model(ids, attention_mask=mask, position_ids=positions, min_depth=depth, max_depth=depth)
    assert torch.equal(fixed.trace.depth, depth * mask)


def test_packed_texts_train_as_separate_ones(model: AdaptiveForCausalLM) -> None:
    def gradients(**batch: Any) -> dict[str, Tensor]:
        model.zero_grad()
        the(Tensor, model(**batch).loss).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    ids, positions, mask = packed()
    # The first word of a text is not to be told from the last of another, nor from padding.
    labels = torch.where((mask == 0) | (positions == 0), -100, ids)
    expected = gradients(input_ids=IDS, attention_mask=MASK, labels=torch.where(POSITIONS == 0, -100, LABELS))
    got = gradients(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels)
    assert all(near(got[name], grad) for name, grad in expected.items())


def test_positions_that_do_not_count_are_refused(model: AdaptiveForCausalLM) -> None:
    ids, positions, mask = packed()
    skipping = positions.clone()
    skipping[0, 10:] += 1
    with pytest.raises(ValueError, match="position_ids begin again") as error:
        model(ids, attention_mask=mask, position_ids=skipping)
    assert str(error.value) == (
        "position_ids begin again, so a row holds several texts, but within one they do not count its real tokens from "
        "0. Pass those of each text as 0, 1, 2, ...; an adapted model takes no others."
    )
    with pytest.raises(ValueError, match="position_ids expected the position of each token"):
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=AdaptiveCache())


# Mixtures of experts.


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe"])
def test_the_auxiliary_loss_is_over_the_tokens_that_ran(kind: str) -> None:
    base = small(kind)
    base.config.output_router_logits = True
    with torch.no_grad():
        expected = base(IDS[:2], labels=IDS[:2])
        model = adapt(base, STEPS, layers=slice(1, 3))
        once = model(IDS[:2], labels=IDS[:2], max_depth=1)
        assert near(the(Tensor, once.loss), expected.loss)
        assert near(the(Tensor, once.aux_loss), expected.aux_loss)
        depth = torch.randint(1, STEPS + 1, (3, 9), generator=torch.Generator().manual_seed(2))
        mixed: dict[str, Any] = {"attention_mask": MASK, "labels": LABELS, "min_depth": depth, "max_depth": depth}
        out = model(IDS, **mixed)
        seen = sum(len(router) for router in the(tuple, out.router_logits))
        assert seen == 2 * int(MASK.sum()) + 2 * int(depth[MASK.bool()].sum())
        model.loop.skip = False
        dense = model(IDS, **mixed)
        assert near(the(Tensor, dense.aux_loss), the(Tensor, out.aux_loss))
        assert near(the(Tensor, dense.loss), the(Tensor, out.loss))
        plain = model(IDS, **mixed, output_router_logits=False)
        assert plain.aux_loss is None and not near(the(Tensor, plain.loss), the(Tensor, out.loss))


def test_a_model_without_routers_says_so(model: AdaptiveForCausalLM) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM does not say where its routers are"):
        model(IDS, output_router_logits=True)


# The head.


def test_pieces_read_the_head_as_the_model_has_it(tmp_path: Path) -> None:
    for kind, scale, softcap in (("granite", 0.5, None), ("gemma2", 1.0, 30.0), ("llama", 1.0, None)):
        base = small(kind, torch.float32)
        model = adapt(base, STEPS, ad.MaxProbGate(Head(base)), ad.Threshold(0.5))
        update = model.loop.update.update.update  # type: ignore[union-attr]
        assert isinstance(update, ad.Ponder) and update.logit_scale == pytest.approx(scale)
        assert update.softcap == pytest.approx(softcap) if softcap else update.softcap is None
        out = model(IDS[:1], states=True)
        assert out.states is not None
        certain = model(IDS[:1], max_depth=1).logits.softmax(-1).amax(-1)
        assert torch.allclose(out.trace.scores[..., 0], 1 - certain, atol=1e-5)
        model.save_pretrained(tmp_path / kind)
        again = AdaptiveForCausalLM.from_pretrained(tmp_path / kind)
        assert again.loop.gate.head.base is again.base  # type: ignore[union-attr]
        assert torch.allclose(again(IDS[:1]).trace.scores, out.trace.scores, atol=1e-5)


# The check.


class Leaks(nn.Module):
    """A part of a layer that adds a little of the other tokens."""

    def __init__(self, part: nn.Module, share: float) -> None:
        super().__init__()
        self.part, self.share = part, share

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.part(x) + self.share * x.mean((0, 1), keepdim=True)
        return out


def test_a_base_that_mixes_tokens_elsewhere_is_refused() -> None:
    for layers, at in ((None, 2), (slice(1, 3), 2), (slice(1, 3), 0)):
        base = original("llama")
        base.model.layers[at].mlp = Leaks(base.model.layers[at].mlp, 0.01)
        with pytest.raises(ValueError, match="a row of a padded batch does not give what it gives alone") as error:
            adapt(base, STEPS, layers=layers)
        assert str(error.value).startswith("LlamaForCausalLM cannot be looped as it is: a row of a padded")
    unchecked = adapt(base, STEPS, check=False)
    with pytest.raises(ValueError, match="cannot be looped as it is"):
        unchecked.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_check_tells_rounding_from_faults(dtype: torch.dtype) -> None:
    for kind in ("llama", "mixtral", "gemma2"):
        torch.manual_seed(0)
        adapt(AutoModelForCausalLM.from_config(SMALL[kind](), attn_implementation="eager").to(dtype), STEPS)
    for kind in ("phimoe", "gpt_neo"):
        torch.manual_seed(0)
        with pytest.raises(ValueError, match="cannot be looped as it is"):
            adapt(AutoModelForCausalLM.from_config(SMALL[kind](), attn_implementation="eager").to(dtype), STEPS)


def test_the_check_leaves_everything_as_it_was() -> None:
    model = spread("llama", slice(1, 3)).train()
    model.base.model.layers[0].self_attn.attention_dropout = 0.2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pieces, random = (model.loop.gate, model.loop.rule, model.loop.update), torch.get_rng_state()
    model.check()
    assert torch.equal(torch.get_rng_state(), random) and all(m.training for m in model.modules())
    assert (model.loop.gate, model.loop.rule, model.loop.update) == pieces and model.loop.self_check is False
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.base.config._attn_implementation == "adadepth"


# A saved folder.


LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.tensor([[3, 4, 5]])).logits, sys.argv[2])
"""


def saved(folder: Path) -> AdaptiveForCausalLM:
    model = spread("llama", slice(1, 3), torch.float32)
    model.loop.rule = ad.Threshold(0.5)
    model.register_for_auto_class()
    model.save_pretrained(folder)
    return model


def test_a_saved_folder_says_what_it_needs(tmp_path: Path) -> None:
    model = saved(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "import adadepth.hf" in card and "pip install 'adadepth[hf] @ git+" in card and "layers 1 to 2 run" in card
    assert "PerIterationMLPGate, " in card
    (tmp_path / "saved" / "README.md").write_text("Mine.")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == "Mine."


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The text files of a repository to which models are uploaded; it is empty at first."""
    files: dict[str, str] = {}

    def commit(_hub: Any, operations: Any, **_: Any) -> None:
        for each in operations:
            if not each.path_in_repo.endswith(".safetensors"):
                files[each.path_in_repo] = Path(each.path_or_fileobj).read_text()

    def load(_name: str, **_: Any) -> Any:
        if "README.md" not in files:
            raise huggingface_hub.errors.EntryNotFoundError("none", Mock())
        return huggingface_hub.ModelCard(files["README.md"])

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: Mock(repo_id="me/deep"))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", load)
    return files


@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub"])
def test_what_is_uploaded_says_what_it_needs(hub: dict[str, str], way: str, tmp_path: Path) -> None:
    model = spread("llama", slice(1, 3), torch.float32)
    model.loop.rule = ad.Threshold(0.5)
    model.add_model_tags("mine")

    def push() -> None:
        if way == "push_to_hub":
            model.push_to_hub("deep")
        else:
            model.save_pretrained(tmp_path, push_to_hub=True, repo_id="deep")

    push()
    assert hub.keys() == {"config.json", "generation_config.json", "modeling_adadepth.py", "README.md"}
    code = {where.partition(".")[0] for where in json.loads(hub["config.json"])["auto_map"].values()}
    assert {f"{name}.py" for name in code} <= hub.keys()
    assert "from_pretrained('me/deep')" in hub["README.md"]
    assert huggingface_hub.ModelCard(hub["README.md"]).data.tags == ["adadepth", "mine"]
    hub["README.md"] = "---\ntags: [mine]\n---\nMine."
    push()
    assert hub["README.md"].endswith("Mine.")


@pytest.mark.every  # `test_hf_saving.py` has a new process as well
@pytest.mark.filterwarnings("ignore")
def test_a_saved_folder_loads_by_itself(tmp_path: Path) -> None:
    model = saved(tmp_path / "saved")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "saved"), str(tmp_path / "out.pt")]
    env = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(command, check=True, env=os.environ | env)
    assert near(torch.load(tmp_path / "out.pt"), model(torch.tensor([[3, 4, 5]])).logits)


def test_what_is_saved_alone_is_what_was(model: AdaptiveForCausalLM) -> None:
    assert logits(model).isfinite().all()
