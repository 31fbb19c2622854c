# ruff: noqa: E402 (the whole file is skipped without transformers)
"""Adapted models cast, resized, checkpointed, trained, wrapped by peft, placed by accelerate, shared by threads."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import the
from torch import nn

import adadepth as ad

transformers = pytest.importorskip("transformers")

from hf_zoo import (
    DIM,
    IDS,
    LABELS,
    LAYERS,
    MASK,
    SPANS,
    STEPS,
    VOCAB,
    logits,
    near,
    original,
    same,
    spread,
)
from transformers import AutoModelForCausalLM

from adadepth.hf import AdaptiveForCausalLM, adapt, traces
from adadepth.hf.cache import CACHE
from examples import tune_hf

NEW = hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable")
CHECKPOINTING = "activation_checkpointing" if NEW else "gradient_checkpointing"


def test_casting_and_moving_take_everything_along() -> None:
    model = spread("llama", None, torch.float32).to(torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model(IDS).logits.dtype is torch.bfloat16
    gate = adapt(original("llama", torch.float16), 2, ad.LinearGate(DIM)).loop.gate
    assert the(ad.LinearGate, gate).proj.weight.dtype is torch.float16
    twin = copy.deepcopy(model)
    assert twin.loop.update.update.head is twin.get_output_embeddings() and twin.loop.block.base is twin.base
    assert torch.equal(twin(IDS).logits, model(IDS).logits)


def test_tables_are_resized_and_replaced_also_where_pieces_refer_to_them(tmp_path: Path) -> None:
    base = original("llama", torch.float32)
    gate = ad.MaxProbGate(nn.Sequential(base.base_model.norm, base.get_output_embeddings()))
    model = adapt(
        base, STEPS, gate, update=ad.Ungated(ad.Ponder(base.get_input_embeddings(), base.get_output_embeddings()))
    )
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    ponder = the(ad.Ponder, the(ad.Ungated, model.loop.update).update)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert ponder.embedding is embedding and ponder.head is head
    assert the(nn.Sequential, the(ad.MaxProbGate, model.loop.gate).head)[1] is head
    assert model(IDS + 5).logits.shape[-1] == VOCAB + 5 == model.config.get_text_config().vocab_size
    model.save_pretrained(tmp_path)
    assert same(AdaptiveForCausalLM.from_pretrained(tmp_path), model)
    resized = original("llama")
    resized.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    resized.lm_head = nn.Linear(DIM, VOCAB + 5, bias=False).double()  # unknown to transformers' initialisation
    weights = copy.deepcopy(resized.state_dict())
    adapted = adapt(resized, STEPS).base.state_dict()
    assert all(torch.equal(weights[name], adapted[name]) for name in weights)


@pytest.mark.parametrize("layers", SPANS, ids=str)
def test_checkpointing_gives_the_same_gradients(layers: slice | None) -> None:
    gradients = []
    for checkpointing in (False, True, False):
        model = spread("llama", layers).train()
        if checkpointing:
            getattr(model, f"{CHECKPOINTING}_enable")()
            assert getattr(model, f"is_{CHECKPOINTING}") and model.loop.checkpoint
        model(IDS, attention_mask=MASK, labels=LABELS).loss.backward()
        gradients.append([weight.grad for weight in model.parameters()])
        getattr(model, f"{CHECKPOINTING}_disable")()
        assert not getattr(model, f"is_{CHECKPOINTING}") and not model.loop.checkpoint
    plain, checkpointed, again = gradients
    assert all(
        (a is b is c) or (near(b, a) and torch.equal(a, c)) for a, b, c in zip(plain, checkpointed, again, strict=True)
    )


def test_the_trainer_trains_evaluates_and_saves(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = spread("gpt_neox", None, torch.float32)
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in IDS.repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        tmp_path / "run",
        max_steps=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        **{CHECKPOINTING: True},
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_steps=3,
    )
    before = copy.deepcopy(model.state_dict())
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    moved = [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]
    assert {"loop.update.alpha", "loop.gate.mlps.0.0.weight", "base.gpt_neox.embed_in.weight"} <= {*moved}
    predicted = trainer.predict(data)
    assert predicted.predictions.shape == (len(data), IDS.shape[1], VOCAB)
    also = trainer.predict(data, ignore_keys=["states", CACHE]).predictions
    assert (also[0] == predicted.predictions).all() and isinstance(also[1], ad.Trace)
    loaded = AdaptiveForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert same(loaded, model.eval())


def test_a_budget_resumes_from_the_checkpoint_that_is_given(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")

    class Trainer(tune_hf.HoldDepth, transformers.Trainer):  # type: ignore[misc, name-defined]
        pass

    def train(run: str, steps: int, gain: float, **options: Any) -> ad.DepthBudget:
        Trainer.budget = ad.DepthBudget(1.5, gain=gain)
        arguments = transformers.TrainingArguments(
            tmp_path / run, max_steps=steps, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
        )
        callbacks = [tune_hf.SaveBudget(Trainer.budget)]
        data = [{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1)]
        model = spread("llama", slice(1, 3), torch.float32)
        Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train(**options)
        return Trainer.budget

    first, second = train("first", 1, 1.0), train("second", 2, 0.1)
    assert first.multiplier != 0 and second.multiplier not in (0, first.multiplier)
    (tmp_path / "first" / "checkpoint-1").rename(tmp_path / "elsewhere")
    resumed = train("second", 2, 1e-12, resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert resumed.multiplier == pytest.approx(first.multiplier)
    assert train("second", 3, 1e-12, resume_from_checkpoint=True).multiplier == pytest.approx(resumed.multiplier)


def test_the_trainer_keeps_the_positions_of_packed_texts(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = spread("llama", None, torch.float32)
    row = {"input_ids": IDS[0], "labels": IDS[0], "position_ids": torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])}
    arguments = transformers.TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True)
    predicted = transformers.Trainer(model, arguments).predict([row]).predictions
    with torch.no_grad():
        apart = [model(IDS[:1, :4]).logits[0], model(IDS[:1, 4:]).logits[0]]
    assert near(torch.from_numpy(predicted[0]), torch.cat(apart))


@pytest.mark.parametrize("lora", [False, True])
def test_smoothed_labels_are_the_next_tokens(tmp_path: Path, lora: bool) -> None:
    pytest.importorskip("accelerate")
    model = spread("llama", None, torch.float32).eval()
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    arguments = transformers.TrainingArguments(
        tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    given = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    with torch.no_grad():
        logits = model(input_ids=IDS, attention_mask=MASK).logits
        got = transformers.Trainer(model, arguments).compute_loss(model, given)
    want = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_lora_trains_and_is_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], modules_to_save=["loop.gate", "loop.update"], r=2
    )
    model = peft.get_peft_model(spread("llama", None, torch.float32), config)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    fresh = spread("llama", None, torch.float32)
    at_first = logits(fresh)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert same(loaded, model) and not near(logits(loaded), at_first)
    ids = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(**ids), model.generate(**ids))
    merged = model.merge_and_unload()
    assert isinstance(merged, AdaptiveForCausalLM)
    merged.save_pretrained(tmp_path / "merged")
    assert same(AdaptiveForCausalLM.from_pretrained(tmp_path / "merged"), merged)


def test_a_prompt_is_tuned() -> None:
    """Without a cache: peft does not know its new name, and lets a cache of any model begin without the prompt."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        spread("llama", slice(1, 3), torch.float32),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
    learned = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert list(learned) == ["prompt_encoder.default.embedding.weight"] and learned.popitem()[1].abs().sum() > 0
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "use_cache": False}
    new = model.generate(input_ids=IDS, attention_mask=MASK, **options)[:, -4:]
    for row, mask, expected in zip(IDS, MASK.bool(), new, strict=True):
        assert torch.equal(model.generate(input_ids=row[None, mask], **options)[0, -4:], expected)


