"""What a reader sees in the terminal: progress bars while training, and the tables after it."""

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from adadepth.diagnostics import by_exit

from . import known, train
from .evaluate import Evaluation, Row
from .jobs import TRUNK

COLUMNS = ("model and exits", "depth", "FLOPs", "nats/byte", "more than exits")


class Bars:
    """A bar for each training, with its smoothed loss and mean depth; in a file or a pipe, a line for each quarter."""

    def __init__(self, console: Console, recipe: train.Recipe) -> None:
        text = "{task.completed}/{task.total} loss {task.fields[loss]:.2f} depth {task.fields[depth]:.2f}"
        columns = TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn(text), TimeElapsedColumn()
        self.progress, self.recipe = Progress(*columns, console=console), recipe
        self.totals = {TRUNK: recipe.first, **dict.fromkeys(known.NAMES, sum(recipe.programs))}
        self.tasks: dict[str, tuple[TaskID, float, int]] = {}

    def show(self, name: str, now: train.Progress) -> None:
        """Move the bar of `name`."""
        total = self.totals.get(name, self.recipe.steps)
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=total, loss=now.loss, depth=now.depth), now.loss, 0
        task, loss, quarter = self.tasks[name]
        loss, reached = 0.8 * loss + 0.2 * now.loss, 4 * now.step // total
        self.tasks[name] = task, loss, reached
        self.progress.update(task, completed=now.step, loss=loss, depth=now.depth)
        if reached > quarter and not self.progress.console.is_terminal:
            self.progress.console.print(f"{name}: step {now.step} of {total}, loss {loss:.2f}, depth {now.depth:.2f}")


def show(console: Console, result: Evaluation) -> None:
    """All tables, and what they do and do not say."""
    table = Table(title="Held-out loss", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == COLUMNS[0] else "right")
    for rows in sections(result):
        for cells in (cells_of(row, result.exits) for row in rows):
            table.add_row(*cells)
        table.add_section()
    console.print(table)
    for line in verdicts(result):
        console.print(line)
    console.print("")
    console.print(_exits(result))
    console.print("")
    console.print(_time(result))


def show_known(console: Console, results: Mapping[str, known.Known], needed: Tensor) -> None:
    """The same of the programs, if all of them were trained to the end."""
    if len(results) < len(known.NAMES):
        return
    table = Table(title="Programs: gates that learn the depth", title_justify="left")
    for column in known.COLUMNS:
        table.add_column(column, justify="left" if column == known.COLUMNS[0] else "right")
    for cells in known.rows(results):
        table.add_row(*cells)
    console.print("")
    console.print(table)
    for line in known.verdict(results, needed):
        console.print(line)


def sections(result: Evaluation) -> Iterable[list[Row]]:
    """The rows of the large table, in groups."""
    line = [] if result.line is None else [result.line]
    weights = [*result.criteria, *result.random, result.oracle]
    return [rows for rows in ([result.exits, *line], result.trained, result.forced, weights, result.elsewhere) if rows]


def cells_of(row: Row, exits: Row) -> tuple[str, ...]:
    """The cells of a row; differences with one standard error, windows being independent."""
    more, error = row.measured.against(exits.measured)
    difference = "" if row is exits else f"{more:+.4f} ± {error:.4f}"
    return (
        row.name,
        f"{row.measured.mean_depth:.2f}",
        f"{row.flops.relative:.2f}",
        f"{row.measured.nats:.4f}",
        difference,
    )


def verdicts(result: Evaluation) -> Iterable[str]:
    """What the table says, in words."""
    exits, steps = result.exits, len(result.forced)
    yield (
        "“trained at n” is a model of its own, with n iterations for every byte. “line” is the best mixture of two of "
        "these at the FLOPs of exits: this is what exits must beat. All other rows but the last are the weights of "
        "exits, with other exits. FLOPs count passes of the model with one iteration. In the last column a minus is "
        "better than exits; ± is one standard error."
    )
    saved = 1 - exits.measured.mean_depth / steps
    yield f"Exits run {exits.measured.mean_depth:.2f} of {steps} iterations: {saved:.0%} fewer."
    if result.line is not None:
        for name, other in (
            ("one pass trained alike", result.trained[0]),
            ("fixed depths at equal FLOPs", result.line),
        ):
            more, error = exits.measured.against(other.measured)
            word = (
                "better than" if more < -2 * error else "worse than" if more > 2 * error else "equal, within error, to"
            )
            yield f"They are {word} {name}: {more:+.4f} ± {error:.4f} nats."
    else:
        yield "Not all fixed depths were trained to the end, so there is no line to compare with."
    yield f"For {result.better:.0%} of the bytes another depth than the last would have been better (oracle)."


def _exits(result: Evaluation) -> Table:
    table = Table(title="Exits: how many bytes at each depth", title_justify="left")
    for column in ("after iteration", "share of bytes", "nats/byte of these"):
        table.add_column(column, justify="right")
    groups = {group.name: group for group in by_exit(result.exits.measured)}
    for depth in range(1, len(result.forced) + 1):
        group = groups.get(depth)
        table.add_row(str(depth), *(("0.0%", "–") if group is None else (f"{group.share:.1%}", f"{group.mean:.4f}")))
    return table


def _time(result: Evaluation) -> Table:
    timed, flops = result.timed, result.exits.flops
    table = Table(title="Time of the same predictions, computed twice", title_justify="left")
    for column in ("dense", "packed", "packed / dense", "live share", "FLOPs / fixed depth"):
        table.add_column(column, justify="right")
    ratios = (f"{timed.packed / timed.dense:.2f}", f"{timed.live:.2f}", f"{1 / flops.bound:.2f}")
    table.add_row(f"{timed.dense:.3f} s", f"{timed.packed:.3f} s", *ratios)
    return table
