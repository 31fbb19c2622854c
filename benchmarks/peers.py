"""The same work done by adadepth, by loops written by hand and by other packages, side by side in one run.

`python -m benchmarks.peers` times a training step and decoding with a cache. Depths are given from outside: 1 to 4
iterations, 2 in the mean. Ratios compare what loops one block; adadepth's packed execution is 1. The error is
the largest difference from the definition in float64, on a small input. The other packages are in
benchmarks/requirements.txt; without one, its rows are left out.
"""

import argparse
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor, nn

from . import _by_hand, _packages
from ._blocks import Layer, stack
from ._measure import machine, write_section
from ._work import (
    HEADS,
    LAYERS,
    SMALL,
    STEPS,
    VOCABULARY,
    Decoder,
    Loop,
    Sizes,
    cached,
    decode_table,
    error,
    given,
    inputs,
    table,
    train,
)

PLAIN = f"{LAYERS} plain layers"
INTRODUCTION = """\
What the rows and columns mean: docs/peers.md, which shows these tables. Depths from outside: 1 to 4 iterations, 2 in
the mean."""
# docs/peers.md shows what stands between these.
START, END = "<!-- --8<-- [start:peers] -->", "<!-- --8<-- [end:peers] -->"


def own(dim: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Layer]]:
    block = stack(LAYERS, dim, HEADS).to(dtype)
    return block, [cast(Layer, layer) for layer in block.children()]


def loops(block: nn.Module, layers: list[Layer]) -> dict[str, Loop]:
    """Four ways to loop a block."""
    return {
        "adadepth, packed": given(block),
        "adadepth, dense": given(block, skip=False),
        "by hand, all tokens": lambda x, depth: _by_hand.by_where(layers, x, depth),
        "by hand, `index_select`": lambda x, depth: _by_hand.by_gather(layers, x, depth),
    }


def states(batch: int, length: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(1), dtype=dtype)


def training_errors() -> dict[str, str]:
    block, layers = own(SMALL.dim, torch.float64)
    x, depth = states(SMALL.batch, SMALL.length, SMALL.dim, torch.float64), inputs(SMALL.batch, SMALL.length)[1]
    with torch.no_grad():
        want = _by_hand.definition(layers, x, depth)
        return {name: error(loop(x, depth), want) for name, loop in loops(block, layers).items()}


def plain_training(sizes: Sizes, repeats: int) -> list[str]:
    """A training step of loops around our block."""
    block, layers = own(sizes.dim)
    embed, head = nn.Embedding(VOCABULARY, sizes.dim), nn.Linear(sizes.dim, VOCABULARY)
    parameters = [p for part in (block, embed, head) for p in part.parameters()]
    ids, depth = inputs(sizes.batch, sizes.length)
    steps = {name: train(embed, head, loop, parameters) for name, loop in loops(block, layers).items()}
    calls = {name: lambda step=step: step(ids, depth) for name, step in steps.items()}
    return table(PLAIN, calls, training_errors(), repeats)


def decoders(sizes: Sizes, batch: int, dtype: torch.dtype) -> tuple[list[Layer], Tensor, Tensor, dict[str, Decoder]]:
    """The layers, states, depths, and two decoders of our block."""
    block, layers = own(sizes.dim, dtype)
    depth = inputs(batch, sizes.prompt + sizes.new, sizes.prompt)[1]
    x = states(batch, depth.shape[1], sizes.dim, dtype)
    hand = _by_hand.Decoder(layers, STEPS, batch, x.shape[1], x)
    by_hand = Decoder(hand, lambda: setattr(hand, "at", sizes.prompt))
    return layers, x, depth, {"adadepth, packed": cached(block, sizes.prompt), "by hand, all rows": by_hand}


def plain_decode(sizes: Sizes, batch: int, repeats: int) -> list[str]:
    """Decoding with our block: adadepth's cache, and one by hand whose rows all wait for the deepest."""
    with torch.inference_mode():
        layers, x, depth, ways = decoders(SMALL, batch, torch.float64)
        want = _by_hand.definition(layers, x, depth)
        errors = {name: error(way.whole(x, depth, SMALL.prompt), want) for name, way in ways.items()}
        _, x, depth, ways = decoders(sizes, batch, torch.float32)
        return decode_table(f"{PLAIN}, {batch} × 1", ways, (x, depth, sizes), errors, repeats)


def measure(sizes: Sizes, repeats: int) -> str:
    """Both tables."""
    training = plain_training(sizes, repeats)
    decode = [row for batch in (1, sizes.batch) for row in plain_decode(sizes, batch, repeats)]
    if find_spec("x_transformers"):
        training += _packages.looped_training(sizes, repeats)
        decode += _packages.looped_decode(sizes, repeats)
    if find_spec("ponder_transformer"):
        training += _packages.ponder_training(sizes, repeats)
    head = "| block | loop | ms | / adadepth | error |\n|---|---|---|---|---|"
    shape = f"{sizes.batch} × {sizes.length} tokens of width {sizes.dim}"
    first = "\n".join([f"A training step, {shape}:\n", head, *training])
    second = "\n".join([f"Decoding, ms for a token of each row, behind a prompt of {sizes.prompt}:\n", head, *decode])
    return f"{first}\n\n{second}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--note", default="", help="a sentence for the reader, such as: The machine was busy.")
    args = parser.parse_args()
    print(machine(), flush=True)
    tables = measure(Sizes(), args.repeats)
    taken = f"{machine()}. {args.note}".strip()
    write_section("peers", f"{INTRODUCTION}\n\n{START}\n{taken}\n\n{tables}\n{END}")


if __name__ == "__main__":
    main()
