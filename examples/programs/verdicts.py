"""Who wins, in words: paired differences over seeds, and the best mixture of models whose depth needs no gate."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..figures import standard_error
from .models import NEEDED, ORACLE, RANDOM, SHUFFLED, by_place, dense_names, fixed_name, readout_name
from .policies import GUIDED, GUIDED_EARLY, READOUTS, TRAINED
from .store import Row
from .task import Task

SEEN = 3.0  # standard errors; of five pairs, a difference of none is beyond them one time in 25
Rows = Mapping[str, Row]  # of one seed, by name


class Mixture(NamedTuple):
    """The best that sequences do which run in one of two models, drawn so that the mean cost is no more than given."""

    accuracy: float
    loss: float


class Difference(NamedTuple):
    """A mean difference over seeds, and its standard error, None for one seed."""

    mean: float
    error: float | None

    @property
    def errors(self) -> float:
        """How many standard errors it is away from none: infinite where all seeds differ by the same, 0 for none."""
        if not self.error:
            return float("inf") if self.mean else 0.0
        return abs(self.mean) / self.error


def mixture(rows: Sequence[Row], cost: float) -> Mixture:
    """The best mixture of any two of the rows at mean FLOPs `cost` at most; below the cheapest, the cheapest.

    The accuracy is on the upper concave envelope of the rows and the loss on the lower convex one: each may mix
    another two.
    """
    cheapest = min(rows, key=lambda row: row.flops)
    mixed = [_mix(low, high, cost) for low in rows for high in rows if low.flops <= cost]
    mixed = mixed or [Mixture(cheapest.accuracy, cheapest.loss)]
    return Mixture(max(each.accuracy for each in mixed), min(each.loss for each in mixed))


def _mix(low: Row, high: Row, cost: float) -> Mixture:
    """As much of the second as the cost allows; all of it, if it costs no more."""
    share = 1.0 if high.flops <= cost else (cost - low.flops) / (high.flops - low.flops)
    one, other = (low.accuracy, low.loss), (high.accuracy, high.loss)
    return Mixture(*((1 - share) * a + share * b for a, b in zip(one, other, strict=True)))


def mixture_of(task: Task, rows: Rows, name: str) -> Mixture | None:
    """The mixture of depths that need no gate, at the FLOPs of a row; None if one of them is not there."""
    without = [rows.get(name) for name in gateless(task)]
    there = [row for row in without if row is not None]
    return mixture(there, rows[name].flops) if len(there) == len(without) else None


def gateless(task: Task) -> list[str]:
    """The models whose depth is fixed, for all tokens or by kind and place."""
    return [*map(fixed_name, task.fixed), *by_place(task)]


def difference(pairs: Sequence[tuple[float, float]]) -> Difference:
    """First less second, over seeds."""
    each = [a - b for a, b in pairs]
    return Difference(statistics.mean(each), standard_error(each) if len(each) > 1 else None)


def said(difference: Difference, form: str) -> str:
    """`+0.0123 ± 0.0021, above by 5.9 standard errors`."""
    mean = format(difference.mean, f"+{form}")
    if difference.error is None:
        return f"{mean} (one seed)"
    if difference.errors < SEEN:
        word = "no difference seen"
    else:
        word = f"{'above' if difference.mean > 0 else 'below'} by {difference.errors:.1f} standard errors"
    return f"{mean} ± {difference.error:{form}}, {word}"


def opponents(task: Task) -> dict[str, list[str]]:
    """What each of our policies is compared with beside the mixture."""
    deepest = fixed_name(task.steps)
    others = [policy.name for policy in TRAINED if policy is not GUIDED]
    strict = [deepest, *by_place(task), *dense_names(task), *map(readout_name, READOUTS)]
    weights = [SHUFFLED, RANDOM, ORACLE, NEEDED]
    few = [deepest, *dense_names(task)]
    return {GUIDED.name: [*strict, *weights, *others]} | {
        name: strict if name == GUIDED_EARLY.name else few for name in others
    }


class Verdict(NamedTuple):
    """One of our policies against another row, or the mixture: its FLOPs as a share of the other's, and differences.

    `points` are points of accuracy, `nats` the loss.
    """

    name: str
    other: str
    cost: float
    points: Difference
    nats: Difference

    @property
    def sentence(self) -> str:
        """In words."""
        points, nats = said(self.points, ".2f"), said(self.nats, ".4f")
        return f"{self.name} − {self.other} (FLOPs × {self.cost:.2f}): accuracy, points {points}; loss {nats}."


MIXTURE = "best mixture of two without gates"


def verdicts(task: Task, results: Sequence[Rows]) -> Iterator[Verdict]:
    """Each comparison whose rows all seeds have."""
    for name, others in opponents(task).items():
        if not results or any(name not in rows for rows in results):
            continue
        mixed = [mixture_of(task, rows, name) for rows in results]
        pairs = [(rows[name], mix) for rows, mix in zip(results, mixed, strict=True) if mix is not None]
        if len(pairs) == len(results):
            yield _verdict(name, MIXTURE, 1.0, pairs)
        for other in others:
            if all(other in rows for rows in results):
                both = [(rows[name], rows[other]) for rows in results]
                yield _verdict(name, other, statistics.mean(a.flops / b.flops for a, b in both), both)


def _verdict(name: str, other: str, cost: float, pairs: Sequence[tuple[Row, Row | Mixture]]) -> Verdict:
    points = difference([(100 * a.accuracy, 100 * b.accuracy) for a, b in pairs])
    return Verdict(name, other, cost, points, difference([(a.loss, b.loss) for a, b in pairs]))
