"""`python -m examples.programs.mixture`: one small model for prose and for programs; who is given the depth?

Bytes of text and lines of programs are ids of one vocabulary; a step of training sees both, and its loss is the
mean of the two. The same gates serve both: a token goes on while what the rest of the loop is still worth to it
exceeds one price.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ..demo.text import BadInput, Text, even_windows, file_text, random_windows, stdlib_text
from .evaluate import between, cut, measure
from .model import Interpreter
from .plan import stream
from .policies import GUIDED
from .programs import PROGRAMS
from .ranks import rank_correlation
from .report import figure
from .task import Sample, Sizes
from .train import BATCH, RATES, Losses, Objective, Progress, at_exits, objective_of, optimise

VOCABULARY, LINES, MODULUS = PROGRAMS.sizes
STEPS = PROGRAMS.steps

BYTES = 256
WINDOW = 4 * LINES  # bytes of prose in a row
WINDOWS = BATCH // 8  # in a step: half as many bytes as lines
PRICES = (0.02, 0.05, 0.1, 0.2, 0.4)  # in nats


class Plan(NamedTuple):
    """Training steps of both stages, and the programs and windows on which the model is judged."""

    steps_1: int = 5000  # after 2,500 programs beside prose were not yet learned
    steps_2: int = 2500
    programs: int = 2048
    windows: int = 1024

    @property
    def total(self) -> int:
        """Training steps of one seed."""
        return self.steps_1 + self.steps_2


QUICK = Plan(steps_1=4, steps_2=4, programs=32, windows=8)


class Prose(NamedTuple):
    """Windows of text as the model's ids, and the bytes that follow, as its answers; both `(windows, 96)` int64."""

    ids: Tensor
    values: Tensor


class Row(NamedTuple):
    """One seed's model at one price.

    Of programs: the share of lines that are right, the same at full depth, mean depth, and Spearman's correlation of
    needed and used depth. Of prose: nats per byte, the same at full depth and at the fixed depths around the mean
    depth, mixed; and mean depth.
    """

    right: float
    right_full: float
    depth: float
    rank: float
    nats: float
    nats_full: float
    nats_fixed: float
    nats_depth: float


Columns = dict[str, tuple[Callable[[Row], float], str]]
OF_PROGRAMS: Columns = {
    "right": (lambda row: row.right, ".2%"),
    "in full": (lambda row: row.right_full, ".2%"),
    "depth": (lambda row: row.depth, ".2f"),
    "rank": (lambda row: row.rank, ".3f"),
    "saved": (lambda row: 1 - row.depth / STEPS, ".1%"),
}
OF_PROSE: Columns = {
    "nats per byte": (lambda row: row.nats, ".3f"),
    "in full": (lambda row: row.nats_full, ".3f"),
    "fixed": (lambda row: row.nats_fixed, ".3f"),
    "depth": (lambda row: row.nats_depth, ".2f"),
    "saved": (lambda row: 1 - row.nats_depth / STEPS, ".1%"),
}


def mixed() -> Interpreter:
    """A model of both: ids of programs come before bytes, and so do the answers."""
    return Interpreter(Sizes(VOCABULARY + BYTES, WINDOW, MODULUS + BYTES))


def prose_of(windows: Tensor) -> Prose:
    """What the model reads of `(windows, 97)` bytes, and what it is to say."""
    return Prose(windows[:, :-1] + VOCABULARY, windows[:, 1:] + MODULUS)


def on_both(objective: Objective, model: Interpreter, data: Tensor, generator: torch.Generator, step: int) -> Losses:
    """The mean of the objective on programs and on windows of the text; what it says of exits is the programs'."""
    prose = prose_of(random_windows(data, WINDOWS, WINDOW, generator))
    of_programs, of_prose = objective(model, PROGRAMS.draw(BATCH, generator), step), objective(model, prose, step)
    return of_programs._replace(total=(of_programs.total + of_prose.total) / 2)


def train(model: Interpreter, data: Tensor, plan: Plan, seed: int) -> Iterator[Progress]:
    """Both stages, one step for each item that is asked for."""
    first, second = stream(seed, 0), stream(seed, 1)
    yield from optimise(model, plan.steps_1, RATES[1], lambda step: on_both(at_exits, model, data, first, step))
    GUIDED.attach(model, GUIDED.tau)
    objective = objective_of(GUIDED, plan.steps_2)
    yield from optimise(model, plan.steps_2, RATES[2], lambda step: on_both(objective, model, data, second, step))


def judge(model: Interpreter, programs: Sample, prose: Prose) -> dict[float, Row]:
    """The model at each price; one model serves them all."""
    full, rows = cut(model, programs)[-1].accuracy, {}
    at_depth = [nats(model, prose, depth)[0] for depth in range(1, STEPS + 1)]
    for price in PRICES:
        model.looped.rule = GUIDED.rule(price)
        exits, (loss, depth) = measure(model, programs), nats(model, prose)
        rank, line = rank_correlation(programs.needed, exits.depth), between(at_depth, depth)
        rows[price] = Row(exits.accuracy, full, exits.mean_depth, rank, loss, at_depth[-1], line, depth)
    return rows


@torch.inference_mode()
def nats(model: Interpreter, prose: Prose, depth: int | None = None) -> tuple[float, float]:
    """Nats per byte and mean depth, by the model's own exits or at a fixed depth."""
    outs = [model(ids, depth=depth) for ids in prose.ids.split(128)]
    logits, depths = torch.cat([out.logits for out in outs]), torch.cat([out.trace.depth for out in outs])
    return F.cross_entropy(logits.flatten(0, 1), prose.values.flatten()).item(), depths.double().mean().item()


def study(seed: int, plan: Plan, text: Text, console: Console) -> dict[float, Row]:
    """Train and judge one seed's model."""
    torch.manual_seed(seed)
    model = mixed()
    for _ in track(train(model, text.train, plan, seed), f"seed {seed}", plan.total, console=console):
        pass
    programs = PROGRAMS.draw(plan.programs, stream(seed, 2))
    return judge(model.eval(), programs, prose_of(even_windows(text.held_out, plan.windows, WINDOW)))


def show(console: Console, seeds: str, results: Sequence[dict[float, Row]]) -> None:
    """A line for each price, in a table of programs and one of prose: means over seeds, and standard errors."""
    for name, columns in (("programs", OF_PROGRAMS), ("prose", OF_PROSE)):
        out = Table(title=f"{seeds}: {name}", title_justify="left")
        for column in ("price", *columns):
            out.add_column(column, justify="right", no_wrap=True)
        for price in PRICES:
            rows = [result[price] for result in results]
            out.add_row(f"{price:g}", *(figure([read(row) for row in rows], form) for read, form in columns.values()))
        console.print(out)


def arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.programs.mixture", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default: 0 1 2)")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="in place of the standard library")
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything, to see that it works")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> None:
    """The command line; what cannot be done is refused in one line."""
    parsed, console = arguments(args), Console()
    try:
        text = stdlib_text(WINDOW) if parsed.text is None else file_text(parsed.text, WINDOW)
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None
    console.print(f"Prose: {text.source}.")
    torch.set_num_threads(1)
    results = []
    for seed in parsed.seeds:
        results.append(study(seed, QUICK if parsed.quick else Plan(), text, console))
        show(console, f"seed {seed}", results[-1:])
    if len(results) > 1:
        show(console, f"seeds {' '.join(map(str, parsed.seeds))}", results)


if __name__ == "__main__":
    main()
