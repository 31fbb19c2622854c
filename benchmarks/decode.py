"""What decoding costs when rows leave at different depths, against the same model at fixed depth.

`python -m benchmarks.decode` measures a random Pythia-70M, adapted, with a cache. Depths are given from
outside, so that they are the wanted ones. All that a row of a table compares ran in turn in one process.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import adadepth as ad
from adadepth.cache.kv_reuse import LayoutName
from adadepth.hf import AdaptiveForCausalLM, adapt

from ._blocks import Layer, stack
from ._measure import interleave, machine, write_section

LAYERS, DIM, HEADS, STEPS = 6, 512, 8, 4
ENTRY = LAYERS * 2 * DIM * 4  # bytes of a token's keys and values of one iteration
TOKENS = 8  # decoded in one measurement
CONTEXT = 512
# How many of the rows run in each iteration.
NUMBERS = [(8, 7, 6, 5), (8, 6, 3, 1), (8, 3, 1, 1), (32, 28, 24, 20), (32, 22, 13, 8), (32, 12, 5, 3)]


def pythia() -> PreTrainedModel:
    """A random Pythia-70M."""
    torch.manual_seed(0)
    sizes = {"hidden_size": DIM, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = AutoConfig.for_model(
        "gpt_neox", **sizes, intermediate_size=4 * DIM, vocab_size=50304, max_position_embeddings=4096
    )
    return AutoModelForCausalLM.from_config(config).eval()


class Rows:
    """Equal rows with `context` tokens in a cache, left after 2.4 iterations on average, and new tokens for them."""

    def __init__(
        self, looped: ad.RecurrentWrapper, batch: int, context: int = CONTEXT, layout: LayoutName = "filled"
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.looped, self.context = looped, context
        self.cache = ad.KVReuseCache(layout, None if layout == "compact" else context + TOKENS)
        self.depth = ad.uniform_depths((1, context), STEPS, 2.4, generator)
        x = torch.randn(1, context + TOKENS, DIM, generator=generator)
        looped(x[:, :context], max_depth=self.depth, cache=self.cache)
        self.cache.reorder(torch.zeros(batch, dtype=torch.int64))
        self.new = x[:, context:].expand(batch, -1, -1)

    def decode(self, depths: Tensor | None = None) -> None:
        """The new tokens one after the other, to the depths `(batch, TOKENS)`; None: all to the end."""
        for t in range(TOKENS):
            depth = None if depths is None else depths[:, t : t + 1]
            self.looped(self.new[:, t : t + 1], max_depth=depth, cache=self.cache)

    def rewind(self) -> None:
        self.cache.crop(self.context)


Calls = dict[str, tuple[Rows, Callable[[], object]]]


def milliseconds(calls: Calls, repeats: int) -> dict[str, float]:
    """The best time of each for one token."""
    rewind = {name: rows.rewind for name, (rows, _) in calls.items()}
    best = interleave({name: call for name, (_, call) in calls.items()}, repeats, rewind)
    return {name: value / TOKENS * 1e3 for name, value in best.items()}


def once(model: AdaptiveForCausalLM, batch: int, repeats: int) -> float:
    """Milliseconds of what runs once per token: embedding and head."""
    ids, h = torch.zeros(batch, 1, dtype=torch.int64), torch.randn(batch, 1, DIM)
    ends = lambda: (model.get_input_embeddings()(ids), model.get_output_embeddings()(h))  # noqa: E731
    return interleave({"ends": ends}, 4 * repeats)["ends"] * 1e3


def one_row(model: AdaptiveForCausalLM, repeats: int) -> list[str]:
    """One row, whose tokens leave after different numbers of iterations."""
    rows, ends = Rows(model.loop, 1), once(model, 1, repeats)
    depths = [[4] * 8, [4, 3] * 4, [4, 3, 2, 2] * 2, [4, 2, 1, 1] * 2, [2, 1] * 4, [1] * 8]
    shares = {sum(depth) / (STEPS * TOKENS): torch.tensor([depth]) for depth in depths}
    calls: Calls = {"fixed": (rows, rows.decode)}
    best = milliseconds(
        calls | {str(live): (rows, partial(rows.decode, depth)) for live, depth in shares.items()}, repeats
    )
    fixed = best["fixed"]
    lines = ["| live share | time / fixed depth | limit | with embedding and head | their bound |", "|" + "---|" * 5]
    for live in shares:
        ratio, limit = best[str(live)] / fixed, live * 1.07 + 0.05
        whole, bound = (ends + best[str(live)]) / (ends + fixed), (ends + live * fixed) / (ends + fixed)
        lines.append(f"| {live:.2f} | {_over(ratio, limit)} | {limit:.2f} | {whole:.2f} | {bound:.2f} |")
    return [f"One row: {fixed:.1f} ms a token at fixed depth, and {ends:.1f} ms for embedding and head.", "", *lines]


def many_rows(model: AdaptiveForCausalLM, numbers: tuple[int, ...], repeats: int) -> str:
    """Rows that leave at iterations drawn anew for every token, against what their numbers cost by themselves."""
    batch, ends = numbers[0], once(model, numbers[0], repeats)
    depth = (torch.tensor(numbers) > torch.arange(batch).unsqueeze(1)).sum(1)
    generator = torch.Generator().manual_seed(0)
    depths = torch.stack([depth[torch.randperm(batch, generator=generator)] for _ in range(TOKENS)], 1)
    fixed = {n: Rows(model.loop, n) for n in set(numbers)}
    calls: Calls = {str(n): (rows, rows.decode) for n, rows in fixed.items()}
    best = milliseconds({"mixed": (fixed[batch], partial(fixed[batch].decode, depths)), **calls}, repeats)
    parts = sum(best[str(n)] / STEPS for n in numbers)
    live, full = sum(numbers) / (batch * STEPS), best[str(batch)]
    bound = (ends + full) / (ends + live * full)
    return (
        f"| {', '.join(map(str, numbers))} | {live:.2f} | {best['mixed']:.1f} | {_over(best['mixed'] / parts, 1.07)} | "
        f"{full / best['mixed']:.2f} × | {(ends + full) / (ends + best['mixed']):.2f} × | {bound:.2f} × |"
    )


def layouts(model: AdaptiveForCausalLM, context: int, repeats: int) -> str:
    """One row at mixed depths: memory of the layouts, and the time that compact costs."""
    filled, compact = Rows(model.loop, 1, context), Rows(model.loop, 1, context, "compact")
    single = Rows(model.loop, 1, context, "single")
    entries, room = int(filled.depth.sum()), context + TOKENS
    more = compact.cache.nbytes / (entries * ENTRY) - 1
    depths = torch.tensor([[4, 3, 2, 2] * 2])
    best = milliseconds(
        {name: (rows, partial(rows.decode, depths)) for name, rows in (("filled", filled), ("compact", compact))},
        repeats,
    )
    sizes = " | ".join(f"{rows.cache.nbytes / 2**20:.1f}" for rows in (filled, compact, single))
    ratio = _over(best["compact"] / best["filled"], 1.25 if context == CONTEXT else float("inf"))
    return f"| {context} | {entries} of {room * STEPS} | {sizes} | {more:.2%} | {ratio} |"


def generation(batch: int, repeats: int) -> str:
    """`generate` of the original against that of the model adapted with one step."""
    plain, adapted = pythia(), adapt(pythia(), 1)
    ids = torch.randint(0, 50000, (batch, 64), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    calls = {
        name: partial(model.generate, ids, attention_mask=mask, **options)
        for name, model in (("original", plain), ("adapted", adapted))
    }
    same = torch.equal(calls["original"](), calls["adapted"]())
    best = interleave(calls, repeats)
    ratio = _over(best["adapted"] / best["original"], 1.10)
    return f"| {batch} | {best['original'] / 64 * 1e3:.2f} | {ratio} | {'the same' if same else '**others**'} |"


class ByHand:
    """A decode loop as one would write it for this block alone, at fixed depth: its own cache, and no views."""

    def __init__(self, block: nn.Module, batch: int, capacity: int) -> None:
        self.layers = [layer for layer in block.children() if isinstance(layer, Layer)]
        layer = self.layers[0]
        head_dim = layer.out.in_features // layer.heads
        shape = (STEPS, len(self.layers), batch, layer.heads, capacity, head_dim)
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)

    def step(self, x: Tensor, at: int) -> Tensor:
        """The state of the new tokens `(batch, 1, dim)`, which stand at this place."""
        for i in range(STEPS):
            for n, layer in enumerate(self.layers):
                q, k, v = layer.split(x)
                self.k[i, n, :, :, at], self.v[i, n, :, :, at] = k[:, :, 0], v[:, :, 0]
                seen = self.k[i, n, :, :, : at + 1], self.v[i, n, :, :, : at + 1]
                x = layer.finish(x, F.scaled_dot_product_attention(q, *seen))
        return x


def by_hand(dim: int, layers: int, batch: int, repeats: int) -> str:
    """Cached decode at fixed depth against a loop written by hand for the same block."""
    block, context = stack(layers, dim, dim // 16 if dim < 256 else dim // 64), 64
    looped, hand = ad.RecurrentWrapper(block, STEPS).eval(), ByHand(block, batch, context + TOKENS)
    x, cache = torch.randn(batch, context + TOKENS, dim), ad.KVReuseCache(capacity=context + TOKENS)
    looped(x[:, :context], cache=cache)
    for at in range(context):
        hand.step(x[:, at : at + 1], at)

    def ours() -> Tensor:
        return torch.cat([looped(x[:, at : at + 1], cache=cache).hidden for at in range(context, context + TOKENS)], 1)

    def theirs() -> Tensor:
        return torch.cat([hand.step(x[:, at : at + 1], at) for at in range(context, context + TOKENS)], 1)

    torch.testing.assert_close(ours(), theirs())
    best = interleave({"ours": ours, "by hand": theirs}, 2 * repeats, {"ours": lambda: cache.crop(context)})
    ratio = _over(best["ours"] / best["by hand"], 1.1 if dim >= 256 else 1.5)
    more = (best["ours"] - best["by hand"]) / (TOKENS * STEPS * layers) * 1e6
    return f"| {layers} × {dim} | {batch} | {best['by hand'] / TOKENS * 1e3:.2f} | {ratio} | {more:.0f} |"


def _over(ratio: float, limit: float) -> str:
    return f"{ratio:.3f}{' **over**' if ratio > limit else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="parts whose name contains this: one, many, layouts, hand, generate")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text: list[str] = []

    def say(*lines: str) -> None:
        text.extend(lines)
        print(*lines, sep="\n", flush=True)

    say(f"A random Pythia-70M, looped whole, 4 iterations, update Interpolate, float32. {machine()}", "")
    with torch.inference_mode():
        model = adapt(pythia(), STEPS, update=ad.Interpolate())
        if args.only in "one":
            say(*one_row(model, args.repeats), "")
        if args.only in "many":
            say(
                "Many rows, each token's depths drawn anew. Limit of time / Σ t(n): 1.07. The last column is the bound "
                "(F0 + K·F) / (F0 + mean depth·F): tokens of different iterations run in one call would reach it.",
                "",
                "| rows in each iteration | live share | ms a token | time / Σ t(n) | faster than fixed depth | "
                "with embedding and head | bound |",
                "|" + "---|" * 7,
            )
            for numbers in NUMBERS:
                say(many_rows(model, numbers, args.repeats))
            say("")
        if args.only in "layouts":
            say(
                "Layouts, one row. Limit of compact's time at 512: 1.25; of what it holds beside the entries: 2 %.",
                "",
                "| context | entries | filled, MiB | compact, MiB | single, MiB | compact: beside the entries | "
                "compact / filled, time |",
                "|" + "---|" * 7,
            )
            for context in (128, 512, 2048):
                say(layouts(model, context, args.repeats))
            say("")
        if args.only in "hand":
            say(
                "Cached decode at fixed depth against a loop written by hand for the same block, with its own cache. "
                "Limit: 1.1, and 1.5 below 256 wide.",
                "",
                "| block | batch | by hand, ms a token | ours / by hand | µs more an attention call |",
                "|" + "---|" * 5,
            )
            for dim, layers in ((64, 2), (256, 4), (512, 6)):
                for batch in (1, 8):
                    say(by_hand(dim, layers, batch, args.repeats))
            say("")
    if args.only in "generate":
        say(
            "`generate`, greedy, 64 tokens after a prompt of 64: the original, and the model adapted with steps=1. "
            "Limit: 1.10.",
            "",
            "| batch | original, ms a token | adapted / original | tokens |",
            "|" + "---|" * 4,
        )
        for batch in (1, 8):
            say(generation(batch, args.repeats))
    if not args.only:
        write_section("decode", "\n".join(text))


if __name__ == "__main__":
    main()
