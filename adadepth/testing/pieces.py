"""The suites of pieces: `check_gate`, `check_rule` and `check_update`."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..attention.view import TokenView
from ..gates import Gate, LinearGate
from ..loop.wrapper import RecurrentWrapper
from ..masks import depth_mask
from ..rules import Rule, Survival, Threshold
from ..updates import Interpolate, Update

_LEADING = ((5,), (1, 5), (2, 3), (0,), (2, 0))


def check_gate(gate: Gate, dim: int, steps: int = 4) -> None:
    """Check that a gate scores each token on its own, at every iteration, and works in a loop.

    Arguments: `gate`, in evaluation mode while it is checked, and not changed; `dim`, the width of
    the state; `steps`, those of the loop it is for: it is asked at steps 0 to `steps - 2`.
    Raises: `AssertionError`.
    """
    assert isinstance(gate, Gate), f"A gate must be a subclass of adadepth.Gate, got {type(gate).__name__}."
    gate, dtype = copy.deepcopy(gate).eval(), _dtype(gate)
    for step in range(steps - 1):
        for leading in _LEADING:
            h, previous = _random(*leading, dim, seed=1, dtype=dtype), _random(*leading, dim, seed=2, dtype=dtype)
            score = _untouched(gate, h, previous, step)
            assert score.shape == leading, (
                f"A gate must give one score per token: expected shape {leading} for h of shape {tuple(h.shape)}, got "
                f"{tuple(score.shape)} at step {step}."
            )
            assert score.is_floating_point(), f"A score must be floating point, got {score.dtype}."
        h, previous = _random(6, dim, seed=3, dtype=dtype), _random(6, dim, seed=4, dtype=dtype)
        _each_alone("gate", partial(_last, gate, step), h, previous)
        for name, state in (("zeros", torch.zeros_like(h)), ("a state equal to the one before", previous)):
            score = gate(state, state, step)
            assert bool(score.isfinite().all()), (
                f"A gate must be finite for {name}, got {score.tolist()} at step {step}."
            )
    middle = gate(_random(64, dim, seed=5, dtype=dtype), _random(64, dim, seed=6, dtype=dtype), 0).detach().median()
    _agree(dim, steps, gate, Threshold(float(middle)), Interpolate(), dtype)


def check_rule(rule: Rule, steps: int = 4, causal: bool = True) -> None:
    """Check that a rule is stateless, treats rows apart, is finite, and works in a loop.

    Arguments: `rule`; `steps`, those of the loop it is for; `causal`, False for a rule that looks
    across a row and is for training only: then other tokens of the row may change the result. Looking
    back is no better than looking ahead: in decoding a rule sees the new tokens alone.
    Raises: `AssertionError`.
    """
    for seen in range(1, steps):
        scores = torch.rand(3, 7, seen, generator=torch.Generator().manual_seed(seen), dtype=torch.float64)
        remaining = (scores[..., 0] > 0.2).double() * scores[..., -1].sqrt()
        scores = torch.where(remaining.unsqueeze(-1) > 0, scores, 0)
        positions = torch.arange(7).expand(3, 7)
        stays = _untouched(rule, scores, remaining, positions)
        assert stays.shape == remaining.shape, (
            f"A rule must say what stays of each token: expected shape {tuple(remaining.shape)}, got "
            f"{tuple(stays.shape)}."
        )
        assert stays.is_floating_point(), (
            f"A rule must say how much stays, got {stays.dtype}. For a cut write torch.where(condition, remaining, 0)."
        )
        assert bool(stays.isfinite().all()), f"A rule must be finite, got {stays.tolist()}."
        again = rule(scores, remaining, positions)
        assert torch.equal(stays, again), "A rule must be stateless: the same arguments gave another result."
        for row in range(3):
            alone = rule(scores[row : row + 1], remaining[row : row + 1], positions[:1])
            _same("rule", "a row alone", alone, stays[row : row + 1])
        if causal:
            before = rule(scores[:, :4], remaining[:, :4], positions[:, :4])
            _same("rule", "the first tokens without the later ones", before, stays[:, :4])
            after = rule(scores[:, 4:], remaining[:, 4:], positions[:, 4:])
            _same("rule", "the later tokens without the first ones, as in decoding", after, stays[:, 4:])
    _agree(8, steps, LinearGate(8, bias=0.0).double(), rule, Interpolate(), torch.float64)


def check_update(update: Update, dim: int, steps: int = 4) -> None:
    """Check that an update treats each token on its own, changes no argument, and works in a loop.

    Arguments: `update`, in evaluation mode while it is checked, and not changed; `dim`, the width of
    the state; `steps`, those of the loop it is for.
    Raises: `AssertionError`.
    """
    assert isinstance(update, Update), f"An update must be a subclass of adadepth.Update, got {type(update).__name__}."
    update, dtype = copy.deepcopy(update).eval(), _dtype(update)
    for step in range(steps - 1):
        for leading in _LEADING:
            x, h, start = (_random(*leading, dim, seed=seed, dtype=dtype) for seed in (1, 2, 3))
            new = _untouched(update, x, h, start, _random(*leading, step + 1, dtype=dtype).sigmoid(), step)
            assert new.shape == x.shape, (
                f"An update must give the next input: expected shape {tuple(x.shape)}, got {tuple(new.shape)}."
            )
        x, h, start, scores = (
            *(_random(6, dim, seed=seed, dtype=dtype) for seed in (1, 2, 3)),
            _random(6, step + 1, dtype=dtype).sigmoid(),
        )
        _each_alone("update", partial(_last, update, step), x, h, start, scores)
    _agree(dim, steps, LinearGate(dim, bias=0.0).to(dtype), Survival(), update, dtype)
    _agree(dim, steps, LinearGate(dim, bias=0.0).to(dtype), Threshold(0.5), update, dtype)


class _Mixer(nn.Module):
    """The smallest block that attends."""

    takes_view = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor, view: TokenView) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return x + view.attend(q, k, v).squeeze(1)


def _agree(dim: int, steps: int, gate: Gate, rule: Rule, update: Update, dtype: torch.dtype) -> None:
    """Packed and dense execution agree, on padded rows of mixed depth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = _Mixer(dim).to(dtype)
    mask = depth_mask(torch.tensor([7, 4, 0]), 7).roll(1, 1)
    most = 1 + torch.arange(7) % steps
    outputs = [
        RecurrentWrapper(block, steps, gate, rule, update, skip=skip).eval()(
            _random(3, 7, dim, dtype=dtype), mask=mask, max_depth=most
        )
        for skip in (True, False)
    ]
    _same("loop", "packed execution", outputs[0].hidden, outputs[1].hidden)
    assert torch.equal(outputs[0].trace.live, outputs[1].trace.live), "Packed and dense execution ran other tokens."


