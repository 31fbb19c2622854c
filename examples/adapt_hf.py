"""A Hugging Face model made adaptive, and its text coloured by depth in the terminal.

    python -m examples.adapt_hf                          # a small random model: shows the mechanism, not sense
    python -m examples.adapt_hf --model PATH             # one saved by an adapted model's save_pretrained
    python -m examples.adapt_hf --model NAME --layers 2 5 # any causal language model, its layers 2 to 4 looped

A model that was just adapted says the same at every depth: train it (`Trainer` takes it as it is), and only
then is what it leaves out worth anything.
"""

import argparse

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import adadepth as ad
from adadepth import viz
from adadepth.hf import AdaptiveForCausalLM, adapt, calibrate

PROMPTS = ["how deep does the model think about every token and why", "each token decides"]


def small() -> tuple[AdaptiveForCausalLM, PreTrainedTokenizerBase]:
    """A random GPT-NeoX over the words of the prompts, its middle looped."""
    torch.manual_seed(1)
    words = ["<pad>", *sorted({word for prompt in PROMPTS for word in prompt.split()})]
    words_only = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model("gpt_neox", vocab_size=len(words), initializer_range=0.1, **sizes)
    base = AutoModelForCausalLM.from_config(config)
    model = adapt(base, steps=4, layers=slice(1, 3), gate=ad.SharedMLPGate(64), update=ad.Interpolate())
    return model, PreTrainedTokenizerFast(tokenizer_object=words_only, pad_token="<pad>")


def load(name: str, layers: list[int] | None) -> tuple[AdaptiveForCausalLM, PreTrainedTokenizerBase]:
    """A saved adapted model as it is; any other adapted, to leave where its state has come to rest."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    if isinstance(model, AdaptiveForCausalLM):
        if layers is not None:
            raise SystemExit("error: --layers expected a model that is not adapted yet; this one keeps its layers")
    else:
        model = adapt(model, 4, gate=ad.ConvergenceGate(), layers=None if layers is None else slice(*layers))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name or path")
    parser.add_argument("--layers", type=int, nargs=2, help="the layers to loop: the first, and one past the last")
    parser.add_argument("--budget", type=float, help="calibrate the threshold to these relative FLOPs, on the prompts")
    parser.add_argument("--new", type=int, default=12, help="tokens to generate")
    args = parser.parse_args(arguments)
    if args.layers is not None and args.model is None:
        parser.error("--layers expected --model as well: without it, the example loops the middle of a small model")
    model, tokenizer = small() if args.model is None else load(args.model, args.layers)
    model.eval()
    budget = 1.8 if args.model is None and args.budget is None else args.budget
    if budget is not None:
        found = calibrate(model, [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS], relative_flops=budget)
        model.loop.rule = found.rule
        print(
            f"threshold {found.tau:.4f}: relative FLOPs {found.relative_flops:.2f} where it was fitted, "
            f"{found.unseen_relative_flops:.2f} elsewhere"
        )
    prompts = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        max_new_tokens=args.new,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
    )
    console, steps = Console(highlight=False), model.loop.steps
    legend = viz.terminal([f" {depth} " for depth in range(1, steps + 1)], torch.arange(1, steps + 1), steps)
    console.print("depth", legend)
    for ids, depth in zip(out.sequences, out.past_key_values.depth, strict=True):
        ran = depth > 0  # neither padding nor the newest, which is not in the cache
        tokens = viz.pieces(tokenizer.decode, ids[: len(depth)][ran])
        console.print(viz.terminal(tokens, depth[ran], steps))


if __name__ == "__main__":
    main()
