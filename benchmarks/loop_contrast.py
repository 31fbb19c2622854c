"""What contrast with an earlier iteration's logits gains, and whether a temperature gains as much.

`python -m benchmarks.loop_contrast` trains the demonstration's byte model so that every iteration answers, and beside
it a model for each depth alone. The weight and the earlier iteration are chosen on every other held-out window, and
judged on the rest.

Source: Loop Contrastive Decoding, arXiv 2609.24196.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor

import adadepth as ad
from examples.demo.model import AdaptiveLM, Shape
from examples.demo.text import Text, even_windows, file_text, stdlib_text
from examples.demo.train import Recipe, Training, nll
from examples.figures import spread

from ._measure import machine, write_section

DEPTHS = (2, 3, 4)
WEIGHTS = tuple(i / 8 for i in range(-4, 17))  # -0.5 to 2
TEMPERATURES = tuple(i / 20 for i in range(14, 31))  # 0.7 to 1.5


class Result(NamedTuple):
    """Nats per byte of one seed at one depth; with contrast by `weight`, away from the iteration `earlier`."""

    alone: float
    plain: float
    tempered: float
    contrast: float
    weight: float
    earlier: int


def contrasted(each: Tensor, depth: int, weight: float, earlier: int) -> Tensor:
    """The logits of iteration `depth`, moved away from those of `earlier`; `each`, `(…, steps, 256)`, has all."""
    last = each[..., depth - 1, :]
    return last + weight * (last - each[..., earlier - 1, :])


def loss(logits: Tensor, targets: Tensor) -> float:
    """Nats per byte."""
    return nll(logits, targets).mean().item()


def judged(each: Tensor, windows: Tensor, depth: int, alone: float) -> Result:
    """What is best on every other window, judged on the rest."""
    (fitted, answers), (unseen, others) = ((each[half::2], windows[half::2, 1:]) for half in (0, 1))
    choices = [(weight, earlier) for earlier in range(1, depth) for weight in WEIGHTS]
    weight, earlier = min(choices, key=lambda choice: loss(contrasted(fitted, depth, *choice), answers))
    last = unseen[..., depth - 1, :]
    temperature = min(TEMPERATURES, key=lambda t: loss(fitted[..., depth - 1, :] / t, answers))
    contrast = loss(contrasted(unseen, depth, weight, earlier), others)
    return Result(alone, loss(last, others), loss(last / temperature, others), contrast, weight, earlier)


def trained(recipe: Recipe, seed: int, step: Callable[[Training], object]) -> AdaptiveLM:
    """A model after all steps of training."""
    training = Training(Shape(), recipe, seed)
    while training.step < recipe.steps:
        step(training)
    return training.model.eval()


def one_seed(text: Text, recipe: Recipe, seed: int, count: int) -> dict[int, Result]:
    """By depth."""
    model = trained(recipe, seed, partial(Training.answering, data=text.train))
    alone = {depth: trained(recipe, seed, partial(Training.fixed, data=text.train, depth=depth)) for depth in DEPTHS}
    return results(model, alone, even_windows(text.held_out, count, recipe.window))


@torch.inference_mode()
def results(model: AdaptiveLM, alone: dict[int, AdaptiveLM], windows: Tensor) -> dict[int, Result]:
    """By depth, of a model whose every iteration answers, and of those that are trained at one depth alone."""
    each = torch.cat([model(rows[:, :-1], every=True).logits for rows in windows.split(32)])
    ids, targets = windows[1::2, :-1], windows[1::2, 1:]
    found = {}
    for depth, other in alone.items():
        logits = other(ids, min_depth=depth, max_depth=depth).logits
        found[depth] = judged(each, windows, depth, loss(logits, targets))
    return found


def head_in_iterations(window: int) -> float:
    """What one more pass through the head costs, in iterations."""
    model = AdaptiveLM(Shape())

    def flops(depth: int, heads: int) -> float:
        cost = ad.TokenFlops.measure(model.looped, model.shape.dim, once=[model.head] * heads)
        return cost.count(ad.depth_mask(torch.full((1, window), depth), model.shape.steps)).total

    return (flops(1, 2) - flops(1, 1)) / (flops(2, 1) - flops(1, 1))


def lines(found: Sequence[dict[int, Result]], head: float) -> Iterator[str]:
    """The table: means over seeds, and paired differences."""
    columns = ("iterations", "trained alone", "all answer", "temperature", "contrast", "gain", "gain at equal FLOPs")
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for depth in DEPTHS:
        of = [seed[depth] for seed in found]
        cells = [f"{mean(values):.4f}" for values in zip(*(result[:4] for result in of), strict=True)]
        cells.append(spread([result.plain - result.contrast for result in of], ".4f"))
        cells.append("")
        if depth < DEPTHS[-1]:
            same = [(1 - head) * seed[depth].plain + head * seed[depth + 1].plain for seed in found]
            cells[-1] = spread([line - result.contrast for result, line in zip(of, same, strict=True)], ".4f")
        yield f"| {depth} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", help="files to train on (default: Python's standard library)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800, help="of training")
    parser.add_argument("--windows", type=int, default=512, help="held out, half of them to choose the weight on")
    args = parser.parse_args()
    recipe = Recipe(args.steps)
    text = file_text(args.text, recipe.window) if args.text else stdlib_text(recipe.window)
    found = []
    for seed in args.seeds:
        found.append(one_seed(text, recipe, seed, args.windows))
        for depth, result in found[-1].items():
            print(f"seed {seed}, {depth} iterations: {result}", flush=True)
    head = head_in_iterations(recipe.window)
    about = f"Nats per byte, {text.source}; seeds {' '.join(map(str, args.seeds))}, {args.steps} steps. One more pass "
    about += f"through the head costs {head:.2f} iterations. {machine()}"
    table = "\n".join(lines(found, head))
    print(table)
    write_section("loop_contrast", f"{about}\n\n{table}")


if __name__ == "__main__":
    main()
