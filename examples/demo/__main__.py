"""`python -m examples.demo`: train small adaptive models on real text, and say what came of it."""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from torch import Tensor

from . import html, known, words
from .evaluate import Evaluation, evaluate
from .exits import POLICIES
from .jobs import EXITS, TRUNK, Setup, Trained, load, load_known, train_all
from .model import Shape
from .report import Bars, show, show_known
from .text import BadInput, Text, even_windows, file_text, stdlib_text
from .train import Recipe

UPDATES = ("interpolate", "ponder")


def arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="text to train on, its last tenth held out (default: the standard library)",
    )
    parser.add_argument("--policy", choices=POLICIES, default=POLICIES[0], help="who decides the depth of a byte")
    parser.add_argument("--update", choices=UPDATES, default=UPDATES[0], help="what the next iteration is given")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the random exits")
    parser.add_argument("--steps", type=int, help="steps of training (default: 1000)")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="for models and the report")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    return parser.parse_args(args)


def run(args: argparse.Namespace, console: Console) -> None:
    """Train and evaluate as the command line says."""
    default, held_out, repeats, probed = (100, 2**13, 3, 128) if args.quick else (1000, 200 * 2**10, 10, 1024)
    programs = (5, 5) if args.quick else Recipe(1).programs
    recipe = Recipe(default if args.steps is None else args.steps, probed=probed, programs=programs)
    if recipe.steps < 3:
        raise BadInput(f"--steps expected at least 3, some for each stage, got {recipe.steps}")
    text = stdlib_text(recipe.window) if args.text is None else file_text(args.text, recipe.window)
    windows = even_windows(text.held_out, held_out // recipe.window, recipe.window)
    setup = Setup(Shape(update=args.update), recipe, args.seed, args.policy, _folder(args.out))
    said = list(words.about(setup, text, args.quick))
    for sentence in said:
        console.print(sentence, end="\n\n")
    fit(console, setup, text, windows)
    trained, result = load(setup), None
    for name, each in trained.items():
        if name != TRUNK and len(each.history) < recipe.steps:
            console.print(f"{name} stopped after {len(each.history)} of {recipe.steps} steps.")
    if EXITS in trained:
        fitted = even_windows(text.train, max(2, len(windows) // 4), recipe.window)
        result = judge(console, trained, windows, fitted, args.seed, repeats)
    else:
        console.print("Exits were not trained yet: there is nothing to evaluate.")
    done, path = load_known(setup), setup.folder / "report.html"
    show_known(console, done, known.held_out(setup.seed).needed)
    html.write(path, said, html.Results(trained, result, done), windows, setup.seed)
    if args.quick:
        console.print(f"\n{words.QUICK}")
    console.print(f"\nReport: {path}", soft_wrap=True)


def fit(console: Console, setup: Setup, text: Text, windows: Tensor) -> None:
    """Train everything with progress bars; an interrupt ends it early."""
    bars = Bars(console, setup.recipe)
    workers = max(1, min(setup.shape.steps, len(os.sched_getaffinity(0))))
    console.print(f"Training in {workers} processes. Each takes some seconds to start; the first stage comes first.")
    try:
        with bars.progress:
            for name, now in train_all(setup, text, windows, workers):
                bars.show(name, now)
    except KeyboardInterrupt:
        console.print("Stopped early; this is what there is.")


def judge(
    console: Console, trained: Mapping[str, Trained], windows: Tensor, fitted: Tensor, seed: int, repeats: int
) -> Evaluation | None:
    """Evaluate and show it; None if that was interrupted."""
    start = time.perf_counter()
    console.print("Evaluating all models and exits on held-out text. This takes up to a minute or two.")
    try:
        with console.status("Evaluating"):
            result = evaluate(trained, windows, fitted, seed, repeats)
    except KeyboardInterrupt:
        console.print("The evaluation was stopped.")
        return None
    console.print(f"Evaluated on {windows[:, 1:].numel():,} held-out bytes in {time.perf_counter() - start:.0f} s.\n")
    show(console, result)
    return result


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot write to {path}: {error.strerror}") from None
    for old in path.glob("*.pt"):
        old.unlink()
    return path


def main(args: Sequence[str] | None = None) -> None:
    """The command line; what cannot be done is refused in one line."""
    parsed = arguments(args)
    try:
        run(parsed, Console(markup=False, emoji=False))  # file names may look like either
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("Stopped.") from None


if __name__ == "__main__":
    main()
