"""What a reader sees: a bar for each seed while it trains, then the tables."""

import math
import statistics
from collections.abc import Callable, Sequence

from rich.columns import Columns
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .model import STEPS
from .policies import TRAINED
from .study import EQUAL, Row

LEGEND = " ".join(
    f"""\
right: lines predicted right. in full: by the same weights without exits. depth: mean iterations of {STEPS}. rank:
Spearman's correlation between needed and used depth. saved: iterations saved at equal accuracy, which is at the highest
threshold whose accuracy on other programs is within {100 * EQUAL:g} points of full depth; 0 where there is none. fixed,
random: right by the same weights at fixed depths and with random exits, at the same mean depth. The first four were
trained with exits at the threshold they are judged at. The others judge the weights of stage 1, which know no exits,
at the mean depth of the survival gates, to which their thresholds are fitted on other programs; in the last line every
token leaves at the depth it needs.
""".split()
)

COLUMNS: dict[str, tuple[Callable[[Row], float], str]] = {
    "right": (lambda row: row.accuracy, ".2%"),
    "in full": (lambda row: row.full, ".2%"),
    "depth": (lambda row: row.mean_depth, ".2f"),
    "rank": (lambda row: row.correlation, ".3f"),
    "saved": (lambda row: row.saved, ".1%"),
    "fixed": (lambda row: row.fixed, ".2%"),
    "random": (lambda row: row.random, ".2%"),
}


def progress_bar(console: Console) -> Progress:
    """Bars over the training steps of each seed, with the smoothed loss and mean depth of what is trained on."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.percentage:.0f}% loss {task.fields[loss]:.3f} depth {task.fields[depth]:.2f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def by_policy(results: dict[int, list[Row]]) -> list[list[Row]]:
    """The rows of each policy, one for each seed; of policies that all seeds have."""
    return [list(group) for group in zip(*results.values(), strict=False)]


def trained(policies: Sequence[Sequence[Row]]) -> list[Sequence[Row]]:
    """Those whose exits are trained in."""
    return [group for group in policies if group[0].policy in {policy.name for policy in TRAINED}]


def show(console: Console, results: dict[int, list[Row]]) -> None:
    """All tables. `results` are the rows of each seed, in one order, some perhaps missing at the end."""
    for seed, rows in results.items():
        console.print(table(f"seed {seed}", [[row] for row in rows]))
    policies = by_policy(results)
    if len(results) > 1:
        console.print(table(f"seeds {', '.join(map(str, results))}: mean, standard deviation", policies))
    console.print(LEGEND, "")
    console.print(by_depth(policies), "")
    console.print(Columns([matrix(group) for group in trained(policies)], padding=(0, 4)))


def table(title: str, policies: Sequence[Sequence[Row]]) -> Table:
    """One line for each policy, given its row in each seed."""
    out = _table(title, ["policy", *COLUMNS])
    for group in policies:
        out.add_row(group[0].policy, *(figure([read(row) for row in group], form) for read, form in COLUMNS.values()))
    return out


def figure(values: Sequence[float], form: str) -> str:
    """The mean and, below it, the standard deviation if there is more than one; a dash where there is no number."""
    if any(map(math.isnan, values)):
        return "–"
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean}\n±{format(statistics.stdev(values), form)}"


def by_depth(policies: Sequence[Sequence[Row]]) -> Table:
    """The weights at fixed depths, mean over seeds; all policies that are not trained share one line."""
    out = _table("the same weights at fixed depths", ["trained with", *map(str, range(1, STEPS + 1))])
    lines = [(group[0].policy, group) for group in trained(policies)]
    lines += [("no exits", group) for group in policies if group not in trained(policies)][:1]  # all the same weights
    for name, rows in lines:
        out.add_row(name, *(f"{statistics.mean(row.by_depth[i] for row in rows):.2%}" for i in range(STEPS)))
    return out


def matrix(rows: Sequence[Row]) -> Table:
    """Of the lines that need so many iterations, the share that used so many; over all seeds."""
    out = _table(f"{rows[0].policy}: used", ["needed", *map(str, range(1, STEPS + 1))])
    counts = [[sum(row.matrix[n][u] for row in rows) for u in range(STEPS)] for n in range(STEPS)]
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
