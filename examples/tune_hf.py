"""An adapted Hugging Face model in the tools that people put around one: TRL, LoRA, QLoRA, a chat.

`pip install '.[trl]'`. Each function is what `docs/hugging-face-tools.md` shows; `tests/test_trl.py` runs them.
"""

from typing import Any

import torch
from transformers import TrainerCallback

import adadepth as ad
from adadepth.hf import adapt, traces


def fine_tune(model: Any, texts: Any, tokenizer: Any, **options: Any) -> Any:
    """Supervised fine-tuning, with several texts in a row and no padding."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(padding_free=True, max_length=None, **options)
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=texts,
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


class HoldDepth:
    """For a trainer: a second loss that holds the mean depth, and its log."""

    budget: ad.DepthBudget

    def compute_loss(
        self: Any,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        given = model, inputs, return_outputs, num_items_in_batch
        with traces(model) as seen:
            result = super().compute_loss(*given)  # type: ignore[misc]
        if not model.training:
            return result
        loss, *outputs = result if return_outputs else (result,)
        self.depth = ad.expected_depth(seen[0]).item()
        steps = 1
        if num_items_in_batch is not None:  # then nobody divides the loss
            steps = self.current_gradient_accumulation_steps
        loss = loss + self.budget(seen[0]) / steps
        return (loss, *outputs) if return_outputs else loss

    def log(self: Any, logs: dict[str, float], *args: Any) -> None:
        if "loss" in logs:
            held = {"mean_depth": self.depth}
            held["multiplier"] = self.budget.multiplier.item()
            logs = {**logs, **held}
        super().log(logs, *args)  # type: ignore[misc]


class SaveBudget(TrainerCallback):  # type: ignore[misc]
    """Saves the budget in the state of each checkpoint, and loads it on resuming."""

    def __init__(self, budget: ad.DepthBudget) -> None:
        self.budget = budget

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        multiplier = self.budget.multiplier.item()
        state.stateful_callbacks["DepthBudget"] = {"multiplier": multiplier}

    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        # On resuming, this is the state of the checkpoint.
        if held := state.stateful_callbacks.get("DepthBudget"):
            self.budget.multiplier.fill_(held["multiplier"])


def fine_tune_to_a_depth(
    model: Any,
    texts: Any,
    tokenizer: Any,
    mean_depth: float,
    **options: Any,
) -> Any:
    """The same, with a second loss that holds the mean depth."""
    from trl import SFTConfig, SFTTrainer

    class Trainer(HoldDepth, SFTTrainer):  # type: ignore[misc]
        budget = ad.DepthBudget(mean_depth).to(model.device)

    arguments = SFTConfig(**options)
    # The budget is called once per micro-batch.
    Trainer.budget.gain /= arguments.gradient_accumulation_steps
    trainer = Trainer(
        model,
        arguments,
        train_dataset=texts,
        processing_class=tokenizer,
        callbacks=[SaveBudget(Trainer.budget)],
    )
    trainer.train()
    return trainer


def with_lora(model: Any, rank: int = 8) -> Any:
    """LoRA in the layers; the new gate and update are trained in full."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["loop.gate", "loop.update"],
    )
    return get_peft_model(model, config)


def with_saved_lora(model: Any, folder: str) -> Any:
    """The adapted base with adapters from `folder` merged into it."""
    from peft import PeftModel

    trained = PeftModel.from_pretrained(model, folder)
    return trained.merge_and_unload().eval()


def with_qlora(path: str, steps: int, dim: int, rank: int = 8) -> Any:
    """The base in four bits, adapted, with LoRA on top."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=four_bits,
    )
    base.requires_grad_(False)
    gate = ad.PerIterationMLPGate(dim, steps, hidden=16, bias=0.0)
    return with_lora(adapt(base, steps, gate, ad.Threshold(0.5)), rank)


def chat(model: Any, tokenizer: Any, turns: list[str], words: int) -> list[str]:
    """The model's answers to the user's turns of a conversation."""
    said: list[dict[str, str]] = []
    for turn in turns:
        said.append({"role": "user", "content": turn})
        prompt = tokenizer.apply_chat_template(
            said,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = model.generate(**prompt, max_new_tokens=words)
        new = out[0, prompt["input_ids"].shape[1] :]
        answer = tokenizer.decode(new, skip_special_tokens=True)
        said.append({"role": "assistant", "content": answer})
    return [message["content"] for message in said[1::2]]
