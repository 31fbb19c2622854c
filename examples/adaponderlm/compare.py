"""Runs of several seeds held against each other at equal FLOPs, with what is left to chance."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, final

import torch
from scipy import stats
from torch import Tensor

Row = dict[str, Any]
SAME = 1 + 1e-9


class Point(NamedTuple):
    """A policy of one seed: relative FLOPs, mean depth, and the mean loss of each window held out.

    `choice` is its loss on other text, by which the best of many is chosen.
    """

    name: str
    flops: float
    depth: float
    losses: Tensor
    choice: float

    @property
    def nats(self) -> float:
        return self.losses.mean().item()


def best_mixture(points: Sequence[Point], flops: float) -> Point | None:
    """What loses least for `flops`: one of the points, or some windows by one and the rest by another.

    It is chosen on other text than is compared. None where all points cost more.
    """
    found = [point for point in points if point.flops <= flops * SAME]
    for low in found[:]:
        for high in points:
            if high.flops > flops * SAME:
                part = (flops - low.flops) / (high.flops - low.flops)
                depth = low.depth + part * (high.depth - low.depth)
                choice = low.choice + part * (high.choice - low.choice)
                losses = low.losses.lerp(high.losses, part)
                found.append(Point(f"{low.name} and {high.name}", flops, depth, losses, choice))
    return min(found, key=lambda point: point.choice, default=None)


class Difference(NamedTuple):
    """How much more one loses than another, and the standard error: over seeds, with one seed over windows.

    `number`: of how many.
    """

    mean: float
    error: float
    number: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}"

    @property
    def word(self) -> str:
        """Better or worse where a t-test says so, at 5 %: with three seeds, from 4.3 standard errors on."""
        if self.number < 2 or abs(self.mean) <= stats.t.ppf(0.975, self.number - 1) * self.error:
            return "equal to, within error,"
        return "better than" if self.mean < 0 else "worse than"


def difference(pairs: Sequence[tuple[Point, Point]]) -> Difference:
    """Of pairs of one seed each, on the same windows."""
    each = [first.losses - second.losses for first, second in pairs]
    values = each[0] if len(each) == 1 else torch.stack([losses.mean() for losses in each])
    return mean_of(values.tolist())


def mean_of(differences: Sequence[float]) -> Difference:
    """Of paired differences."""
    mean, deviation = spread(differences)
    return Difference(mean, (deviation or 0.0) / len(differences) ** 0.5, len(differences))


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; None with one value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


@final
@dataclass(frozen=True)
class Result:
    """What `evaluate.py` wrote of one run."""

    folder: Path
    found: Row
    kept: dict[str, Any]

    def point(self, row: Row) -> Point:
        name = row["name"]
        return Point(name, row["relative_flops"], row["depth"], self.kept["windows"][name], row["choice"])

    @property
    def own(self) -> Point:
        """As it was trained."""
        return self.point(self.found["own"])

    @property
    def rows(self) -> list[Row]:
        """All that its own gate, router or chance can do."""
        return [self.found["own"], *self.found["budgets"]]

    @property
    def curve(self) -> list[Point]:
        """The same as points."""
        return [self.point(row) for row in self.rows]

    def free(self, rows: Sequence[Row]) -> list[Point]:
        """Points of policies whose gate is taken to cost nothing."""
        return [self.point(row)._replace(flops=row["ungated_flops"]) for row in rows]


Of = Callable[[int], list[Point]]  # a seed to points


@final
class Table:
    """All results: by run, then by seed."""

    def __init__(self, results: dict[str, dict[int, Result]]) -> None:
        self.results = results

    @classmethod
    def read(cls, out: Path, names: Sequence[str], seeds: Sequence[int]) -> "Table":
        """What there is of it in `out`."""
        found: dict[str, dict[int, Result]] = {}
        for name in names:
            for seed in seeds:
                folder = out / f"{name}-{seed}"
                if (folder / "evaluation.json").exists():
                    kept = torch.load(folder / "windows.pt")
                    result = Result(folder, json.loads((folder / "evaluation.json").read_text("utf-8")), kept)
                    found.setdefault(name, {})[seed] = result
        return cls(found)

    def decided_by(self, *kinds: str) -> list[str]:
        """Runs in which one of `kinds` decides."""
        return [name for name, each in self.results.items() if next(iter(each.values())).found["decides"] in kinds]

    def _all(self, kinds: Sequence[str], points: Callable[[Result], list[Point]]) -> Of:
        names = self.decided_by(*kinds)
        return lambda seed: [
            point._replace(name=f"{name}, {point.name}")
            for name in names
            if seed in self.results[name]
            for point in points(self.results[name][seed])
        ]

    @property
    def fixed(self) -> Of:
        """Fixed depths, each trained as such."""
        return self._all(["fixed"], lambda result: [result.own])

    @property
    def chance(self) -> Of:
        """Depths by chance, trained in."""
        return self._all(["chance"], lambda result: result.curve)

    @property
    def criteria(self) -> Of:
        """Exit criteria: trained in, and put afterwards on weights that were trained without exits.

        What they read, logits of every iteration, is taken to cost nothing: with less than that to their favour, a
        model whose head is a large part of it would make them lose for its size alone.
        """
        trained = self._all(["criterion"], lambda result: result.free(result.rows))
        after = self._all(["fixed"], lambda result: result.free(result.found["criteria"]))
        return lambda seed: [*trained(seed), *after(seed)]

    @property
    def gates(self) -> Of:
        """Gates that learned, at thresholds for all budgets."""
        return self._all(["gate"], lambda result: result.curve)

    @property
    def routers(self) -> Of:
        """Routers, at prices for all budgets."""
        return self._all(["router"], lambda result: result.curve)

    def against(self, points: dict[int, Point], others: Of) -> Difference | None:
        """Points by seed, against the best mixture of others of the same seed for the same FLOPs."""
        pairs = [(point, best_mixture(others(seed), point.flops)) for seed, point in points.items()]
        there = [(point, other) for point, other in pairs if other is not None]
        return difference(there) if there and len(there) == len(pairs) else None
