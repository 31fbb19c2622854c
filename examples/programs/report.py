"""What a reader sees: a bar for each seed while it trains, then the table, the verdicts and the counts."""

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rich.columns import Columns
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..figures import standard_error
from .policies import TRAINED
from .store import Row
from .study import row_names
from .task import Task
from .verdicts import SEEN, Rows, gateless, mixture_of, verdicts


class Seed(NamedTuple):
    """The rows of one seed by name, and seconds per 1,000 sequences of those that were timed."""

    rows: Rows
    seconds: dict[str, float]


Read = Callable[[Task, Seed, str], float | None]
COLUMNS: dict[str, tuple[Read, str]] = {
    "right": (lambda task, seed, name: seed.rows[name].accuracy, ".2%"),
    "nats": (lambda task, seed, name: seed.rows[name].loss, ".4f"),
    "depth": (lambda task, seed, name: seed.rows[name].depth, ".2f"),
    "kFLOPs": (lambda task, seed, name: seed.rows[name].flops / 1000, ".0f"),
    "mixed": (lambda task, seed, name: _mixed(task, seed, name), ".2%"),
    "rank": (lambda task, seed, name: seed.rows[name].rank, ".3f"),
    "s": (lambda task, seed, name: seed.seconds.get(name), ".2f"),
}


def _mixed(task: Task, seed: Seed, name: str) -> float | None:
    """Nothing for the models that are mixed."""
    if name in gateless(task):
        return None
    found = mixture_of(task, seed.rows, name)
    return None if found is None else found.accuracy


def legend(task: Task) -> str:
    """What the columns are."""
    return " ".join(
        f"""\
right, nats: accuracy and loss of the tokens that count. depth: mean iterations of {task.steps}. kFLOPs: thousand
FLOPs per token, gates and head included. mixed: accuracy of the best mixture of two models whose depth is fixed, for
all tokens or by kind and place, at the same FLOPs; which two is chosen on the judged sequences, in its favour. rank:
Spearman's correlation of needed and used depth. s: seconds per 1,000 sequences, packed, the best of several rounds in
turn. All models saw the same batches for the same number of steps; "longer": for the FLOPs of full depth. "prior":
criteria on a model whose every iteration is trained to answer, with thresholds fitted on other sequences to the depth
of the guided gates. "by kind and place": trained with as many iterations for each token as its kind and its place
allow it to need, up to a depth. ±: one standard error of the mean over seeds. A difference of less than {SEEN:g}
standard errors over seeds counts as not seen.
""".split()
    )


def progress_bar(console: Console) -> Progress:
    """Bars over the training steps of each seed, with the last loss and mean depth of what is trained on."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.percentage:.0f}% loss {task.fields[loss]:.3f} depth {task.fields[depth]:.2f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def shared(task: Task, results: Sequence[Seed]) -> list[str]:
    """The rows that all seeds have, in the order of the table."""
    return [name for name in row_names(task) if all(name in seed.rows for seed in results)]


def show(console: Console, task: Task, results: dict[int, Seed], note: str) -> None:
    """The table, verdicts and counts of `results`, by seed, and first a note."""
    console.print(note)
    seeds = list(results.values())
    spread = ": mean, standard error" if len(seeds) > 1 else ""
    out = _table(f"{task.name}, seeds {', '.join(map(str, results))}{spread}", ["", *COLUMNS])
    for line in lines(task, seeds):
        out.add_row(*line)
    console.print(out)
    console.print(legend(task), "")
    for verdict in verdicts(task, [seed.rows for seed in seeds]):
        console.print(verdict.sentence)
    console.print(right(task, seeds), "")
    console.print(Columns([matrix(rows) for rows in trained(task, seeds)], padding=(0, 4)))


def lines(task: Task, seeds: Sequence[Seed]) -> list[list[str]]:
    """The cells of the table."""
    return [
        [name, *(figure([read(task, seed, name) for seed in seeds], form) for read, form in COLUMNS.values())]
        for name in shared(task, seeds)
    ]


def numbers(task: Task, results: Mapping[int, Seed]) -> str:
    """All columns of the table for each seed, with all digits, as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["seed", "policy", *COLUMNS])
    for number, seed in results.items():
        names = (name for name in row_names(task) if name in seed.rows)
        writer.writerows([number, name, *(read(task, seed, name) for read, _ in COLUMNS.values())] for name in names)
    return out.getvalue()


def trained(task: Task, seeds: Sequence[Seed]) -> list[list[Row]]:
    """The rows of the policies that were trained in, one for each seed."""
    names = {policy.name for policy in TRAINED}
    return [[seed.rows[name] for seed in seeds] for name in shared(task, seeds) if name in names]


def figure(values: Sequence[float | None], form: str) -> str:
    """The mean and, below it, its standard error if there are several; a dash where there is no number."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return "–"
    mean = format(statistics.mean(there), form)
    return mean if len(there) == 1 else f"{mean}\n±{format(standard_error(there), form)}"


def right(task: Task, seeds: Sequence[Seed]) -> Table:
    """Accuracy by needed depth, mean over seeds."""
    out = _table("right, by iterations needed", ["", *map(str, range(1, task.steps + 1))])
    for name in shared(task, seeds):
        out.add_row(name, *(_mean([seed.rows[name].right[i] for seed in seeds]) for i in range(task.steps)))
    return out


def _mean(shares: Sequence[float | None]) -> str:
    there = [share for share in shares if share is not None]
    return f"{statistics.mean(there):.0%}" if there else "–"


def matrix(rows: Sequence[Row]) -> Table:
    """Of the tokens that need so many iterations, the share that used so many; over all seeds."""
    steps = range(len(rows[0].matrix))
    out = _table(f"{rows[0].name}: used", ["needed", *(str(used + 1) for used in steps)])
    counts = [[sum(row.matrix[n][u] for row in rows) for u in steps] for n in steps]
    for needed, line in enumerate(counts, 1):
        out.add_row(str(needed), *(_share(count / max(1, sum(line))) for count in line))
    return out


def _share(share: float) -> Text:
    blue = ",".join(str(int(full * share)) for full in (40, 110, 200))
    return Text(f"{share:.0%}", style=f"white on rgb({blue})") if share else Text()


def _table(title: str, columns: Sequence[str]) -> Table:
    out = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        out.add_column(column, justify="right" if i else "left", no_wrap=i > 0)
    return out
