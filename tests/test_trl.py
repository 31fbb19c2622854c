# ruff: noqa: E402 (the whole file is skipped without TRL)
"""Adapted models under TRL's trainers: they learn, their loss is the model's own, and losses on the trace reach it."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adadepth as ad

trl = pytest.importorskip("trl")

from datasets import Dataset
from hf_words import tokenizer
from hf_zoo import BLOCKS, STEPS, original, spread

from adadepth.hf import AdaptiveForCausalLM, traces
from examples import tune_hf

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL warns of its own ways

TEXTS = ["abcdefgh", "hgfe", "dcbaabcd", "aabb"]
LEARN = ["loop.gate.mlps.0.0.weight", "loop.update.alpha", "base.model.layers.0.mlp.down_proj.weight"]
SLICE = slice(1, 3)


def common(path: Path, **options: Any) -> dict[str, Any]:
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
    }
    return {"output_dir": str(path), **defaults, **options}


def adapted(layers: slice | None = SLICE, dtype: torch.dtype = torch.float32) -> AdaptiveForCausalLM:
    """Its gates learn from the loss as well: the update weighs by them."""
    model = spread("llama", layers, dtype)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def weights(model: Any) -> dict[str, Tensor]:
    return copy.deepcopy(dict(model.named_parameters()))


def changed(model: Any, before: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def losses(trainer: Any) -> list[float]:
    """The loss of each step."""
    trainer.train()
    found = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert found and torch.tensor(found).isfinite().all()
    return found


def rows(texts: list[str] = TEXTS) -> Dataset:
    """The texts as TRL tokenizes them."""
    words = tokenizer()
    return Dataset.from_dict({"input_ids": [words(text)["input_ids"] for text in texts]})


def batch(texts: list[str] = TEXTS) -> dict[str, Tensor]:
    """The texts in a padded batch."""
    given = tokenizer()(texts, padding=True, return_tensors="pt")
    ids, mask = given["input_ids"], given["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def own_loss(model: Any, texts: list[str] = TEXTS) -> float:
    model.train()
    with torch.no_grad():
        return float(model(**batch(texts)).loss)


def sft(model: Any, path: Path, kind: Any = trl.SFTTrainer, peft_config: Any = None, **options: Any) -> Any:
    arguments = trl.SFTConfig(**common(path, **options))
    return kind(model, arguments, train_dataset=rows(), processing_class=tokenizer(), peft_config=peft_config)


def lora(*whole: str) -> Any:
    """LoRA on the layers; `whole` are trained as they are."""
    peft = pytest.importorskip("peft")
    layers = ["q_proj", "down_proj"]
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=layers, modules_to_save=[*whole], r=2)


@pytest.mark.parametrize("layers", [None, SLICE], ids=str)
def test_sft(layers: slice | None, tmp_path: Path) -> None:
    model = adapted(layers)
    before, expected = weights(model), own_loss(model)
    assert losses(sft(model, tmp_path))[0] == pytest.approx(expected, rel=1e-5)
    assert {*LEARN} <= changed(model, before)


def test_sft_with_lora(tmp_path: Path) -> None:
    model = adapted()
    expected = own_loss(model)
    trainer = sft(model, tmp_path, peft_config=lora("loop.gate", "loop.update"))
    before = weights(trainer.model)
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-5)
    moved = changed(trainer.model, before)
    assert any("lora_B" in name and "layers.0." in name for name in moved)
    assert any("gate.modules_to_save" in name for name in moved)
    assert any("update.modules_to_save" in name for name in moved)
    assert all("lora" in name or "modules_to_save" in name for name in moved)


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 16}, {"padding_free": True, "max_length": None}])
def test_packed_texts_are_texts_of_their_own(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted()
    before, expected = weights(model), own_loss(model)
    seen: list[Any] = []
    model.base_model.register_forward_pre_hook(lambda _part, _args, given: seen.append(given), with_kwargs=True)
    assert losses(sft(model, tmp_path, **options))[0] == pytest.approx(expected, rel=1e-5)
    assert seen[0]["input_ids"].shape == (1, sum(map(len, TEXTS))) and (seen[0]["position_ids"] == 0).sum() == 4
    assert {*LEARN} <= changed(model, before)


def test_dpo(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "saved")
    model = AdaptiveForCausalLM.from_pretrained(tmp_path / "saved")  # TRL reads its reference from where the model was
    before = weights(model)
    data = {
        "prompt": ["ab", "cd", "e", "fgh"],
        "chosen": ["abc", "a", "bc", "h"],
        "rejected": ["d", "hh", "ef", "abcd"],
    }
    arguments = trl.DPOConfig(**common(tmp_path))
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=Dataset.from_dict(data), processing_class=tokenizer())
    assert isinstance(trainer.ref_model, AdaptiveForCausalLM)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)  # the two agree before the first step
    assert {*LEARN} <= changed(model, before)


def test_grpo(tmp_path: Path) -> None:
    model = adapted()
    before = weights(model)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 7) for text in completions]

    arguments = trl.GRPOConfig(
        **common(tmp_path, max_steps=1), num_generations=2, max_completion_length=4, temperature=1.0
    )
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["ab", "cd", "e", "fgh"]}),
        processing_class=tokenizer(),
    )
    losses(trainer)
    assert {*LEARN} <= changed(model, before)


class _Shallow(trl.SFTTrainer):  # type: ignore[misc, name-defined]
    """Adds the mean gate to the loss, and keeps the traces."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with traces(model) as self.seen:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + self.seen[0].gates.mean()


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_loss_on_the_trace(with_lora: bool, tmp_path: Path) -> None:
    model = adapted()
    model.loop.update = ad.Replace()  # lets the loss on the trace alone reach the gate
    expected = own_loss(model) + float(model(batch()["input_ids"], batch()["attention_mask"]).trace.gates.mean())
    trainer = sft(model, tmp_path, _Shallow, lora("loop.gate") if with_lora else None, max_steps=1)
    before = weights(trainer.model)
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert [trace.depth.shape for trace in trainer.seen] == [(4, 8)]
    moved = [name for name in changed(trainer.model, before) if "loop.gate" in name]
    assert moved and all(("modules_to_save" in name) == with_lora for name in moved)


