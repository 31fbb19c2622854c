"""The work that benchmarks/peers.py times: a training step, and decoding behind a prompt, at depths from outside."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

from ._measure import interleave

LAYERS, HEADS, STEPS, VOCABULARY, MEAN = 2, 4, 4, 256, 2.0
Loop = Callable[[Tensor, Tensor], Tensor]  # of states and depths


class Sizes(NamedTuple):
    """Training on `batch × length` tokens; decoding of `new` tokens behind a prompt."""

    dim: int = 256
    batch: int = 8
    length: int = 128
    prompt: int = 64
    new: int = 32


SMALL = Sizes(16, 2, 16, 6, 10)  # of what is compared in float64


def inputs(batch: int, length: int, prompt: int = 0) -> tuple[Tensor, Tensor]:
    """Ids, and depths whose mean is `MEAN`; a prompt runs all `STEPS`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (batch, length), generator=generator)
    depth = ad.uniform_depths((batch, length), STEPS, MEAN, generator)
    depth[:, :prompt] = STEPS
    return ids, depth


def given(block: nn.Module, skip: bool = True) -> Loop:
    """A loop of adadepth at depths from outside."""
    wrapper = ad.RecurrentWrapper(block, STEPS, skip=skip)
    return lambda x, depth: wrapper(x, min_depth=depth, max_depth=depth).hidden


def train(
    embed: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], loop: Loop, parameters: list[nn.Parameter]
) -> Callable[[Tensor, Tensor], None]:
    """A training step of ids and depths: forward, cross-entropy, backward."""

    def step(ids: Tensor, depth: Tensor) -> None:
        scores = head(loop(embed(ids), depth))
        loss = F.cross_entropy(scores.flatten(0, 1), ids.roll(-1, 1).flatten())
        torch.autograd.grad(loss, parameters, allow_unused=True)

    return step


class Decoder(NamedTuple):
    """`call` takes the next tokens and their depths, and gives what it computes; `rewind` goes back to the prompt."""

    call: Loop
    rewind: Callable[[], object]

    def prompt(self, x: Tensor, depth: Tensor, length: int) -> Tensor:
        return self.call(x[:, :length], depth[:, :length])

    def rest(self, x: Tensor, depth: Tensor, length: int) -> list[Tensor]:
        return [self.call(x[:, t : t + 1], depth[:, t : t + 1]) for t in range(length, x.shape[1])]

    def whole(self, x: Tensor, depth: Tensor, length: int) -> Tensor:
        return torch.cat([self.prompt(x, depth, length), *self.rest(x, depth, length)], 1)


def cached(block: nn.Module, prompt: int) -> Decoder:
    """adadepth's decoder of states."""
    wrapper, cache = ad.RecurrentWrapper(block, STEPS).eval(), ad.KVReuseCache()

    def call(x: Tensor, depth: Tensor) -> Tensor:
        return wrapper(x, cache=cache, min_depth=depth, max_depth=depth).hidden

    return Decoder(call, lambda: cache.crop(prompt))


def error(got: Tensor, want: Tensor) -> str:
    """The largest difference, in one digit."""
    return f"{(got - want).abs().max().item():.0e}"


def table(
    block: str,
    calls: Mapping[str, Callable[[], object]],
    errors: Mapping[str, str],
    repeats: int,
    before: Mapping[str, Callable[[], object]] | None = None,
    tokens: int = 1,
) -> list[str]:
    """A row for each call: milliseconds for each of so many tokens, and the ratio to the first call."""
    best = interleave(calls, repeats, before)
    first = next(iter(best.values()))
    rows = []
    for name, seconds in best.items():
        rows.append(f"| {block} | {name} | {seconds / tokens * 1e3:.2f} | {seconds / first:.2f} | {errors[name]} |")
        print(rows[-1], flush=True)
    return rows


def decode_table(
    block: str,
    decoders: Mapping[str, Decoder],
    given: tuple[Tensor, Tensor, Sizes],
    errors: Mapping[str, str],
    repeats: int,
) -> list[str]:
    """A row for each decoder, timed behind the prompt."""
    x, depth, sizes = given
    for decoder in decoders.values():
        decoder.prompt(x, depth, sizes.prompt)
    calls = {name: lambda way=way: way.rest(x, depth, sizes.prompt) for name, way in decoders.items()}
    before = {name: way.rewind for name, way in decoders.items()}
    return table(block, calls, errors, repeats, before, sizes.new)
