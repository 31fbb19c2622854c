"""An adapted Hugging Face model in the tools that people put around one: TRL, LoRA, QLoRA, a chat.

`pip install '.[trl]'`. Each function is what `docs/hugging-face-tools.md` shows; `tests/test_trl.py` runs them.
"""

from typing import Any

import torch

import adadepth as ad
from adadepth.hf import AdaptiveForCausalLM, adapt, traces


def fine_tune(model: AdaptiveForCausalLM, texts: Any, tokenizer: Any, out: str, **options: Any) -> Any:
    """Supervised fine-tuning, rows packed without padding: each text is a row of its own to the loop."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(output_dir=out, padding_free=True, **options)
    trainer = SFTTrainer(model, arguments, train_dataset=texts, processing_class=tokenizer)
    trainer.train()
    return trainer


def fine_tune_to_a_depth(
    model: AdaptiveForCausalLM, texts: Any, tokenizer: Any, out: str, depth: float, **options: Any
) -> Any:
    """The same, with a loss on the trace that holds the mean depth."""
    from trl import SFTConfig, SFTTrainer

    budget = ad.DepthBudget(depth).to(model.device)

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with traces(model) as seen:
                loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss + budget(seen[-1])

    arguments = SFTConfig(output_dir=out, **options)
    trainer = Trainer(model, arguments, train_dataset=texts, processing_class=tokenizer)
    trainer.train()
    return trainer


def with_lora(model: AdaptiveForCausalLM, rank: int = 8) -> Any:
    """Low-rank changes of the layers; gate and update, which are new, are trained whole."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], modules_to_save=["loop.gate", "loop.update"]),
    )


def with_qlora(path: str, steps: int, dim: int, rank: int = 8) -> Any:
    """The base in four bits, adapted, and low-rank changes on top."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=four_bits).requires_grad_(False)
    gate = ad.PerIterationMLPGate(dim, steps, hidden=16, bias=0.0)
    return with_lora(adapt(base, steps, gate, ad.Threshold(0.5)), rank)


def chat(model: AdaptiveForCausalLM, tokenizer: Any, turns: list[str], words: int = 40) -> list[str]:
    """The answers to some turns of a conversation."""
    said: list[dict[str, str]] = []
    for turn in turns:
        said.append({"role": "user", "content": turn})
        given = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        out = model.generate(**given, max_new_tokens=words)
        answer = tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        said.append({"role": "assistant", "content": answer})
    return [message["content"] for message in said[1::2]]
