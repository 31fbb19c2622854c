"""What the approximate layout costs in loss, and which training makes it cheap.

`python -m benchmarks.single` trains the demonstration's byte model on the standard library in several ways, and then
reads the second half of each held-out window byte by byte, from caches of two layouts.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad
from adadepth.cache.kv_reuse import LayoutName
from examples.demo.exits import policy
from examples.demo.model import AdaptiveLM, Layer, Shape, Stack, rotate
from examples.demo.text import Text, even_windows, stdlib_text
from examples.demo.train import Recipe, Training, nll

from ._measure import machine, write_section

DEPTHS = (2, 3, 4)
LAYOUTS: tuple[LayoutName, ...] = ("filled", "single")


@final
class Carrying(nn.Module):
    """The stack with the keys and values of the first iteration in all of them; they are a part of the state."""

    takes_view = True

    def __init__(self, stack: Stack, dim: int) -> None:
        super().__init__()
        self.stack, self.dim = stack, dim

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        """`(rows, length, dim + 2 * layers * dim)` to the same."""
        h, *carried = x.split(self.dim, -1)
        angle = (view.positions.unsqueeze(-1) * self.stack.speed).unsqueeze(2)
        turn, first = torch.polar(torch.ones_like(angle), angle), (view.iteration == 0).unsqueeze(-1)
        for number, layer in enumerate(self.stack.layers):
            assert isinstance(layer, Layer)
            q, k, v = layer.qkv(layer.norm1(h)).chunk(3, -1)
            k, v = (torch.where(first, t, carried[2 * number + i]) for i, t in enumerate((k, v)))
            carried[2 * number : 2 * number + 2] = k, v
            q, k, v = (t.unflatten(-1, (layer.heads, -1)) for t in (q, k, v))
            attended = view.attend(*(t.transpose(1, 2) for t in (rotate(q, turn), rotate(k, turn), v)))
            h = h + layer.out(attended.transpose(1, 2).flatten(2))
            h = h + layer.down(F.gelu(layer.up(layer.norm2(h))))
        return torch.cat([h, *carried], -1)


@final
class Changed(nn.Module):
    """A module, and what is done to what it takes and to what it gives."""

    def __init__(self, inner: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def forward(self, x: Tensor) -> Tensor:
        """`after(inner(before(x)))`."""
        return self.after(self.inner(self.before(x)))


def carrying(model: AdaptiveLM) -> None:
    """Let the model's loop carry the keys and values of its first iteration."""
    dim, more = model.shape.dim, 2 * model.shape.layers * model.shape.dim
    stack = model.looped.block
    assert isinstance(stack, Stack)
    model.looped.block = Carrying(stack, dim)
    model.embedding = Changed(model.embedding, lambda ids: ids, lambda x: F.pad(x, (0, more)))  # type: ignore[assignment]
    model.norm = Changed(model.norm, lambda h: h[..., :dim], lambda h: h)  # type: ignore[assignment]


class Way(NamedTuple):
    """A way to train: what is done to the model first, and how deep a batch `(rows, window)` goes at a step."""

    name: str
    change: Callable[[AdaptiveLM], None]
    depth: Callable[[tuple[int, int], int, int], int | Tensor]


def everyone(shape: tuple[int, int], steps: int, at: int) -> int:
    """Full depth."""
    del shape, at
    return steps


def by_step(shape: tuple[int, int], steps: int, at: int) -> int:
    """A depth for the whole batch, drawn anew at each step."""
    del shape
    return ad.random_depth(torch.tensor([0.0] + [1.0] * (steps - 1)), at)


def by_token(shape: tuple[int, int], steps: int, at: int) -> Tensor:
    """A depth for each token."""
    return torch.randint(2, steps + 1, shape, generator=torch.Generator().manual_seed(at))


WAYS = (
    Way("full depth", lambda model: None, everyone),
    Way("a depth for each step, 2 to 4", lambda model: None, by_step),
    Way("a depth for each token, 2 to 4", lambda model: None, by_token),
    Way("a depth for each step; keys and values of the first iteration", carrying, by_step),
)


@torch.no_grad()
def decoded(model: AdaptiveLM, windows: Tensor, layout: LayoutName, least: int, most: int) -> tuple[float, float]:
    """Nats per byte and mean depth over the second half of `windows (batch, length + 1)`, read byte by byte."""
    ids, prompt = windows[:, :-1].long(), windows.shape[1] // 2
    cache = ad.KVReuseCache(layout)
    pieces = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
    run = partial(model.looped, min_depth=least, max_depth=most, cache=cache)
    hidden = torch.cat([run(model.embedding(x)).hidden for x in pieces], 1)
    losses = nll(model.answer(hidden), windows[:, 1:].long())
    return losses[:, prompt:].mean().item(), cache.depth[:, prompt:].double().mean().item()


def trained(way: Way, recipe: Recipe, data: Tensor) -> AdaptiveLM:
    """Without exits of its own."""
    training = Training(Shape(), recipe, seed=0)
    way.change(training.model)
    shape, steps = (recipe.batch, recipe.window), training.model.shape.steps
    while training.step < recipe.steps:
        training.fixed(data, way.depth(shape, steps, training.step))
    return training.model.eval()


def with_gates(recipe: Recipe, data: Tensor) -> AdaptiveLM:
    """In both stages, the second with survival gates."""
    training, exits = Training(Shape(), recipe, seed=0), policy("survival")
    while training.step < recipe.first:
        training.fixed(data, training.model.shape.steps)
    training.begin(exits, data)
    while training.step < recipe.steps:
        training.adaptive(data, exits)
    return training.model.eval()


def rows(name: str, model: AdaptiveLM, windows: Tensor, depths: dict[str, tuple[int, int]]) -> list[str]:
    """A line of the table for each pair of depths, the least and the most."""
    lines = []
    for depth, (least, most) in depths.items():
        (filled, mean), (single, _) = (decoded(model, windows, layout, least, most) for layout in LAYOUTS)
        lines.append(f"| {name} | {depth or f'{mean:.2f}'} | {filled:.4f} | {single:.4f} | {single - filled:+.4f} |")
        print(lines[-1], flush=True)
    return lines


def study(text: Text, recipe: Recipe, count: int) -> list[str]:
    """The table."""
    windows = even_windows(text.held_out, count, recipe.window)
    lines = ["| trained at | depth | filled | single | difference |", "|" + "---|" * 5]
    forced = {str(depth): (depth, depth) for depth in DEPTHS}
    for way in WAYS:
        lines += rows(way.name, trained(way, recipe, text.train), windows, forced)
    return lines + rows("survival gates", with_gates(recipe, text.train), windows, {"": (2, 4)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--windows", type=int, default=256)
    args = parser.parse_args()
    recipe = Recipe(args.steps)
    lines = study(stdlib_text(recipe.window), recipe, args.windows)
    write_section("single", f"Nats per byte, decoded byte by byte. {machine()}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