def test_traces_of_a_model_that_is_wrapped() -> None:
    peft = pytest.importorskip("peft")
    model = spread("llama", slice(1, 3), torch.float32)
    layers = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["loop.gate"])
    wrapped = peft.get_peft_model(model, layers)
    with traces(wrapped) as seen:
        depth = wrapped(input_ids=IDS, attention_mask=MASK).trace.depth
        model.base_model(IDS[:1])  # as trainers do that bring a head of their own
    assert torch.equal(seen[0].depth, depth) and seen[1].depth.shape == (1, 9)
    seen[0].gates.mean().backward()
    learned = [name for name, weight in wrapped.named_parameters() if "loop.gate" in name and weight.grad is not None]
    assert learned and all("modules_to_save" in name for name in learned)
    with pytest.raises(ValueError, match=r"^traces expected an adapted model, or one that is wrapped, got Linear\.$"):
        traces(nn.Linear(1, 1)).__enter__()


def test_device_maps(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = spread("llama", slice(1, 3), torch.float32)
    model.save_pretrained(tmp_path / "saved")
    model.base.save_pretrained(tmp_path / "base")
    everywhere = AdaptiveForCausalLM.from_pretrained(tmp_path / "saved", device_map={"": "cpu"})
    assert same(everywhere, model)
    layers = {f"model.layers.{i}": "disk" if i in (0, 2) else "cpu" for i in range(LAYERS)}
    ends = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    placed = {f"base.{name}": where for name, where in {**layers, **ends}.items()} | {"loop": "cpu"}
    offloaded = AdaptiveForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=placed, offload_folder=tmp_path / "off"
    )
    assert same(offloaded, model)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map={**layers, **ends}, offload_folder=tmp_path / "off2"
    )
    pieces = model.loop.gate, model.loop.rule, model.loop.update
    adapted = adapt(base, STEPS, *pieces, layers=slice(1, 3))
    assert same(adapted, model)
    assert adapted.hf_device_map == {f"base.{name}": where for name, where in {**layers, **ends}.items()}


def test_a_head_out_of_memory_is_refused_where_its_weights_are_read(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    spread("llama", None, torch.float32).save_pretrained(tmp_path / "saved")
    placed = {"base.model": "cpu", "base.lm_head": "disk", "loop": "cpu"}
    model = AdaptiveForCausalLM.from_pretrained(tmp_path / "saved", device_map=placed, offload_folder=tmp_path / "off")
    message = (
        "Ponder reads the weights of embedding and head, but accelerate has moved them out of memory. Keep both on a "
        "device in device_map, or give adapt another update."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(IDS)


def test_two_threads_run_the_same_model_with_rules_of_their_own() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = spread("llama", None)
    rules = [ad.Threshold(2.0), ad.Threshold(0.0)] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda rule: model(IDS, rule=rule).trace.depth.unique().tolist(), rules))
    assert found == [[1], [STEPS]] * 4
