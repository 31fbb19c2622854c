"""What contrast with an earlier iteration's logits gains, and whether a temperature gains as much.

`python -m benchmarks.loop_contrast` trains the demonstration's byte model so that every iteration answers, and beside
it a model for each depth alone. The weight and the earlier iteration are chosen on every other held-out window, and
judged on the rest.

Source: Loop Contrastive Decoding, arXiv 2609.24196.
"""

import argparse
from collections.abc import Iterator, Sequence
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
    loss: float
    tempered: float
    contrast: float
    weight: float
    earlier: int


def contrasted(each: Tensor, depth: int, earlier: int, weight: float) -> Tensor:
    """The logits of iteration `depth`, moved away from those of `earlier`; `each`, `(…, steps, 256)`, has all."""
    last = each[..., depth - 1, :]
    return last + weight * (last - each[..., earlier - 1, :])


@torch.inference_mode()
def logits(model: AdaptiveLM, windows: Tensor) -> Tensor:
    """Of every iteration, `(n, window, steps, 256)`."""
    return torch.cat([model(rows[:, :-1], every=True).logits for rows in windows.split(32)])


def judged(each: Tensor, windows: Tensor, depth: int, alone: float) -> Result:
    """What is best on every other window, judged on the rest."""
    to_fit, to_judge = ((each[half::2], windows[half::2, 1:]) for half in (0, 1))

    def loss(of: tuple[Tensor, Tensor], earlier: int, weight: float, temperature: float = 1.0) -> float:
        return nll(contrasted(of[0], depth, earlier, weight) / temperature, of[1]).mean().item()

    weight, earlier = min(
        ((w, e) for e in range(1, depth) for w in WEIGHTS), key=lambda found: loss(to_fit, found[1], found[0])
    )
    temperature = min(TEMPERATURES, key=lambda found: loss(to_fit, 1, 0.0, found))
    plain, tempered = loss(to_judge, 1, 0.0), loss(to_judge, 1, 0.0, temperature)
    return Result(alone, plain, tempered, loss(to_judge, earlier, weight), weight, earlier)


def trained_alone(recipe: Recipe, data: Tensor, seed: int, depth: int) -> AdaptiveLM:
    """At this depth."""
    training = Training(Shape(), recipe, seed)
    while training.step < recipe.steps:
        training.fixed(data, depth)
    return training.model.eval()


def trained_to_answer(recipe: Recipe, data: Tensor, seed: int) -> AdaptiveLM:
    """After every iteration from the second on."""
    training = Training(Shape(), recipe, seed)
    while training.step < recipe.steps:
        training.answering(data)
    return training.model.eval()


@torch.inference_mode()
def one_seed(text: Text, recipe: Recipe, seed: int, count: int) -> dict[int, Result]:
    """By depth."""
    windows = even_windows(text.held_out, count, recipe.window)
    with torch.inference_mode(False):
        alone = {depth: trained_alone(recipe, text.train, seed, depth) for depth in DEPTHS}
        model = trained_to_answer(recipe, text.train, seed)
    each, results = logits(model, windows), {}
    for depth in DEPTHS:
        rows = windows[1::2]
        loss = nll(alone[depth](rows[:, :-1], min_depth=depth, max_depth=depth).logits, rows[:, 1:]).mean().item()
        results[depth] = judged(each, windows, depth, loss)
    return results


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
        cells.append(spread([result.loss - result.contrast for result in of], ".4f"))
        cells.append("")
        if depth < DEPTHS[-1]:
            same = [(1 - head) * seed[depth].loss + head * seed[depth + 1].loss for seed in found]
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
