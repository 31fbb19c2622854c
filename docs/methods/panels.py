"""How the figures of the methods' pages look: legible at a width of 400 pixels, on a white card in light and dark."""

from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

BLUE, SKY, ORANGE, GREEN, GREY = "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#767676"
STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, which can be searched and read out
    "svg.hashsalt": "adadepth",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 11,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=[BLUE, ORANGE, GREEN, GREY]),
    "lines.marker": "o",
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.5,
}


def axes(rows: int = 1, height: float = 3.4) -> tuple[Figure, Any]:
    """A figure, and its panels from top to bottom."""
    fig = Figure(figsize=(5.4, height), layout="constrained")
    return fig, fig.subplots(rows, 1, sharex=True)


def means(ax: Axes, values: list[list[float]], color: str, label: str | None = None) -> None:
    """A line of means, and a dot for every seed of each point."""
    ax.plot(values, color=color, linestyle="")
    ax.plot([fmean(each) for each in values], color=color, marker="", label=label)


def bars(ax: Axes, heights: dict[str, list[float]], colors: tuple[str, ...], title: str | None = None) -> None:
    """Bars side by side."""
    width = 0.8 / len(heights)
    for k, ((name, values), color) in enumerate(zip(heights.items(), colors, strict=True)):
        ax.bar([i - 0.4 + (k + 0.5) * width for i in range(len(values))], values, width, color=color, label=name)
    legend(ax, title)


def curves(ax: Axes, lines: dict[str, list[tuple[float, float]]], colors: tuple[str, ...]) -> None:
    """Losses by depth."""
    for (name, points), color in zip(lines.items(), colors, strict=True):
        ax.plot(*zip(*points, strict=True), color=color, label=name)
    losses(ax)
    legend(ax)


def losses(ax: Axes) -> None:
    """A vertical axis of losses, logarithmic."""
    ax.set(ylabel="held-out loss (nats)", yscale="log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def answers(ax: Axes) -> None:
    """A vertical axis of answers."""
    ax.set_ylabel("right answers")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def depths(ax: Axes, xlabel: str) -> None:
    """A vertical axis of depths, up to 4."""
    ax.set(xlabel=xlabel, ylabel="mean depth\n(iterations)", ylim=(0.8, 4.2), yticks=range(1, 5))
    legend(ax)


def legend(ax: Axes, title: str | None = None, **handles: Any) -> None:
    """Above the panel, where it hides nothing."""
    ax.legend(title=title, **handles, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))
