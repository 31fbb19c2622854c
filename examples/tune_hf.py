"""An adapted Hugging Face model in the tools that people put around one: TRL, LoRA, QLoRA, a chat.

`pip install '.[trl]'`. Each function is what `docs/hugging-face-tools.md` shows; `tests/test_trl.py` runs them.
"""

from typing import Any

import torch

import adadepth as ad
from adadepth.hf import adapt, traces


def fine_tune(model: Any, texts: Any, tokenizer: Any, **options: Any) -> Any:
    """Supervised fine-tuning, with several texts in a row and no padding."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(padding_free=True, **options)
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=texts,
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def fine_tune_to_a_depth(
    model: Any,
    texts: Any,
    tokenizer: Any,
    mean_depth: float,
    **options: Any,
) -> Any:
    """The same, with a second loss that holds the mean depth."""
    from trl import SFTConfig, SFTTrainer

    budget = ad.DepthBudget(mean_depth).to(model.device)

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            with traces(self.model) as seen:
                loss = super().compute_loss(*args, **kwargs)
            return loss + budget(seen[-1])

    trainer = Trainer(
        model,
        SFTConfig(**options),
        train_dataset=texts,
        processing_class=tokenizer,
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
