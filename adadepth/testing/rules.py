"""`check_rule`: a rule is stateless, treats rows apart, knows no padding, and may decode unless it says otherwise."""

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
# Where the tokens of a row stand in a wider one.
_PADDED = {
    "at the left": [3, 4, 5, 6, 7, 8, 9],
    "at the right": [0, 1, 2, 3, 4, 5, 6],
    "in between": [0, 2, 3, 5, 6, 8, 9],
}


def check_rule(rule: Rule, steps: int = 4, causal: bool = True) -> None:
    """Check that a rule is stateless, treats rows apart, knows no padding, is finite, and works in a loop.

    Padding is nobody: it has remaining 0 and scores 0, at the left of a row, at its right or in between, and what is
    decided for real tokens must not depend on it, nor on the slots in which they stand. A mean over a row counts
    those of whom something remains; where a token stands is said by its position.

    Arguments: `rule`; `steps`, those of the loop it is for; `causal`, False for a rule that looks across a row and is
    for training only, as `TrainingOnly(rule)` says by itself: then other tokens of the row may change the result.
    Looking back is no better than looking ahead: in decoding a rule sees the new tokens alone.
    Raises: `AssertionError`; `ValueError` if `rule` is none.
    """
    if isinstance(rule, type) or not callable(rule):
        raise unfit("check_rule expected a rule", rule, "Give it one, such as Threshold(0.5).")
    device = device_of(rule)
    for seen in range(1, steps):
        rows = _rows(seen, device)
        stays = _stays(rule, rows)
        again = rule(*rows)
        assert torch.equal(stays, again), "A rule must be stateless: the same arguments gave another result."
        for row in range(_ROWS):
            same("rule", "a row alone", rule(*(part[row : row + 1] for part in rows)), stays[row : row + 1])
        for where, slots in _PADDED.items():
            _padding_is_nobody(rule, rows, stays, where, slots)
        if causal and not isinstance(rule, TrainingOnly):
            _each_token_alone(rule, rows, stays)
    like = Like(device, torch.float64)
    agree(8, steps, LinearGate(8, bias=0.0).to(*like), rule, Interpolate(), like)


class _Rows(NamedTuple):
    """What a rule is given."""

    scores: Tensor
    remaining: Tensor
    positions: Tensor


def _rows(seen: int, device: torch.device) -> _Rows:
    """Rows without padding after iteration `seen`; some tokens have left, of others a part."""
    generator = torch.Generator().manual_seed(seen)
    scores = torch.rand(_ROWS, _SEQ, seen, generator=generator, dtype=torch.float64, device="cpu").to(device)
    remaining = (scores[..., 0] > 0.2).double() * scores[..., -1].sqrt()
    scores = torch.where(remaining.unsqueeze(-1) > 0, scores, 0)
    return _Rows(scores, remaining, torch.arange(_SEQ, device=device).expand(_ROWS, _SEQ))


def _stays(rule: Rule, rows: _Rows) -> Tensor:
    """What the rule says, if it is of the right kind."""
    stays = untouched(rule, *rows)
    assert stays.shape == rows.remaining.shape, (
        f"A rule must say what stays of each token: expected shape {tuple(rows.remaining.shape)}, got "
        f"{tuple(stays.shape)}."
    )
    assert stays.is_floating_point(), (
        f"A rule must say how much stays, got {stays.dtype}. For a cut write torch.where(condition, remaining, 0)."
    )
    assert bool(stays.isfinite().all()), (
        f"A rule must be finite, also for a row of padding alone, got {stays.tolist()}. Divide by counts that are at "
        "least 1: count.clamp_min(1)."
    )
    return stays


def _padding_is_nobody(rule: Rule, rows: _Rows, stays: Tensor, where: str, slots: list[int]) -> None:
    """In wider rows, and one more that is padding alone, the same is decided for the same tokens."""
    mask = torch.zeros(_ROWS + 1, _WIDTH, dtype=torch.bool, device=stays.device)
    mask[:_ROWS, slots] = True
    scores, remaining = (part.new_zeros(*mask.shape, *part.shape[2:]) for part in rows[:2])
    scores[mask], remaining[mask] = rows.scores.flatten(0, 1), rows.remaining.flatten()
    padded = _stays(rule, _Rows(scores, remaining, places(mask)))[mask].view_as(stays)
    same(
        "rule",
        f"rows with padding {where}",
        padded,
        stays,
        "Padding has remaining 0: count and average only where remaining > 0, and read positions instead of slots.",
    )


def _each_token_alone(rule: Rule, rows: _Rows, stays: Tensor) -> None:
    """Neither later nor earlier tokens change the result."""
    advice = "If it is for training only, say so: TrainingOnly(rule)."
    parts = {
        "the first tokens without the later ones": slice(4),
        "the later tokens without the first ones, as in decoding": slice(4, None),
    }
    for what, part in parts.items():
        same("rule", what, rule(*(given[:, part] for given in rows)), stays[:, part], advice)
