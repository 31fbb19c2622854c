"""Writes names beside the points of a plot, where they cover nothing."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .colours import CARD, MUTED

if TYPE_CHECKING:
    import matplotlib.axes

Boxes = Float[Tensor, "boxes 4"]  # left, bottom, right, top
Places = Float[Tensor, "places 2"]  # all in points, 72 to the inch

_AWAY = (9, 17, 27, 39, 53, 69, 87, 107, 129, 153, 179)
_AROUND = (0, 8, 1, 15, 7, 9, 2, 14, 6, 10, 4, 12, 3, 13, 5, 11)  # sixteenths of a circle; right and left first


def label(axes: "matplotlib.axes.Axes", points: Mapping[str, tuple[float | int, float | int]]) -> None:
    """Write each name at the free place nearest to its point; a thin line joins them if the place is not close.

    A free place is inside the axes and covers no earlier name and no point. It is nearer to its own point than to
    others and, if possible, covers no line. The figure must have 72 dots per inch, and its axes must be final.
    """
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    frame = torch.tensor([*map(float, axes.bbox.extents)], dtype=torch.float64)
    marks = _seen(axes, list(points.values()))
    lines = [_seen(axes, line.get_xydata()) for line in axes.lines]
    solid, drawn = torch.cat([marks, *lines]), torch.cat([marks[:0], *map(_along, lines)])
    taken = marks.new_zeros(0, 4)
    for (name, point), mark in zip(points.items(), marks, strict=True):
        away, boxes = _around(mark, *_size(axes, name))
        bad = _meet(boxes, taken).sum(1) + ((boxes[:, :2] < frame[:2]) | (boxes[:, 2:] > frame[2:])).any(1)
        others = (_off(boxes, marks) < _off(boxes, mark.unsqueeze(0))).sum(1)
        hidden = 500 * (_off(boxes, solid) < 4).sum(1) + 8 * (_off(boxes, drawn) == 0).sum(1)
        best = int((away + 10_000 * bad + hidden + 150 * others).argmin())
        left, bottom, _, top = boxes[best].tolist()
        taken = torch.cat([taken, boxes[best : best + 1]])
        arrow = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4}
        text = axes.annotate(
            name,
            point,
            (left + 2 - float(mark[0]), (bottom + top) / 2 - float(mark[1])),
            textcoords="offset points",
            arrowprops=arrow if away[best] > _AWAY[1] else None,
            va="center",
            bbox={"facecolor": CARD, "edgecolor": "none", "alpha": 0.75, "pad": 0},
        )
        text.set_in_layout(False)


def _seen(axes: "matplotlib.axes.Axes", data: Any) -> Places:
    """The places at which data `(n, 2)` are drawn; gaps of a line are left out."""
    places = torch.tensor(axes.transData.transform(data).tolist(), dtype=torch.float64).reshape(len(data), 2)
    return places[places.isfinite().all(1)]


def _size(axes: "matplotlib.axes.Axes", name: str) -> tuple[float, float]:
    text = axes.text(0, 0, name)
    extent = text.get_window_extent()
    text.remove()
    return float(extent.width) + 4, float(extent.height) + 1


def _around(mark: Float[Tensor, "2"], width: float, height: float) -> tuple[Float[Tensor, " boxes"], Boxes]:
    """Boxes of this size around a point, the nearest first, and their distances."""
    away = torch.tensor(_AWAY).double().repeat_interleave(len(_AROUND))
    angle = torch.tensor(_AROUND).double().repeat(len(_AWAY)) * math.pi / 8
    x, y = mark[0] + away * angle.cos(), mark[1] + away * angle.sin()
    left = x - width * torch.where(angle.cos() > 0.2, 0, torch.where(angle.cos() < -0.2, 1, 0.5))
    return away, torch.stack([left, y - height / 2, left + width, y + height / 2], 1)


def _off(boxes: Boxes, places: Places) -> Float[Tensor, "boxes places"]:
    """The distance of each place from each box; 0 inside."""
    low, high = boxes[:, None, :2] - places, places - boxes[:, None, 2:]
    return torch.maximum(low, high).clamp_min(0).norm(dim=-1)


def _meet(boxes: Boxes, others: Float[Tensor, "others 4"]) -> Bool[Tensor, "boxes others"]:
    """Which boxes overlap with which others."""
    return ((boxes[:, None, :2] < others[:, 2:]) & (others[:, :2] < boxes[:, None, 2:])).all(-1)


def _along(line: Places) -> Float[Tensor, "along 2"]:
    """Places along a line, 4 points apart, at most a thousand for each segment."""
    parts = [line[:0]]
    for start, end in pairwise(line):
        shares = torch.linspace(0, 1, min(2 + int((end - start).norm() / 4), 1000), dtype=line.dtype)
        parts.append(torch.lerp(start, end, shares.unsqueeze(1)))
    return torch.cat(parts)
