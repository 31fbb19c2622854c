"""Rules turn scores into exits: they decide how much of each token's remaining weight continues.

A rule gets whole rows: all scores so far `(batch, seq, step + 1)`, the newest last; the remaining weight
`(batch, seq)`, 0 for exited tokens and padding; and positions `(batch, seq)`. It keeps no state. It returns the
weight that continues, not the weight that exits: for a very small score s, `remaining * s` is still above 0, where
`remaining - remaining * (1 - s)` rounds to 0. The loop clamps the result to [0, remaining], so no rule can bring an
exited token back.

With a cache the rows hold the new tokens alone. A rule that reads other tokens of its row, even only earlier ones,
would therefore decide differently in decoding. Such a rule is for training only: wrap it in `TrainingOnly`. A loop with
a cache tries each rule once, on random scores, and refuses one that reads its row.
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
    """Decides how much of each token's remaining weight continues."""

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows, /) -> WeightRows:
        """The weight that continues.

        Arguments, passed by place, so a rule may name them as it likes:
            scores: `(batch, seq, step + 1)`, all scores so far, the newest last; 0 where the token was not active.
            remaining: `(batch, seq)` in [0, 1], the remaining weight; 0 for exited tokens and at padding.
            positions: `(batch, seq)` int, the position of each token among the real tokens of its row.

        Returns: `(batch, seq)`; with 0, the token exits.
        """
        ...


def _check_tau(owner: str, tau: float | Tensor) -> None:
    if isinstance(tau, Tensor):
        if tau.dim() not in (0, 2):
            raise ValueError(
                f"{owner} expected tau to be a number or a tensor of shape (batch, 1) or (batch, seq), got shape "
                f"{tuple(tau.shape)}."
            )
        if not tau.is_meta and bool(tau.isnan().any()):
            raise ValueError(f"{owner} expected tau to be a number, got NaN in {tau}.")
    elif isinstance(tau, bool) or not isinstance(tau, Real):
        raise unfit(f"{owner} expected tau to be a number or a tensor", tau, f"Write it as in {owner}(0.5).")
    elif tau != tau:
        raise ValueError(f"{owner} expected tau to be a number, got {tau}.")


def _check_fits(owner: str, tau: float | Tensor, remaining: Tensor) -> None:
    """Check that `tau` broadcasts with the rows."""
    shape = tuple(tau.shape) if isinstance(tau, Tensor) else ()
    if any(own != wanted and 1 not in (own, wanted) for own, wanted in zip(shape, remaining.shape, strict=False)):
        raise ValueError(
            f"{owner} expected tau of shape (batch, 1) or (batch, seq) with (batch, seq) = {tuple(remaining.shape)}, "
            f"got shape {shape}. Make a rule with thresholds for this batch."
        )


def _check_rule(owner: str, rule: object) -> None:
    """Check a rule that another one wraps; `TrainingOnly` must be the outermost."""
    if isinstance(rule, type) or not callable(rule):
        raise unfit(f"{owner} expected rule to be a rule", rule, "Give it one, such as Threshold(0.5).")
    if isinstance(rule, TrainingOnly):
        raise ValueError(
            f"{owner} expected a rule that works in decoding, got TrainingOnly. Wrap the outer rule instead: "
            f"TrainingOnly({owner}(...))."
        )


@final
@dataclass(frozen=True, eq=False)
class Threshold:
    """A token continues while its newest score is at least `tau`.

    Arguments: `tau`, a number or a tensor `(batch, 1)` or `(batch, seq)`, in the unit of the scores. For a sigmoid
    gate, 0 means that no token exits, and 1.1 that all tokens exit after one iteration.
    Raises: `ValueError` if `tau` is NaN or of another shape, also at the call.
    Source: AdaPonderLM, arXiv 2603.01914: m^{i+1} = m^i · 1(s^i ≥ τ), τ = 1e-4.
    """

    tau: float | Tensor

    def __post_init__(self) -> None:
        _check_tau("Threshold", self.tau)

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows) -> WeightRows:
        """`remaining` where the newest score is at least `tau`, else 0."""
        del positions
        _check_fits("Threshold", self.tau, remaining)
        return torch.where(scores[..., -1] >= self.tau, remaining, 0)


