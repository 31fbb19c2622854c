"""Rules say what stays of what remains.

A rule sees whole rows: all scores so far `(batch, seq, step + 1)`, newest last, what remains
`(batch, seq)`, 0 where left or padding, and positions `(batch, seq)`. It is stateless and gives what
stays, not what leaves: `remaining * s` keeps saturated gates alive where `remaining - remaining * (1 - s)`
rounds to 0. The loop clamps it into [0, remaining], so no rule can bring a token back.

With a cache the rows are those of the new tokens alone. A rule that looks across a row (the best k of it,
or only back) therefore decides otherwise in decoding: it is for training only, and `TrainingOnly` says so.
"""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from ._given import named, unfit
from ._types import PositionRows, ScoreHistoryRows, WeightRows


@runtime_checkable
class Rule(Protocol):
    """What stays of what remains."""

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows, /) -> WeightRows:
        """What stays.

        Arguments, which a rule may name as it likes:
            scores: `(batch, seq, step + 1)`, all scores so far, newest last; 0 where not live.
            remaining: `(batch, seq)` in [0, 1]; 0 where the token left, and at padding.
            positions: `(batch, seq)` int, each token's place among its row's real tokens.

        Returns: `(batch, seq)`; 0 lets the token leave.
        """
        ...


def _check_tau(owner: str, tau: float | Tensor) -> None:
    if isinstance(tau, Tensor):
        if tau.dim() not in (0, 2):
            raise ValueError(
                f"{owner} expected tau a number or of shape (batch, 1) or (batch, seq), got shape {tuple(tau.shape)}."
            )
        if not tau.is_meta and bool(tau.isnan().any()):
            raise ValueError(f"{owner} expected tau to be a number, got NaN in {tau}.")
    elif isinstance(tau, bool) or not isinstance(tau, Real):
        raise unfit(f"{owner} expected tau to be a number or a tensor", tau, f"Write it as in {owner}(0.5).")
    elif tau != tau:
        raise ValueError(f"{owner} expected tau to be a number, got {tau}.")


def _check_rule(owner: str, rule: object) -> None:
    """A rule inside another one, which must not hide that it is for training only."""
    if isinstance(rule, type) or not callable(rule):
        raise unfit(f"{owner} expected rule to be a rule", rule, "Give it one, such as Threshold(0.5).")
    if isinstance(rule, TrainingOnly):
        raise ValueError(
            f"{owner} expected a rule that may decode, got TrainingOnly. Mark the whole instead: "
            f"TrainingOnly({owner}(...))."
        )


@final
@dataclass(frozen=True, eq=False)
class Threshold:
    """A token stays while its newest score is at least `tau`.

    Arguments: `tau`, a number or a tensor `(batch, 1)` or `(batch, seq)`, in the unit of the scores. 0 never halts a
    sigmoid gate, 1.1 halts all after one iteration.
    Raises: `ValueError` if `tau` is NaN or of another shape.
    Source: AdaPonderLM, arXiv 2603.01914: m^{i+1} = m^i · 1(s^i ≥ τ), τ = 1e-4.
    """

    tau: float | Tensor

    def __post_init__(self) -> None:
        _check_tau("Threshold", self.tau)

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows) -> WeightRows:
        """`remaining` where the newest score is at least `tau`, else 0."""
        del positions
        return torch.where(scores[..., -1] >= self.tau, remaining, 0)


@final
@dataclass(frozen=True, eq=False)
class SurvivalThreshold:
    """A token stays while the product of all its scores is at least `tau`.

    Arguments: `tau`, a number or a tensor `(batch, 1)` or `(batch, seq)`, in the unit of the product.
    Drawn uniformly for each token, it samples exits with the probabilities of `Survival`.
    Raises: `ValueError` if `tau` is NaN or of another shape.
    Source: Ouro, arXiv 2510.25741: leave once the cumulative exit probability reaches 1 - tau.
    """

    tau: float | Tensor

    def __post_init__(self) -> None:
        _check_tau("SurvivalThreshold", self.tau)

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows) -> WeightRows:
        """`remaining` where the product of the scores is at least `tau`, else 0."""
        del positions
        return torch.where(scores.prod(-1) >= self.tau, remaining, 0)


