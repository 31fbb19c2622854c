"""`check_rule`: a rule must be stateless, treat each row by itself and ignore padding; most must also decode."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._given import unfit
from ..attention.tokens import places
from ..gates import LinearGate
from ..rules import Rule, TrainingOnly
from ..updates import Interpolate
from .compare import Like, agree, device_of, same, untouched

_ROWS, _SEQ, _WIDTH = 3, 7, 10
# The places of a row's tokens in a wider, padded row.
_PADDED = {
    "at the left": [3, 4, 5, 6, 7, 8, 9],
    "at the right": [0, 1, 2, 3, 4, 5, 6],
    "in between": [0, 2, 3, 5, 6, 8, 9],
}


def check_rule(rule: Rule, steps: int = 4, causal: bool = True) -> None:
    """Checks that a rule is stateless, treats each row by itself, ignores padding, is finite, and works in a loop.

    Padding has remaining weight 0 and scores of 0, at the left of a row, at its right or in between. The result for
    real tokens must not depend on padding, nor on the columns that they are in. So a mean over a row may count only
    tokens with remaining weight, and a rule must read where a token is from its position.

    Arguments: `rule`; `steps`, those of the loop; `causal`, False for a rule that reads other tokens of its row and is
    for training only. Then other tokens may change the result; `TrainingOnly(rule)` has the same effect. A rule that
    reads only earlier tokens is for training only too: in decoding a rule gets the new tokens alone.
    Raises: `AssertionError`; `ValueError` if `rule` is not a rule.
    """
    if isinstance(rule, type) or not callable(rule):
        raise unfit("check_rule expected a rule", rule, "Give it one, such as Threshold(0.5).")
    device = device_of(rule)
    for seen in range(1, steps):
        rows = _rows(seen, device)
        continuing = _continuing(rule, rows)
        again = rule(*rows)
        assert torch.equal(continuing, again), "A rule must be stateless: the same arguments gave another result."
        for row in range(_ROWS):
            same("rule", "a row alone", rule(*(part[row : row + 1] for part in rows)), continuing[row : row + 1])
        for where, slots in _PADDED.items():
            _padding_changes_nothing(rule, rows, continuing, where, slots)
        if causal and not isinstance(rule, TrainingOnly):
            _each_token_alone(rule, rows, continuing)
    like = Like(device, torch.float64)
    agree(8, steps, LinearGate(8, bias=0.0).to(*like), rule, Interpolate(), like)


class _Rows(NamedTuple):
    """The arguments of a rule."""

    scores: Tensor
    remaining: Tensor
    positions: Tensor


def _rows(seen: int, device: torch.device) -> _Rows:
    """Rows without padding after iteration `seen`; some tokens have exited, others in part."""
    generator = torch.Generator().manual_seed(seen)
    scores = torch.rand(_ROWS, _SEQ, seen, generator=generator, dtype=torch.float64, device="cpu").to(device)
    remaining = (scores[..., 0] > 0.2).double() * scores[..., -1].sqrt()
    scores = torch.where(remaining.unsqueeze(-1) > 0, scores, 0)
    return _Rows(scores, remaining, torch.arange(_SEQ, device=device).expand(_ROWS, _SEQ))


def _continuing(rule: Rule, rows: _Rows) -> Tensor:
    """The weight that continues by the rule; checks its shape and dtype."""
    continuing = untouched(rule, *rows)
    assert continuing.shape == rows.remaining.shape, (
        f"A rule must return how much of each token continues: expected shape {tuple(rows.remaining.shape)}, got "
        f"{tuple(continuing.shape)}. Compute it from `remaining`, and reduce only the last axis of the scores."
    )
    assert continuing.is_floating_point(), (
        f"A rule must return how much of each token continues, in floating point, got {continuing.dtype}. For hard "
        "exits, write torch.where(condition, remaining, 0)."
    )
    assert bool(continuing.isfinite().all()), (
        f"A rule must be finite, also for a row of padding alone, got {continuing.tolist()}. Divide by counts that are "
        "at least 1: count.clamp_min(1)."
    )
    return continuing


def _padding_changes_nothing(rule: Rule, rows: _Rows, continuing: Tensor, where: str, slots: list[int]) -> None:
    """Check that the rule decides the same in padded rows, beside one more row that is all padding."""
    mask = torch.zeros(_ROWS + 1, _WIDTH, dtype=torch.bool, device=continuing.device)
    mask[:_ROWS, slots] = True
    scores, remaining = (part.new_zeros(*mask.shape, *part.shape[2:]) for part in rows[:2])
    scores[mask], remaining[mask] = rows.scores.flatten(0, 1), rows.remaining.flatten()
    padded = _continuing(rule, _Rows(scores, remaining, places(mask)))[mask].view_as(continuing)
    same(
        "rule",
        f"rows with padding {where}",
        padded,
        continuing,
        "Padding has remaining 0: count and average only where remaining > 0, and read positions instead of slots.",
    )


def _each_token_alone(rule: Rule, rows: _Rows, continuing: Tensor) -> None:
    """Check that neither later nor earlier tokens change the result."""
    advice = "If it is for training only, say so: TrainingOnly(rule)."
    parts = {
        "the first tokens without the later ones": slice(4),
        "the later tokens without the first ones, as in decoding": slice(4, None),
    }
    for what, part in parts.items():
        same("rule", what, rule(*(given[:, part] for given in rows)), continuing[:, part], advice)
