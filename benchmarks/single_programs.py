"""The same as `benchmarks.single`, for programs, whose tokens need each other's answers.

`python -m benchmarks.single_programs` trains the interpreter of `examples.programs` in several ways, and then reads
programs line by line, from caches of two layouts.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad
from adadepth.cache.kv_reuse import LayoutName
from examples.programs.evaluate import Measured
from examples.programs.model import HEADS, Interpreter, Layer
from examples.programs.plan import stream
from examples.programs.policies import GUIDED_EARLY
from examples.programs.programs import PROGRAMS
from examples.programs.task import Sample
from examples.programs.train import Losses, Sampled, at_depth, at_exits, batches, objective_of, stage

from . import single
from ._measure import machine, write_section

SEED = 0


@final
class Carrying(nn.Module):
    """The layer with the keys and values of the first iteration in all of them; they are a part of the state."""

    takes_view = True

    def __init__(self, layer: Layer, dim: int) -> None:
        super().__init__()
        self.layer, self.dim = layer, dim

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        """`(rows, length, 3 * dim)` to the same."""
        layer, (h, *carried) = self.layer, x.split(self.dim, -1)
        q, k, v = layer.qkv(layer.norm1(h)).chunk(3, -1)
        first = (view.iteration == 0).unsqueeze(-1)
        k, v = (torch.where(first, new, old) for new, old in zip((k, v), carried, strict=True))
        heads = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        h = h + layer.out(view.attend(*heads).transpose(1, 2).flatten(2))
        return torch.cat([h + layer.down(F.gelu(layer.up(layer.norm2(h)))), k, v], -1)


def carrying(model: Interpreter) -> None:
    """Let the model's loop carry the keys and values of its first iteration."""
    dim, layer = model.shape.dim, model.looped.block
    assert isinstance(layer, Layer)
    model.looped.block = Carrying(layer, dim)
    embed = model.embed
    model.embed = lambda ids: F.pad(embed(ids), (0, 2 * dim))  # type: ignore[method-assign]
    model.head = single.Changed(model.head, lambda h: h[..., :dim], lambda logits: logits)  # type: ignore[assignment]


def by_step(model: Interpreter, sample: Sample, step: int) -> Losses:
    """A depth for the whole batch, from 2 up, drawn anew at each step."""
    depth = single.by_step((len(sample.ids), PROGRAMS.lines), PROGRAMS.steps, step)
    return at_depth(lambda sample: depth)(model, sample, step)


def by_token(model: Interpreter, sample: Sample, step: int) -> Losses:
    """A depth for each token, at least what it needs."""
    drawn = torch.randint(2, PROGRAMS.steps + 1, sample.ids.shape, generator=torch.Generator().manual_seed(step))
    return at_depth(lambda sample: torch.maximum(drawn, sample.needed))(model, sample, step)


class Way(NamedTuple):
    """A way to train."""

    name: str
    objective: Sampled
    change: Callable[[Interpreter], None] = lambda model: None


WAYS = (
    Way("full depth", at_exits),
    Way("a depth for each step, 2 to 6", by_step),
    Way("a depth for each token, at least what it needs", by_token),
    Way("full depth; keys and values of the first iteration", at_exits, carrying),
)


@torch.inference_mode()
def decoded(model: Interpreter, sample: Sample, layout: LayoutName, depth: int | None) -> Measured:
    """Programs read line by line, at a depth or with the model's own exits."""
    cache = ad.KVReuseCache(layout)
    lines = [
        model.looped(x, min_depth=depth, max_depth=depth, cache=cache).hidden
        for x in model.embed(sample.ids).split(1, 1)
    ]
    logits = model.head(torch.cat(lines, 1))
    nats = F.cross_entropy(logits.transpose(1, 2), sample.values, reduction="none")
    return Measured(logits.argmax(-1) == sample.values, nats, cache.depth, sample.counted)


def trained(model: Interpreter, number: int, steps: int, objective: Sampled) -> Interpreter:
    """After a stage."""
    for _ in stage(model, number, steps, batches(PROGRAMS, stream(SEED, number - 1)), objective):
        pass
    return model.eval()


def models(steps_1: int, steps_2: int) -> Iterator[tuple[str, Interpreter, tuple[int | None, ...]]]:
    """Each model, trained, with its name and the depths at which it is read; None for its own exits."""
    done = []
    for way in WAYS:
        torch.manual_seed(SEED)
        model = Interpreter(PROGRAMS.sizes)
        way.change(model)
        trained(model, 1, steps_1, way.objective)
        done.append(model)
        yield way.name, model, (2, 4, 6)
    gates = done[0]  # goes on from full depth
    GUIDED_EARLY.attach(gates, GUIDED_EARLY.tau)
    yield GUIDED_EARLY.name, trained(gates, 2, steps_2, objective_of(GUIDED_EARLY, steps_2)), (None,)


def study(steps_1: int, steps_2: int, count: int) -> list[str]:
    """The table."""
    lines = ["| trained at | depth | filled, right | single, right | filled, nats | single, nats |", "|" + "---|" * 6]
    sample = PROGRAMS.draw(count, stream(SEED, 2))
    for name, model, depths in models(steps_1, steps_2):
        for depth in depths:
            filled, newest = (decoded(model, sample, layout, depth) for layout in single.LAYOUTS)
            right = f"{filled.accuracy:.2%} | {newest.accuracy:.2%}"
            lines.append(f"| {name} | {filled.mean_depth:.2f} | {right} | {filled.loss:.4f} | {newest.loss:.4f} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs=2, default=PROGRAMS.training, help="of both stages of training")
    parser.add_argument("--programs", type=int, default=512)
    args = parser.parse_args()
    first, second = args.steps
    lines = study(first, second, args.programs)
    write_section("single_programs", f"Programs read line by line, seed {SEED}. {machine()}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