# What the page of tools shows.


def test_fine_tuning_as_the_page_shows_it(tmp_path: Path) -> None:
    model, texts = adapted(), Dataset.from_dict({"text": TEXTS})
    before = weights(model)
    options = common(tmp_path, max_steps=1)
    tune_hf.fine_tune(model, texts, tokenizer(), **options)
    assert {*LEARN} <= changed(model, before)
    before = weights(model)
    tune_hf.fine_tune_to_a_depth(model, texts, tokenizer(), 1.5, **options)
    assert {*LEARN} <= changed(model, before)


class _Held(tune_hf.HoldDepth, trl.SFTTrainer):  # type: ignore[misc, name-defined]
    """Its price does not adapt, so that steps can be compared."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.budget = ad.DepthBudget(1.5, gain=1e-12)
        super().__init__(*args, **kwargs)


def _held(path: Path, **options: Any) -> Any:
    """A trainer of four rows of the same text, so that every micro-batch has the same loss."""
    arguments = trl.SFTConfig(**common(path, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **options))
    data = rows(TEXTS[:1] * 4)
    return _Held(adapted(), arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer())


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    moved = []
    for size in (4, 2):
        trainer = _held(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
        before = weights(trainer.model)
        trainer.train()
        moved.append({name: weight - before[name] for name, weight in trainer.model.named_parameters()})
    whole, parts = moved
    for name in LEARN:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-6)
    assert whole[LEARN[0]].abs().max() > 1e-4


def test_a_held_depth_is_logged_and_priced_in_training_only(tmp_path: Path) -> None:
    trainer = _held(tmp_path)
    trainer.budget.multiplier.fill_(2.0)
    trainer.compute_metrics = lambda predicted: {"seen": len(predicted.predictions)}
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(own_loss(trainer.model, TEXTS[:1]), rel=1e-5) and found["eval_seen"] == 4
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert 1 < logged["mean_depth"] < STEPS and logged["multiplier"] == pytest.approx(2.0)
    own, over = own_loss(adapted(), TEXTS[:1]), logged["mean_depth"] - 1.5
    assert logged["loss"] == pytest.approx(own + (2.0 + 0.3 * over) * over, rel=1e-4)
    inputs = {**batch(TEXTS[:1])}
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    assert loss.shape == () and outputs.logits.shape[:2] == (1, 8)


def test_a_resumed_training_keeps_its_multiplier(tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": TEXTS})
    options = common(tmp_path, save_strategy="steps", save_steps=1)
    trainer = tune_hf.fine_tune_to_a_depth(adapted(), texts, tokenizer(), 1.5, **options)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["DepthBudget"]
    assert saved["multiplier"] == trainer.budget.multiplier != 0
    trainer.budget.multiplier.zero_()
    trainer.budget.gain, trainer.args.max_steps = 1e-12, 3
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3 and trainer.budget.multiplier == pytest.approx(saved["multiplier"])


def test_saved_adapters_as_the_page_shows_them(tmp_path: Path) -> None:
    model = tune_hf.with_lora(adapted(dtype=torch.float64), rank=2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05)
    model.save_pretrained(tmp_path / "adapters")
    merged = tune_hf.with_saved_lora(adapted(dtype=torch.float64), str(tmp_path / "adapters"))
    assert isinstance(merged, AdaptiveForCausalLM)
    merged.save_pretrained(tmp_path / "merged")
    again = AdaptiveForCausalLM.from_pretrained(tmp_path / "merged")
    given = batch()
    with torch.no_grad():
        expected = model.eval()(**given).logits
        assert not torch.allclose(adapted(dtype=torch.float64).eval()(**given).logits, expected, atol=1e-3)
        torch.testing.assert_close(merged.eval()(**given).logits, expected)
    torch.testing.assert_close(again.state_dict(), merged.state_dict(), rtol=0, atol=0)


def test_adapters_as_the_page_shows_them(tmp_path: Path) -> None:
    model = tune_hf.with_lora(adapted(), rank=2)
    model(**batch()).loss.backward()
    learned = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert any("lora_B" in name for name in learned) and any("loop.gate" in name for name in learned)
    assert all("lora" in name or "modules_to_save" in name for name in learned)
    pytest.importorskip("bitsandbytes")
    original("llama", torch.float32, **BLOCKS).save_pretrained(tmp_path / "base")
    quantised = tune_hf.with_qlora(str(tmp_path / "base"), STEPS, BLOCKS["hidden_size"], rank=2)
    assert any("4bit" in type(part).__name__ for part in quantised.modules())
    loss = quantised(**batch()).loss
    loss.backward()
    assert bool(loss.isfinite())
    assert any("lora_B" in name and weight.grad is not None for name, weight in quantised.named_parameters())


def test_a_chat_as_the_page_shows_it() -> None:
    model, words = adapted(), tokenizer(padding_side="left")
    answers = tune_hf.chat(model.eval(), words, ["ab", "cd"], words=3)
    assert len(answers) == 2
    said = words.apply_chat_template([{"role": "user", "content": "ab"}], add_generation_prompt=True, return_dict=True)
    ids = torch.tensor([said["input_ids"]])
    expected = model.generate(ids, max_new_tokens=3)[0, ids.shape[1] :]
    assert answers[0] == words.decode(expected, skip_special_tokens=True)
