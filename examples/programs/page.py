"""The study as one self-contained page: used against needed depth, and a few programs coloured by depth."""

import statistics
from collections.abc import Sequence

import matplotlib.figure
import torch
from torch import Tensor

from adadepth import viz

from .model import STEPS
from .report import COLUMNS, LEGEND, figure, trained
from .study import SHOWN, Row
from .task import Programs, text

INTRODUCTION = f"""\
A program is 24 lines, each a constant or a function of an earlier line, and every line is to predict its own value.
One transformer block is applied to each up to {STEPS} times. A line that stands at the end of a chain of n references
has its answer after n iterations, and needs one more to show it to the lines that refer to it."""


def page(policies: Sequence[Sequence[Row]], programs: Programs) -> str:
    """HTML. `policies` are the rows of each policy, one for each seed; `programs` the first of those of the first."""
    groups = trained(policies)
    return viz.page(
        "Iterations needed and used",
        ("", f"<p>{INTRODUCTION}</p>"),
        (f"Policies (seeds: {len(policies[0])})", _table(policies) + f"<p>{LEGEND}</p>"),
        ("Wrong lines against mean depth", viz.svg(_frontier(policies))),
        *((f"Needed and used: {group[0].policy}", viz.svg(_needed(group))) for group in groups),
        ("Programs: iterations needed", _heat(programs, programs.needed(STEPS)[:SHOWN])),
        *((f"Programs: {group[0].policy}", _heat(programs, torch.tensor(group[0].shown))) for group in groups),
    )


def _table(policies: Sequence[Sequence[Row]]) -> str:
    forms = [(read, form.replace(".2%", ".1%")) for read, form in COLUMNS.values()]  # all columns fit the page
    rows = [[group[0].policy, *(figure(list(map(read, group)), form) for read, form in forms)] for group in policies]
    return viz.table(["policy", *COLUMNS], rows)


def _frontier(policies: Sequence[Sequence[Row]]) -> matplotlib.figure.Figure:
    points = {
        group[0].policy: (
            statistics.mean(row.mean_depth for row in group),
            statistics.mean(100 * (1 - row.accuracy) for row in group),
        )
        for group in policies
    }
    *_, last = policies
    wrong = [statistics.mean(100 * (1 - row.by_depth[i]) for row in last) for i in range(STEPS)]
    lines = {"fixed depths, no exits trained": (range(1, STEPS + 1), wrong)}
    return viz.plot_frontier(points, lines, x="mean iterations", y="lines wrong, %")


def _needed(rows: Sequence[Row]) -> matplotlib.figure.Figure:
    """All lines of all seeds, from their counts."""
    counts = torch.tensor([row.matrix for row in rows]).sum(0)
    needed, used = torch.cartesian_prod(torch.arange(1, STEPS + 1), torch.arange(1, STEPS + 1)).unbind(1)
    each = counts.flatten()
    return viz.plot_needed(needed.repeat_interleave(each), used.repeat_interleave(each), STEPS)


def _heat(programs: Programs, depth: Tensor) -> str:
    """Lines run on, but none is broken in two."""
    lines = [[line.replace(" ", "\u00a0") for line in text(ids)] for ids in programs.ids[: len(depth)].tolist()]
    tokens = [[f"{line}   " for line in program] for program in lines]
    return viz.heat_map(tokens, depth, STEPS)