@final
@dataclass(frozen=True, eq=False)
class SurvivalThreshold:
    """A token continues while the product of all its scores is at least `tau`.

    Arguments: `tau`, a number or a tensor `(batch, 1)` or `(batch, seq)`, in the unit of the product. If it is drawn
    uniformly from [0, 1] for each token, the exits are samples of the exit probabilities of `Survival`.
    Raises: `ValueError` if `tau` is NaN or of another shape, also at the call.
    Source: Ouro, arXiv 2510.25741: exit once the cumulative exit probability reaches 1 - tau.
    """

    tau: float | Tensor

    def __post_init__(self) -> None:
        _check_tau("SurvivalThreshold", self.tau)

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows) -> WeightRows:
        """`remaining` where the product of the scores is at least `tau`, else 0."""
        del positions
        _check_fits("SurvivalThreshold", self.tau, remaining)
        return torch.where(scores.prod(-1) >= self.tau, remaining, 0)


@final
@dataclass(frozen=True)
class Survival:
    """The remaining weight is multiplied by the score: a soft exit after every iteration.

    The weight that exits after iteration n is λ_n · Π_{i<n} (1 - λ_i) with λ = 1 - score.
    Source: PonderNet, Banino et al. 2021, arXiv 2107.05407, equation 2.
    """

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows) -> WeightRows:
        """`remaining · s`."""
        del positions
        return remaining * scores[..., -1]


@final
@dataclass(frozen=True)
class ACT:
    """The weight `1 - s` exits after each iteration; if at most `eps` would remain, it exits too.

    Arguments: `eps`, in [0, 1): Graves' ε, 0.01 in the paper.
    Raises: `ValueError` if `eps` is not a number in [0, 1).
    Source: Graves 2016, arXiv 1603.08983, equations 6 to 8 (the remainder is the last exit weight).
    """

    eps: float = 0.01

    def __post_init__(self) -> None:
        number = isinstance(self.eps, Real) and not isinstance(self.eps, bool)
        if not number or not 0 <= self.eps < 1:
            raise unfit("ACT expected eps, a number in [0, 1)", self.eps, "The paper's is 0.01.")

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows) -> WeightRows:
        """`remaining - (1 - s)`, or 0 where that is at most `eps`."""
        del positions
        continuing = remaining - (1 - scores[..., -1])
        return torch.where(continuing > self.eps, continuing, 0)


@final
@dataclass(frozen=True)
class Lookahead:
    """Applies `rule` to all scores but the newest: it decides one iteration late.

    So the decision is known before the iteration that it ends. Each token also runs one iteration more, in which
    others can read its answer.
    Arguments: `rule`. It is not called after the first iteration, when no token exits.
    Raises: `ValueError` if `rule` is not a rule, or is a `TrainingOnly`: write `TrainingOnly(Lookahead(rule))`.
    """

    rule: Rule

    def __post_init__(self) -> None:
        _check_rule("Lookahead", self.rule)

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows) -> WeightRows:
        """The result of `rule` for the older scores."""
        if scores.shape[-1] == 1:
            return remaining
        return self.rule(scores[..., :-1], remaining, positions)


@final
@dataclass(frozen=True)
class NotBefore:
    """Applies `rule` from iteration `first` on; before it, no token exits.

    If a token exits after one iteration, others can read only the keys and values of its bare embedding. In small
    language models this cost more quality than the iteration saves (docs: When adaptive depth helps).
    Arguments: `first`, the earliest iteration, from 1, after which a token may exit; `rule`.
    Raises: `ValueError` if `first` is not an int from 1, if `rule` is not a rule, or if it is a `TrainingOnly`: write
    `TrainingOnly(NotBefore(first, rule))`.
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
        """The result of `rule` for the scores."""
        return remaining if scores.shape[-1] < self.first else self.rule(scores, remaining, positions)


@final
@dataclass(frozen=True)
class TrainingOnly:
    """Marks a rule that is for training only, because it reads other tokens of its row.

    An example is "the best half of the row". With a cache a rule gets the new tokens alone, so it would decide
    differently. A loop with a cache therefore refuses a marked rule, and `check_rule` allows it to read its row.
    Arguments: `rule`. This wrapper must be the outermost: `TrainingOnly(NotBefore(2, rule))`.
    Raises: `ValueError` if `rule` is not a rule.
    """

    rule: Rule

    def __post_init__(self) -> None:
        if not isinstance(self.rule, TrainingOnly):
            _check_rule("TrainingOnly", self.rule)

    def __call__(self, scores: ScoreHistoryRows, remaining: WeightRows, positions: PositionRows) -> WeightRows:
        """The result of `rule` for the scores."""
        return self.rule(scores, remaining, positions)