@final
@dataclass(frozen=True)
class Survival:
    """Of what remains, the score's share stays: a soft exit at every iteration.

    The weight that leaves after iteration n is λ_n · Π_{i<n} (1 - λ_i) with λ = 1 - score.
    Source: PonderNet, Banino et al. 2021, arXiv 2107.05407, equation 2.
    """

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows) -> WeightRows:
        """`remaining · s`."""
        del positions
        return remaining * scores[..., -1]


@final
@dataclass(frozen=True)
class ACT:
    """`1 - s` leaves after each iteration; once no more than `eps` is left, that leaves too.

    Arguments: `eps`, in [0, 1): Graves' ε, 0.01 in the paper.
    Raises: `ValueError` if `eps` is not a number in [0, 1).
    Source: Graves 2016, arXiv 1603.08983, equations 6 to 8 (the remainder is what leaves last).
    """

    eps: float = 0.01

    def __post_init__(self) -> None:
        number = isinstance(self.eps, Real) and not isinstance(self.eps, bool)
        if not number or not 0 <= self.eps < 1:
            raise unfit("ACT expected eps, a number in [0, 1)", self.eps, "The paper's is 0.01.")

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows) -> WeightRows:
        """`remaining - (1 - s)`, or 0 where that is at most `eps`."""
        del positions
        stays = remaining - (1 - scores[..., -1])
        return torch.where(stays > self.eps, stays, 0)


@final
@dataclass(frozen=True)
class Lookahead:
    """The same rule on all but the newest score: it decides one iteration late.

    The decision is then known before the iteration that it cuts, and a token stays one iteration
    more, in which others see its answer.
    Arguments: `rule`, which after the first iteration is not asked: everything stays.
    Raises: `ValueError` if `rule` is none, or marked `TrainingOnly`: mark the whole.
    """

    rule: Rule

    def __post_init__(self) -> None:
        _check_rule("Lookahead", self.rule)

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows) -> WeightRows:
        """What `rule` says of the older scores."""
        if scores.shape[-1] == 1:
            return remaining
        return self.rule(scores[..., :-1], remaining, positions)


@final
@dataclass(frozen=True)
class NotBefore:
    """The same rule, asked from iteration `first` on: before it everything stays.

    What leaves after one iteration shows others the keys and values of its bare embedding ever after; in small
    language models that cost more than the iteration (docs: choosing exits).
    Arguments: `first`, the earliest iteration, from 1, after which a token may leave; `rule`.
    Raises: `ValueError` if `first` is not an int from 1, or `rule` is none, or marked `TrainingOnly`: mark the whole.
    """

    first: int
    rule: Rule

    def __post_init__(self) -> None:
        if isinstance(self.first, bool) or not isinstance(self.first, Integral) or self.first < 1:
            raise ValueError(
                f"NotBefore expected first, an iteration, to be an int from 1, got {named(self.first)}. The order is "
                "NotBefore(first, rule)."
            )
        _check_rule("NotBefore", self.rule)

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows) -> WeightRows:
        """What `rule` says of the scores."""
        return remaining if scores.shape[-1] < self.first else self.rule(scores, remaining, positions)


@final
@dataclass(frozen=True)
class TrainingOnly:
    """The same rule, said to be for training only: it looks across its row, as the best half of it does.

    With a cache a rule sees the new tokens alone, so that it would decide otherwise: a loop with a cache refuses it,
    and `check_rule` does not ask of it that it is causal.
    Arguments: `rule`. Mark the whole: `TrainingOnly(NotBefore(2, rule))`.
    Raises: `ValueError` if `rule` is none.
    """

    rule: Rule

    def __post_init__(self) -> None:
        if not isinstance(self.rule, TrainingOnly):
            _check_rule("TrainingOnly", self.rule)

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows) -> WeightRows:
        """What `rule` says of the scores."""
        return self.rule(scores, remaining, positions)
