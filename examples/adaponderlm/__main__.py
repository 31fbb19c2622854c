"""`python -m examples.adaponderlm`: train a small adaptive model on real text, and say what came of it."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from .evaluate import evaluate
from .model import AdaptiveLM, Shape
from .report import STAGES, progress_bar, show
from .text import BadInput, Text, even_windows, file_text, stdlib_text
from .train import Recipe, train

THREADS = 4  # more only wait for each other on so small a model


def arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.adaponderlm", description=__doc__)
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="text to train on, its last tenth held out (default: the standard library)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the random exits")
    parser.add_argument("--steps", type=int, help="steps of training (default: 1200, two minutes on two cores)")
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything, to see that it works")
    return parser.parse_args(args)


def run(args: argparse.Namespace, console: Console) -> None:
    """Train and evaluate as the command line says."""
    default, held_out, repeats = (20, 2**12, 1) if args.quick else (1200, 2**17, 10)
    recipe = Recipe(default if args.steps is None else args.steps)
    if recipe.steps < 2:
        raise BadInput(f"--steps expected at least 2, one for each stage, got {recipe.steps}")
    text = stdlib_text(recipe.window) if args.text is None else file_text(args.text, recipe.window)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = AdaptiveLM(Shape())
    introduce(console, model, text)
    fit(console, model, text, recipe, generator)
    start = time.perf_counter()
    windows = even_windows(text.held_out, held_out // recipe.window, recipe.window)
    result = evaluate(model, windows, generator, repeats)
    console.print(f"Evaluated on {windows[:, 1:].numel():,} held-out bytes in {time.perf_counter() - start:.0f} s.\n")
    show(console, result)


def introduce(console: Console, model: AdaptiveLM, text: Text) -> None:
    """What is trained on what."""
    parameters, shape = sum(p.numel() for p in model.parameters()), model.shape
    size = f"{parameters:,} parameters; {shape.layers} layer, {shape.dim} wide, is applied to each byte"
    console.print(f"Text: {text.source}: {len(text.train):,} bytes to train on, {len(text.held_out):,} held out.")
    console.print(f"Model: {size} up to {shape.steps} times.")


def fit(console: Console, model: AdaptiveLM, text: Text, recipe: Recipe, generator: torch.Generator) -> None:
    """Train with a progress bar; an interrupt ends it early."""
    bar = progress_bar(console)
    task = bar.add_task(STAGES[1], total=recipe.steps, loss=float("nan"), depth=float("nan"))
    done, loss, depth = 0, 0.0, 0.0
    try:
        with bar:
            for done, now in enumerate(train(model, text.train, recipe, generator), 1):
                keep = 0.95 if done > 1 else 0.0
                loss, depth = keep * loss + (1 - keep) * now.loss, keep * depth + (1 - keep) * now.depth
                bar.update(task, completed=done, description=STAGES[now.stage], loss=loss, depth=depth)
    except KeyboardInterrupt:
        console.print(f"Stopped after {done} of {recipe.steps} steps; this is what there is.")
    if model.looped.gate is None:
        console.print("Exits were not trained yet: every byte goes to full depth.")


def main(args: Sequence[str] | None = None) -> None:
    """The command line; what cannot be done is refused in one line."""
    parsed = arguments(args)
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    try:
        run(parsed, Console(markup=False, emoji=False))  # file names may look like either
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("Stopped.") from None


if __name__ == "__main__":
    main()
