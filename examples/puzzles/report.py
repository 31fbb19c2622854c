"""What a reader sees: a table for each size, and what halting saved."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean

from ..figures import spread
from .study import FIXED, Judged, Result

COLUMNS: dict[str, Callable[[Judged], float]] = {
    "solved %": lambda judged: 100 * judged.solved,
    "segments": lambda judged: judged.segments,
    "ms a puzzle": lambda judged: judged.milliseconds,
}
FORM = ".1f"
HALTING = "halting"
TRAINED = "fixed at {}, trained so"
HELD = "halting, held at {}"


class Size:
    """The results of one size: of every seed, the model that halts and those of fixed numbers of segments."""

    def __init__(self, size: int, blanks: Sequence[int], results: dict[int, dict[int, Result]]) -> None:
        self.size, self.blanks, self.seeds = size, blanks, sorted(results)
        self.rows: dict[str, list[Judged]] = {HALTING: [results[seed][0][HALTING] for seed in self.seeds]}
        for fixed in FIXED:
            self.rows[TRAINED.format(fixed)] = [results[seed][fixed][str(fixed)] for seed in self.seeds]
        for fixed in FIXED:
            self.rows[HELD.format(fixed)] = [results[seed][0][str(fixed)] for seed in self.seeds]

    def table(self) -> str:
        """Means over the seeds; solved shares also by the number of blanks."""
        heads = [*COLUMNS, *(f"{blanks} blanks %" for blanks in self.blanks)]
        lines = [f"{self.size} × {self.size}".ljust(26) + "".join(f"{head:>13}" for head in heads)]
        for name, judged in self.rows.items():
            numbers = [mean(map(read, judged)) for read in COLUMNS.values()]
            numbers += [100 * mean(each.solved_by_blanks[i] for each in judged) for i in range(len(self.blanks))]
            forms = ["13.1f", "13.2f", "13.2f", *["13.1f"] * len(self.blanks)]
            lines.append(name.ljust(26) + "".join(map(format, numbers, forms)))
        halting = self.rows[HALTING]
        means = [mean(each.segments_by_blanks[i] for each in halting) for i in range(len(self.blanks))]
        lines.append("halting: segments".ljust(26 + 39) + "".join(f"{number:13.2f}" for number in means))
        return "\n".join(lines)

    def verdict(self) -> str:
        """Halting against each fixed number of segments, seed by seed."""
        halting, lines = self.rows[HALTING], []
        for fixed in FIXED:
            pairs = list(zip(halting, self.rows[TRAINED.format(fixed)], strict=True))
            solved = [100 * (ours.solved - theirs.solved) for ours, theirs in pairs]
            more = [100 * (ours.segments / theirs.segments - 1) for ours, theirs in pairs]
            lines.append(
                f"against {fixed}, trained so: solved {spread(solved, FORM)} points, segments {spread(more, FORM)} %"
            )
        lines.append(f"at an equal share solved, against fixed, trained so: {self.equally(TRAINED)}")
        lines.append(f"at an equal share solved, against the same weights held: {self.equally(HELD)}")
        return "\n".join(lines)

    def equally(self, fixed: str) -> str:
        """How many segments halting takes more than fixed numbers need for the same share of solved puzzles."""
        more = [self.more(seed, fixed) for seed in range(len(self.seeds))]
        reached = [percent for percent in more if not math.isnan(percent)]
        said = [f"segments {spread(reached, FORM)} %"] if reached else []
        if beyond := len(more) - len(reached):
            said.append(f"in {beyond} of {len(more)} seeds no fixed number solves as many")
        return "; ".join(said)

    def more(self, seed: int, fixed: str) -> float:
        """The same of one seed, in percent; between two numbers interpolated, NaN where none solves as many."""
        ours, points = self.rows[HALTING][seed], (self.rows[fixed.format(number)][seed] for number in FIXED)
        return 100 * (ours.segments / needed(ours.solved, [(each.segments, each.solved) for each in points]) - 1)


def needed(solved: float, points: Sequence[tuple[float, float]]) -> float:
    """The fewest segments at which the line through `points`, of segments and share, reaches a share; NaN: nowhere."""
    if points[0][1] >= solved:
        return points[0][0]
    for (near, low), (far, high) in pairwise(points):
        if high >= solved:
            return near + (far - near) * (solved - low) / (high - low)
    return math.nan
