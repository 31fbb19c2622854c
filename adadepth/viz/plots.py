"""Plots as matplotlib figures: where tokens exit, curves of training, and loss against cost.

Each function makes a new `matplotlib.figure.Figure` without pyplot, so no global state changes and no figure needs to
be closed. `svg` puts it into a page, and `figure.savefig` into a file. All need the extra `viz`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._extras import need
from .checks import check_depth, check_like_depth, check_real
from .colours import CARD, INK, MUTED, RULE, SERIES, depth_colour, scale
from .labels import label

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

Number = float | int
Curve = tuple[Sequence[Number], Sequence[Number]]

_WIDTH = 6.4  # inches: 460 px in a page, so that text is not scaled down on a narrow screen
_LOOK = {
    "font.size": 12,
    "text.color": INK,
    "text.parse_math": False,
    "figure.facecolor": CARD,
    "axes.facecolor": CARD,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.1,
    "legend.frameon": False,
    "legend.fontsize": 11,
}
_ROOM = 10  # with more depths than this, bars and cells get no numbers
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX"


def plot_exits(
    depth: Int[Tensor, "*rows"], steps: int, *, nll: Float[Tensor, "*rows"] | None = None
) -> "matplotlib.figure.Figure":
    """Where tokens exit: the share that runs each iteration, the share that exits after it, and their mean NLL.

    Shapes: `depth` and `nll`, any shape, the same for both.
    Arguments: `depth`, as in `trace.depth`, where padding (0) is left out; `steps`, those of the loop; `nll`, in
    nats, adds a second panel.
    Raises: `ValueError` if shapes differ, a depth is not in 0..steps, or all tokens are padding.
    """
    check_depth("plot_exits", depth, steps)
    check_like_depth("plot_exits", "nll", nll, depth)
    check_real("plot_exits", depth)
    left = torch.bincount(depth.flatten(), minlength=steps + 1)[1:].double()
    share = 100 * left / left.sum()
    runs = share.flip(0).cumsum(0).flip(0)
    with _panels([2.9] if nll is None else [2.9, 2.2], "iterations run") as (figure, axes):
        run = axes[0].bar(range(1, steps + 1), runs.tolist(), 0.86, color=RULE)
        exits = _bars(axes[0], share, "share of tokens, %", "{:.1f}")
        if nll is not None:
            sums = torch.bincount(depth.flatten(), nll.detach().flatten().double(), steps + 1)[1:]
            _bars(axes[1], sums / left, "mean NLL, nats", "{:.2f}")
        _legend(figure, {"run this iteration": run, "exit after it": exits})
    return figure


def plot_curves(
    panels: Mapping[str, Mapping[str, Curve]], x: str = "training step", marks: Mapping[Number, str] | None = None
) -> "matplotlib.figure.Figure":
    """Curves over one x axis, in panels one below the other, such as loss and mean depth over training.

    Arguments: `panels`, at least one, by the label of their y axis, each `{name: (xs, ys)}`; a name has the same colour
    in all panels. `x`, the label of the x axis; `marks`, names of places on it, such as the step at which exits begin.
    Raises: `ValueError` if there is no panel, or a curve does not have equally many x and y.
    """
    if not panels:
        raise ValueError("plot_curves expected at least one panel, {label: {name: (xs, ys)}}, got none.")
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    drawn: dict[str, Any] = {}
    with _panels([2.4] * len(panels), x) as (figure, axes):
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            axis.set_ylabel(title)
            for name, curve in curves.items():
                drawn[name] = _line(axis, "plot_curves", name, curve, names.index(name))
            for place in marks or ():
                axis.axvline(place, color=MUTED, linewidth=1, linestyle=":")
        for place, name in (marks or {}).items():
            axes[0].annotate(
                name, (place, 1), (3, 3), xycoords=("data", "axes fraction"), textcoords="offset points", color=MUTED
            )
        _legend(figure, drawn)
    return figure


def plot_frontier(
    points: Mapping[str, tuple[Number, Number]],
    lines: Mapping[str, Curve] | None = None,
    *,
    x: str = "relative FLOPs",
    y: str = "loss, nats per token",
) -> "matplotlib.figure.Figure":
    """Loss against cost: each policy is a named point (cost, loss), beside lines such as models of fixed depth.

    The y axis ends just above the highest point, so a line that starts higher is cut off at the top.

    Arguments: `points`, at least one, by name; `lines`, `{name: (xs, ys)}`; `x` and `y`, the labels of the axes.
    Raises: `ValueError` if there is no point, if a point is not finite, or if a line does not have equally many x
    and y.
    """
    if not points:
        raise ValueError("plot_frontier expected at least one named point, {name: (cost, loss)}, got none.")
    if lost := [name for name, place in points.items() if not all(map(math.isfinite, place))]:
        raise ValueError(
            f"plot_frontier expected finite costs and losses, got {points[lost[0]]} for {lost[0]!r}. Leave it out."
        )
    lines = lines or {}
    with _panels([4.2], x) as (figure, (axis,)):
        axis.set_ylabel(y)
        drawn = {
            name: _line(axis, "plot_frontier", name, line, i, marker=_MARKERS[i % len(_MARKERS)])
            for i, (name, line) in enumerate(lines.items())
        }
        axis.scatter(*zip(*points.values(), strict=True), s=42, color=INK, zorder=3)
        losses = [loss for _, loss in points.values()]
        lowest = [loss for line in axis.lines for loss in line.get_ydata() if math.isfinite(loss)]
        least, most = min(losses + lowest), max(losses)
        room = 0.08 * (most - least) or 0.05
        axis.set_ylim(least - room, most + room)
        axis.margins(x=0.08)
        _legend(figure, drawn)
        label(axis, points)
    return figure


def plot_needed(needed: Int[Tensor, "*rows"], used: Int[Tensor, "*rows"], steps: int) -> "matplotlib.figure.Figure":
    """Used against needed depth: the number of tokens in each cell, coloured by its share of the row.

    Tokens on the outlined diagonal ran as many iterations as they needed. Tokens left of it exited too early.

    Shapes: `needed` and `used`, any shape, the same for both.
    Arguments: `needed` and `used`, depths from 1 to `steps`; a token with 0 in either is padding and is left out.
    Raises: `ValueError` if shapes differ, a depth is not in 0..steps, or all tokens are padding.
    """
    for depth in (needed, used):
        check_depth("plot_needed", depth, steps)
    check_like_depth("plot_needed", "used", used, needed)
    real = (needed > 0) & (used > 0)
    check_real("plot_needed", real.long())
    pairs = needed[real].long() * (steps + 1) + used[real].long()  # a small dtype cannot hold the products
    counts = torch.bincount(pairs, minlength=(steps + 1) ** 2).view(steps + 1, steps + 1)
    with _panels([min(1.2 + 0.5 * steps, 5)], "iterations used") as (figure, (axis,)):
        ends, ticks = (0.5, steps + 0.5), _ticks(steps)
        axis.set(ylabel="iterations needed", xlim=ends, ylim=ends, xticks=ticks, yticks=ticks)
        axis.set_title("tokens, coloured by their share of the row", loc="left", fontsize=11, color=MUTED)
        axis.grid(visible=False)
        _cells(axis, counts)
    return figure


@contextmanager
def _panels(heights: Sequence[float], x: str) -> Iterator[tuple["matplotlib.figure.Figure", Any]]:
    """A figure with panels one below the other, with these heights in inches, over one x axis."""
    with need("matplotlib", "viz").rc_context(_LOOK):
        size = (_WIDTH, sum(heights) + 0.5)
        figure = need("matplotlib.figure", "viz").Figure(size, dpi=72, layout="constrained")
        axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        axes[-1].set_xlabel(x)
        yield figure, axes


def _bars(axis: "matplotlib.axes.Axes", values: Tensor, title: str, form: str) -> Any:
    """The bars: one for each depth, in its colour, with its value if there is room; no bar if the value is NaN."""
    steps = len(values)
    colours = [depth_colour(i, steps) for i in range(1, steps + 1)]
    bars = axis.bar(range(1, steps + 1), values.tolist(), 0.62, color=colours, edgecolor=MUTED, linewidth=0.8)
    if steps <= _ROOM:
        axis.bar_label(bars, ["" if value != value else form.format(value) for value in values.tolist()], padding=2)
    axis.set_ylabel(title)
    axis.set_xticks(_ticks(steps))
    axis.grid(axis="x", visible=False)
    return bars


def _ticks(steps: int) -> range:
    return range(1, steps + 1, 1 + steps // (_ROOM + 1))


def _line(axis: "matplotlib.axes.Axes", owner: str, name: str, curve: Curve, i: int, marker: str = "") -> Any:
    xs, ys = curve
    if len(xs) != len(ys):
        raise ValueError(f"{owner} expected as many x as y for {name!r}, got {len(xs)} and {len(ys)}.")
    dashes = _DASHES[i % len(_DASHES)]
    colour = SERIES[i % len(SERIES)]
    (line,) = axis.plot(xs, ys, color=colour, linestyle=dashes, marker=marker, markersize=6, label=name)
    return line


def _cells(axis: "matplotlib.axes.Axes", counts: Tensor) -> None:
    """A square for each pair of depths, with its count if there is room; the diagonal is outlined."""
    steps = len(counts) - 1
    shares = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    for needs, uses in product(range(1, steps + 1), repeat=2):
        count = int(counts[needs, uses])
        colour = scale(float(shares[needs, uses])) if count else CARD
        edge, width = (INK, 1.6) if needs == uses else (RULE, 1.0)
        axis.bar(uses, 0.94, 0.94, needs - 0.47, color=colour, edgecolor=edge, linewidth=width)
        if count and steps <= _ROOM:
            axis.text(uses, needs, str(count), ha="center", va="center")


def _legend(figure: "matplotlib.figure.Figure", entries: Mapping[str, Any]) -> None:
    """One legend for all panels, above them, where it covers nothing: what was drawn, by name."""
    if entries:
        blank = [" "] * len(entries)  # as labels, names that begin with "_" would be left out
        legend = figure.legend(list(entries.values()), blank, loc="outside upper left", ncols=2)
        for text, name in zip(legend.get_texts(), entries, strict=True):
            text.set_text(name)
