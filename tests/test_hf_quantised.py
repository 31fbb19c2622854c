# ruff: noqa: E402 (the whole file is skipped without transformers)
"""Adapted models on quantised bases: with adapters, saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import the

import adadepth as ad

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf_zoo import BLOCKS, IDS, LABELS, MASK, STEPS, logits, near, original
from transformers import AutoModelForCausalLM

from adadepth.hf import AdaptiveForCausalLM, adapt, load_gates

# These libraries warn of what they will do otherwise in time.
pytestmark = pytest.mark.filterwarnings("ignore")


def int4() -> Any:
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


def int8() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


def quantised(path: Path, config: Any) -> Any:
    original("llama", torch.float32, **BLOCKS).save_pretrained(path / "base")
    return AutoModelForCausalLM.from_pretrained(path / "base", quantization_config=config, device_map="cpu")


def adapted(base: Any) -> AdaptiveForCausalLM:
    torch.manual_seed(1)
    gate = ad.LinearGate(base.config.hidden_size)
    return adapt(base, STEPS, gate, ad.Threshold(0.5), ad.Interpolate(), layers=slice(1, 3))


@pytest.mark.parametrize("config", [int4, int8])
def test_saved_and_loaded(config: Any, tmp_path: Path) -> None:
    model = adapted(quantised(tmp_path, config()))
    kind = type(model.base.model.layers[0].mlp.down_proj.weight)
    model.save_pretrained(tmp_path / "saved")
    model.save_gates(tmp_path / "gates")
    loaded = AdaptiveForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    again = load_gates(quantised(tmp_path, config()), tmp_path / "gates")
    assert kind is not torch.nn.Parameter
    for other in (loaded, again):
        assert type(other.base.model.layers[0].mlp.down_proj.weight) is kind
        assert near(logits(other), logits(model))


def test_adapters_on_four_bits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.prepare_model_for_kbit_training(adapted(quantised(tmp_path, int4())))
    layers = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["loop.gate"], r=2)
    wrapped = peft.get_peft_model(model, layers).train()
    assert type(model.base.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"  # of peft
    assert model.is_activation_checkpointing
    optimizer = torch.optim.SGD([weight for weight in wrapped.parameters() if weight.requires_grad], lr=0.03)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(wrapped(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]
    grads = {name: weight.grad for name, weight in wrapped.named_parameters() if weight.requires_grad}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert any("loop.gate" in name and grad.abs().sum() > 0 for name, grad in grads.items())
    # Not in evaluation mode: there bitsandbytes packs weights on some CPUs, which peft does not merge rightly.
    trained = logits(wrapped)
    assert (logits(wrapped.merge_and_unload()) - trained).abs().max() < trained.abs().max()  # rounded to four bits


def test_gates_alone_on_four_bits(tmp_path: Path) -> None:
    model = adapted(quantised(tmp_path, int4()))
    model.base.requires_grad_(False)
    weight = the(ad.LinearGate, model.loop.gate).proj.weight
    before = weight.detach().clone()
    row = {"input_ids": IDS[0], "labels": IDS[0]}
    arguments = transformers.TrainingArguments(
        tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1, learning_rate=0.1, save_strategy="no"
    )
    transformers.Trainer(model, arguments, train_dataset=[row]).train()
    assert not torch.equal(weight, before)
