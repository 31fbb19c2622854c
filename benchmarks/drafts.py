"""What drafts gain in `generate`, at agreements from 1 down, and on two models that were trained.

`python -m benchmarks.drafts` compares `generate(draft_depth=1)` with plain cached `generate` of the same model, in
turn, in one process; texts are equal. First for a random model of Pythia-70M's sizes whose iterations change nothing,
so that its guesses are right, and of which a share is spoiled on purpose. Then for small models of the letters of this
repository's documentation: trained at full depth with a loss at every iteration, so that each improves on the one
before; and trained over a fixed prior of depths.
"""

import argparse
import math
import random
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import adadepth as ad
from adadepth.hf import AdaptiveForCausalLM, Head, adapt, drafted
from adadepth.hf.engine import Engine
from adadepth.hf.requests import Choice, Request, Tokens

from ._measure import machine, write_section

STEPS, PROMPT, NEW = 4, 16, 128
SHARES = (0.0, 0.1, 0.3, 1.0)
LETTERS = 256


def random_model(vocabulary: int) -> AdaptiveForCausalLM:
    """Of Pythia-70M's sizes; its layers add nothing, so a token predicts the same after each iteration."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
    config = AutoConfig.for_model("gpt_neox", **sizes, vocab_size=vocabulary, max_position_embeddings=1024)
    base = AutoModelForCausalLM.from_config(config)
    for layer in base.gpt_neox.layers:
        for last in (layer.attention.dense, layer.mlp.dense_4h_to_h):
            nn.init.zeros_(last.weight)
    return adapt(base, STEPS, check=False).eval()


def text() -> Tensor:
    """The letters of the documentation."""
    pages = sorted(Path(__file__).parent.parent.glob("docs/**/*.md"))
    return torch.tensor(list("".join(page.read_text("utf-8") for page in pages).encode()))


def readout(model: AdaptiveForCausalLM) -> nn.Module:
    """From a state of the loop to logits."""
    return nn.Sequential(model.base.model.norm, Head(model.base))


def losses(model: AdaptiveForCausalLM, ids: Tensor) -> Tensor:
    """The loss of each next token after each iteration, `(batch, seq - 1, steps)`, in nats."""
    return ad.per_iteration_loss(model(ids[:, :-1], states=True).states, readout(model), ids[:, 1:])


def trained(over_depths: bool, steps: int) -> AdaptiveForCausalLM:
    """A small model of letters; `over_depths`: each batch at a depth of its own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = AutoConfig.for_model("llama", **sizes, vocab_size=LETTERS, max_position_embeddings=512)
    model = adapt(AutoModelForCausalLM.from_config(config), STEPS, layers=slice(0, 2), check=False)
    letters, optimizer = text(), torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        start = torch.randint(0, len(letters) - 129, (16,))
        ids = letters[start.unsqueeze(1) + torch.arange(129)]
        if over_depths:
            depth = int(torch.randint(1, STEPS + 1, ()))
            logits = model(ids[:, :-1], min_depth=depth, max_depth=depth).logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        else:
            loss = losses(model, ids).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def settling(model: AdaptiveForCausalLM, ids: Tensor) -> float:
    """The mean first iteration from which the likeliest next token stays."""
    with torch.no_grad():
        states = model(ids, states=True).states
        assert states is not None
        said = readout(model)(states.flatten(0, 2)).argmax(-1).view(states.shape[:3])
    stays = (said == said[..., -1:]).flip(-1).long().cumprod(-1).sum(-1)
    return float((STEPS + 1 - stays).double().mean())


