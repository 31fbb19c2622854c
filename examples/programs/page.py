"""The study as one self-contained page: table, verdicts, used against needed depth, and sequences coloured by depth."""

import statistics
from collections.abc import Sequence
from html import escape

import matplotlib.figure
import torch
from torch import Tensor

from adadepth import viz

from .models import by_place, fixed_name
from .report import COLUMNS, Seed, legend, lines, shared, trained
from .store import Row
from .study import SHOWN
from .task import Sample, Task
from .verdicts import said, verdicts


def page(task: Task, seeds: Sequence[Seed], sample: Sample, note: str) -> str:
    """HTML. `seeds` are the rows of each, `sample` what the first was judged on; `note` is said first."""
    groups = trained(task, seeds)
    return viz.page(
        f"Iterations needed and used: {task.name}",
        ("", "".join(f"<p>{escape(part)}</p>" for part in (note, task.introduction) if part)),
        (f"All models (seeds: {len(seeds)})", _table(task, seeds) + f"<p>{escape(legend(task))}</p>"),
        ("Verdicts: each less the other", _verdicts(task, seeds)),
        ("Wrong answers against FLOPs", viz.svg(_frontier(task, seeds))),
        *((f"Needed and used: {group[0].name}", viz.svg(_needed(group))) for group in groups),
        ("Sequences: iterations needed", _heat(task, sample, sample.needed[:SHOWN])),
        *((f"Sequences: {group[0].name}", _heat(task, sample, torch.tensor(group[0].shown))) for group in groups),
    )


def _table(task: Task, seeds: Sequence[Seed]) -> str:
    return viz.table(["", *COLUMNS], lines(task, seeds))


def _verdicts(task: Task, seeds: Sequence[Seed]) -> str:
    rows = [
        [each.name, each.other, said(each.points, ".2f"), said(each.nats, ".4f"), f"{each.cost:.2f}×"]
        for each in verdicts(task, [seed.rows for seed in seeds])
    ]
    return viz.table(["", "other", "accuracy, points", "loss, nats", "FLOPs"], rows)


def _frontier(task: Task, seeds: Sequence[Seed]) -> matplotlib.figure.Figure:
    """Lines through the models whose depth needs no gate, and a point for each of the others."""
    places = {name: _place(seeds, name) for name in shared(task, seeds)}
    known = {"each trained at a fixed depth": map(fixed_name, task.fixed), "at most a depth, by place": by_place(task)}
    points, lines = dict(places), {}
    for label, names in known.items():
        if line := [points.pop(name) for name in names if name in points]:
            costs, wrong = zip(*line, strict=True)
            lines[label] = (costs, wrong)
    return viz.plot_frontier(points or places, lines, x="thousand FLOPs per token", y="wrong, %")


def _place(seeds: Sequence[Seed], name: str) -> tuple[float, float]:
    rows = [seed.rows[name] for seed in seeds]
    wrong = statistics.mean(100 * (1 - row.accuracy) for row in rows)
    return statistics.mean(row.flops / 1000 for row in rows), wrong


def _needed(rows: Sequence[Row]) -> matplotlib.figure.Figure:
    """All tokens that count of all seeds, from their counts."""
    counts = torch.tensor([row.matrix for row in rows]).sum(0)
    depths = torch.arange(1, len(counts) + 1)
    needed, used = torch.cartesian_prod(depths, depths).unbind(1)
    each = counts.flatten()
    return viz.plot_needed(needed.repeat_interleave(each), used.repeat_interleave(each), len(counts))


def _heat(task: Task, sample: Sample, depth: Tensor) -> str:
    """Sequences run on, but no token is broken in two."""
    texts = [[token.replace(" ", "\u00a0") for token in task.text(ids)] for ids in sample.ids[: len(depth)].tolist()]
    return viz.heat_map([[f"{token}   " for token in tokens] for tokens in texts], depth, task.steps)
