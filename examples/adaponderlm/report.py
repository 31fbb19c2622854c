"""What a reader sees: a progress bar while training, and the tables after it."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .evaluate import Evaluation, Measured

BITS = 1.4426950408889634  # in a nat
STAGES = {1: "stage 1: full depth", 2: "stage 2: exits"}


def progress_bar(console: Console) -> Progress:
    """A bar over the steps that shows the stage, and the smoothed loss and mean depth of what is trained on."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.2f} depth {task.fields[depth]:.2f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def show(console: Console, result: Evaluation) -> None:
    """All tables, and what they do and do not say."""
    steps = len(result.forced)
    console.print(_policies(result))
    console.print(
        "The second row mixes two fixed depths to the same mean. All rows are the same weights, trained with learned "
        "exits: a model trained for one fixed depth usually does better at it, and is not in this "
        "table. ± is one standard error.\n"
    )
    console.print(_exits(result.learned, steps), "")
    console.print(_time(result))
    console.print(
        f"Packed runs only the bytes that have not left: {result.timed.live:.2f} of the {steps} iterations, which "
        "would be its share of the dense time if nothing else took any."
    )


def _policies(result: Evaluation) -> Table:
    learned = result.learned
    low = min(int(learned.mean_depth), len(result.forced) - 1)
    table = Table(title="Held-out loss: who decides how deep a byte goes", title_justify="left")
    for column in ("exits", "mean depth", "nats/byte", "bits/byte", "nats above learned"):
        table.add_column(column, justify="left" if column == "exits" else "right")
    _policy(table, "learned", learned, learned)
    _policy(table, f"fixed {low} or {low + 1}", result.mixture, learned)
    _policy(table, "random, from 2", result.random, learned)
    table.add_section()
    for depth, measured in enumerate(result.forced, 1):
        _policy(table, f"fixed {depth}", measured, learned)
    return table


def _policy(table: Table, name: str, measured: Measured, learned: Measured) -> None:
    more, error = measured.against(learned)
    difference = "" if measured is learned else f"{more:+.4f} ± {error:.4f}"
    nats = measured.nats
    table.add_row(name, f"{measured.mean_depth:.2f}", f"{nats:.4f}", f"{nats * BITS:.4f}", difference)


def _exits(learned: Measured, steps: int) -> Table:
    table = Table(title="Learned exits: where bytes leave", title_justify="left")
    for column in ("after iteration", "share of bytes", "nats/byte of these", "bits/byte"):
        table.add_column(column, justify="right")
    for depth in range(1, steps + 1):
        here = learned.depth == depth
        nats = learned.loss[here].mean().item()
        figures = (f"{nats:.4f}", f"{nats * BITS:.4f}") if here.any() else ("–", "–")
        table.add_row(str(depth), f"{here.double().mean().item():.1%}", *figures)
    return table


def _time(result: Evaluation) -> Table:
    timed = result.timed
    table = Table(title="Time of the same predictions, computed twice", title_justify="left")
    for column in ("dense", "packed", "packed / dense", "live share"):
        table.add_column(column, justify="right")
    ratio = timed.packed / timed.dense
    table.add_row(f"{timed.dense:.3f} s", f"{timed.packed:.3f} s", f"{ratio:.2f}", f"{timed.live:.2f}")
    return table