class Spoiling:
    """While it is open, engines of `generate` are seen, and guesses are another token with a probability."""

    def __init__(self, share: float) -> None:
        self.share, self.dice, self.engines = share, random.Random(0), list[Engine]()

    def __enter__(self) -> "Spoiling":
        choose, share, dice, engines = Request.choose, self.share, self.dice, self.engines

        def spoiled(request: Request, tokens: Tokens, logits: Tensor, likeliest: int) -> Choice:
            choice = choose(request, tokens, logits, likeliest)
            guess = not (tokens.exited and tokens is request.chain[0])
            wrong = guess and dice.random() < share
            return choice._replace(token=(choice.token + 1) % logits.shape[-1]) if wrong else choice

        def seen(*arguments: Any) -> Engine:
            engines.append(Engine(*arguments))
            return engines[-1]

        self.patches = ExitStack()
        self.patches.enter_context(patch.object(Request, "choose", spoiled))
        self.patches.enter_context(patch.object(drafted, "Engine", seen))
        return self

    def __exit__(self, *error: object) -> None:
        self.patches.close()


def compared(model: AdaptiveForCausalLM, times: int, share: float, **options: Any) -> str:
    """Cells of a row: agreement, guesses per token, calls per token and as many as there should be, speed-up."""
    ids = text()[:PROMPT].unsqueeze(0) % model.config.get_text_config().vocab_size
    draft = {name: options.pop(name) for name in ("draft_depth", "revise_drafts") if name in options}
    given = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, **options}
    speedups = list[float]()

    def seconds(**draft: Any) -> tuple[float, Tensor]:
        torch.manual_seed(1)
        start = time.perf_counter()
        out = model.generate(ids, **given, **draft)
        return time.perf_counter() - start, out

    with Spoiling(share) as spoiling:
        seconds(**draft)
        for _ in range(times):
            (plain, wanted), (early, made) = seconds(), seconds(**draft)
            assert torch.equal(wanted, made), "drafts have changed a text"
            speedups.append(plain / early)
    engine = spoiling.engines[-1]
    drafts = engine.drafts
    assert drafts is not None
    agreement, share_drafted = drafts.agreement, (drafts.right + drafts.wrong) / NEW
    right = agreement * share_drafted
    expected = right * draft["draft_depth"] + (1 - right) * STEPS
    return (
        f"{agreement:.2f} | {share_drafted:.2f} | {engine.counts.calls / NEW:.2f} ({expected:.2f}) | "
        f"{median(speedups):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="pairs of texts in each row")
    parser.add_argument("--steps", type=int, default=400, help="of training the small models")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    head = "| model | spoiled | agreement | guesses per token | calls per token (expected) | speed-up |"
    lines = [head, "|---|---|---|---|---|---|"]
    for vocabulary in (50304, 2048):
        model = random_model(vocabulary)
        for share in SHARES:
            cells = compared(model, arguments.times, share, draft_depth=1)
            lines.append(f"| Pythia-70M sizes, vocabulary {vocabulary:,} | {share:.0%} | {cells} |")
            print(lines[-1], flush=True)
    notes = list[str]()
    for name, over_depths in (("a loss at every iteration", False), ("a fixed prior over depths", True)):
        model = trained(over_depths, arguments.steps)
        held = text()[-2048:].view(8, 256)
        with torch.no_grad():
            bits = losses(model, held).mean((0, 1)) / math.log(2)
        each = ", ".join(f"{value:.2f}" for value in bits.tolist())
        notes.append(
            f"Letters, {name}: {each} bits after 1 to {STEPS} iterations, settling at {settling(model, held):.2f}."
        )
        print(notes[-1], flush=True)
        for sample in (False, True):
            for revise in (False, True):
                draft = {"draft_depth": 1, "revise_drafts": revise, "do_sample": sample}
                how = f"{'sampled' if sample else 'greedy'}{', revised' if revise else ''}"
                lines.append(f"| letters, {name}, {how} | 0% | {compared(model, arguments.times, 0.0, **draft)} |")
                print(lines[-1], flush=True)
    if arguments.write:
        write_section("drafts", "\n".join([machine(), "", *lines, "", *notes, "", NOTE]))


NOTE = f"""Batch 1, {NEW} new tokens; median of pairs against plain `generate` with a cache. The number of calls that
should be is one for each right guess and {STEPS} for every other token. Where guessing does not pay, few are made."""

if __name__ == "__main__":
    main()