def _last(piece: Callable[..., Tensor], step: int, *rows: Tensor) -> Tensor:
    return piece(*rows, step)


def _dtype(piece: nn.Module) -> torch.dtype:
    """That of its parameters; a piece may hold others by reference, so it is not cast."""
    return next((p.dtype for p in piece.parameters()), torch.get_default_dtype())


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _untouched(piece: Callable[..., Tensor], *args: Tensor | int) -> Tensor:
    """The result, if no argument was changed in place."""
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    result = piece(*args)
    for old, new in zip(before, args, strict=True):
        unchanged = torch.equal(old, new) if isinstance(old, Tensor) and isinstance(new, Tensor) else old == new
        assert unchanged, f"{type(piece).__name__} changed an argument in place; make a new tensor."
    return result


def _each_alone(name: str, piece: Callable[..., Tensor], *rows: Tensor) -> None:
    """Permuted tokens give permuted results, and one token alone gives its own."""
    whole = piece(*rows)
    order = torch.arange(len(rows[0])).flip(0)
    _same(name, "the tokens in another order", piece(*(row[order] for row in rows)), whole[order])
    _same(name, "a token alone", piece(*(row[:1] for row in rows)), whole[:1])


def _same(piece: str, what: str, got: Tensor, expected: Tensor) -> None:
    got, expected = got.detach(), expected.detach()
    off = float((got - expected).abs().max()) if got.numel() else 0.0
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    exact = 1e-10 if expected.dtype == torch.float64 else 1e-5
    assert off <= exact * max(scale, 1.0), (
        f"The {piece} gave another result for {what}: off by {off:.1e} of {scale:.1e}."
    )
