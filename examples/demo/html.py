"""The same in one self-contained page, with pictures."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from adadepth import viz
from adadepth.diagnostics import gain_by

from . import known
from .evaluate import Evaluation
from .exits import LONG, letters_seen
from .jobs import EXITS, TRUNK, Trained
from .report import COLUMNS, cells_of, sections, verdicts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INTRODUCTION = (
    "On this task the depth that each token needs is known. A program is twelve lines, each a constant or a function "
    "of an earlier line, and each line predicts its own value. Here gates are learned: from the state of a line they "
    "predict how much later iterations would still gain. Beside them stand models that were trained at a fixed depth, "
    "with the same batches and the same number of steps."
)
SHOWN = 8  # windows in the heat map
EVERY = 10  # steps between two points of a curve


class Results(NamedTuple):
    """What there is to report: all trainings, what came of those on text, and those on programs that are done."""

    trained: Mapping[str, Trained]
    result: Evaluation | None
    known: Mapping[str, known.Known]


def write(path: Path, said: Sequence[str], found: Results, windows: Tensor, seed: int) -> None:
    """The report, of what there is; `said` is what it is about."""
    trained, result, programs = found
    parts = [("", "".join(f"<p>{escape(sentence)}</p>" for sentence in said))]
    if result is not None:
        parts += [("The depth of each byte", _text(trained, result, windows)), *_results(result)]
        parts += [("Where more iterations help", _gains(result, windows))] if result.line is not None else []
    if len(programs) == len(known.NAMES):
        parts += [("Programs: gates that learn the depth", _programs(programs, seed))]
    parts += [("Training", viz.svg(_curves(trained)))]
    path.write_text(viz.page("Adaptive depth on text", *parts), "utf-8")


def _results(result: Evaluation) -> list[tuple[str, str]]:
    rows = [cells_of(row, result.exits) for rows in sections(result) for row in rows]
    said = "".join(f"<p>{escape(line)}</p>" for line in verdicts(result))
    # One of a kind, so that their names have room; the table has them all.
    named = [result.exits, *result.criteria[-1:], *result.random[:1], *result.elsewhere]
    points = {row.name: (row.flops.relative, row.measured.nats) for row in named}
    lines = {"the same weights, forced": result.forced, "trained at 1, 2, …": result.trained}
    curves = {
        name: ([row.flops.relative for row in rows], [row.measured.nats for row in rows])
        for name, rows in lines.items()
        if rows
    }
    measured, timed = result.exits.measured, result.timed
    figure = viz.plot_exits(measured.depth, len(result.forced), nll=measured.loss)
    time = (
        f"<p>The same predictions took {timed.dense:.3f} s with every iteration of every byte (dense), and "
        f"{timed.packed:.3f} s where exited bytes are skipped (packed): {timed.packed / timed.dense:.2f} of it. "
        f"{timed.live:.2f} of the iterations were run.</p>"
    )
    return [
        ("Held-out loss", viz.table(COLUMNS, rows) + said),
        ("Loss against relative FLOPs", viz.svg(viz.plot_frontier(points, curves, y="held-out loss, nats per byte"))),
        ("How many bytes at each depth, and their loss", viz.svg(figure) + time),
    ]


def _text(trained: Mapping[str, Trained], result: Evaluation, windows: Tensor) -> str:
    """Held-out windows, coloured by the depth at which each byte was read to predict the next."""
    ids, measured = windows[:SHOWN, :-1], result.exits.measured
    tokens = [viz.pieces(lambda row: bytes(row).decode(errors="replace"), row) for row in ids]
    steps = trained[EXITS].model.shape.steps
    picture = viz.heat_map(tokens, measured.depth[:SHOWN], steps, nll=measured.loss[:SHOWN])
    said = (
        "Held-out text. The stronger the colour of a byte, the more iterations ran before it predicted the next byte."
    )
    return f"<p>{said}</p>{picture}"


def _programs(results: Mapping[str, known.Known], seed: int) -> str:
    """Lines of programs, coloured by their depth, the table, and used against needed depth."""
    sample, depth = known.held_out(seed), results[known.GATES].measured.depth
    lines = [[f" {line} " for line in known.TASK.text(ids)] for ids in sample.ids[:3].tolist()]
    said = "".join(f"<p>{escape(line)}</p>" for line in known.verdict(results, sample.needed))
    needed = viz.plot_needed(sample.needed, depth, known.TASK.steps)
    return (
        f"<p>{escape(INTRODUCTION)}</p>{viz.heat_map(lines, depth[:3], known.TASK.steps)}"
        f"{viz.table(known.COLUMNS, known.rows(results))}{said}{viz.svg(needed)}"
    )


def _curves(trained: Mapping[str, Trained]) -> "Figure":
    panels: dict[str, dict[str, tuple[list[int], list[float]]]] = {"loss, nats per byte": {}, "mean depth": {}}
    for name, (_, history, _) in trained.items():
        if name != TRUNK:
            kept = history[EVERY - 1 :: EVERY]
            smooth = list(accumulate((now.loss for now in history), lambda old, new: 0.95 * old + 0.05 * new))
            panels["loss, nats per byte"][name] = [now.step for now in kept], smooth[EVERY - 1 :: EVERY]
            panels["mean depth"][name] = [now.step for now in kept], [now.depth for now in kept]
    return viz.plot_curves(panels)


def _gains(result: Evaluation, windows: Tensor) -> str:
    """By the letters of a word seen: what training at full depth gains over training at two, and the exits there."""
    seen = letters_seen(windows[:, :-1])
    gains = gain_by(result.trained[1].measured, result.trained[-1].measured, seen)
    rows = []
    for place, share, gain in gains:
        letters = f"{place} or more" if place == LONG else str(place)
        depth = result.exits.measured.depth[seen == place].double().mean().item()
        rows.append((letters, f"{share:.1%}", f"{gain:+.4f}", f"{depth:.2f}"))
    said = "By letters of a word that have been read: what a model trained at full depth gains over one trained at two."
    return f"<p>{said}</p>" + viz.table(("letters", "share", "gain, nats", "depth by exits"), rows)
