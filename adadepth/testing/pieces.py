"""The contract suites of gates and updates: `check_gate` and `check_update`."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .._given import unfit
from ..gates import Gate, LinearGate
from ..rules import Survival, Threshold
from ..updates import Interpolate, Ungated, Update
from .compare import Like, agree, drawn, each_alone, like, untouched

_LEADING = ((5,), (1, 5), (2, 3), (0,), (2, 0))
_ROUNDING = 1e-4  # how far outside [0, 1] rounding may put a score
_LARGE = 32.0

_READS = "{0} has reads_step = False, but {1}. Remove the attribute: it is True by default."
_AXIS = "To scale by a score, keep its axis: write scores[..., -1:], not scores[..., -1]."


def check_gate(gate: Gate, dim: int, steps: int = 4, update: Update | None = None) -> None:
    """Checks that a gate scores each token by itself at every iteration, in the right range, and works in a loop.

    The range: a score that scales an update must be in [0, 1]. A raw logit or a distance must not scale. It may only
    decide exits, with an update that does not use the score: `Replace()` or `Ungated(...)`.

    Arguments: `gate`, of which a copy is checked in evaluation mode; `dim`, the width of the state; `steps`, those of
    the loop (the gate is called at steps 0 to `steps - 2`); `update`, that of the loop. None: an update that scales,
    or for a gate without gradient, such as an exit criterion, one that does not.
    Raises: `AssertionError`; `ValueError` if `gate` is not a gate or `update` not an update, or from the loop.
    """
    if not isinstance(gate, Gate):
        raise unfit("check_gate expected an adadepth.Gate", gate, "Write it as a subclass of Gate.")
    if update is not None and not isinstance(update, Update):
        raise unfit("check_gate expected update to be an adadepth.Update", update, "Give it that of the loop.")
    gate, kind = copy.deepcopy(gate).eval(), like(gate)
    for step in range(steps - 1):
        _scores_each_token(gate, dim, step, kind)
    h, previous = (drawn(64, dim, seed=seed, like=kind) for seed in (5, 6))
    if not gate.reads_step:
        for step in range(1, steps - 1):
            assert torch.equal(gate(h, previous, step), gate(h, previous, 0)), _READS.format(
                type(gate).__name__, f"its scores at step {step} are not those at step 0"
            )
    scores = [gate(h, previous, step) for step in range(max(1, steps - 1))]
    # A raw logit may lie in [0, 1] by chance; of states so large it does not.
    large = [gate(_LARGE * h, _LARGE * previous, step) for step in range(max(1, steps - 1))]
    update = _of_their_unit(type(gate).__name__, scores + large, dim, update)
    agree(dim, steps, gate, Threshold(float(scores[0].detach().median())), update, kind)


def _scores_each_token(gate: Gate, dim: int, step: int, kind: Like) -> None:
    """Check that each token gets one finite score, by itself, for any leading shape."""
    for leading in _LEADING:
        h, previous = (drawn(*leading, dim, seed=seed, like=kind) for seed in (1, 2))
        score = untouched(gate, h, previous, step)
        assert score.shape == leading, (
            f"A gate must give one score per token: expected shape {leading} for h of shape {tuple(h.shape)}, got "
            f"{tuple(score.shape)} at step {step}."
        )
        assert score.is_floating_point(), f"A score must be floating point, got {score.dtype}."
    h, previous = (drawn(6, dim, seed=seed, like=kind) for seed in (3, 4))
    each_alone("gate", partial(_last, gate, step), h, previous)
    for name, state in (("zeros", torch.zeros_like(h)), ("a state equal to the one before", previous)):
        score = gate(state, state, step)
        assert bool(score.isfinite().all()), f"A gate must be finite for {name}, got {score.tolist()} at step {step}."


def _of_their_unit(name: str, scores: list[Tensor], dim: int, update: Update | None) -> Update:
    """The update to check the gate with; checks that it may use these scores."""
    if update is None:
        learns = any(score.requires_grad for score in scores)
        update = Interpolate() if learns else Ungated(Interpolate())
    update = copy.deepcopy(update).eval()
    low, high = (float(end) for end in torch.stack(scores).detach().aminmax())
    assert (low >= -_ROUNDING and high <= 1 + _ROUNDING) or not _scales(update, dim), (
        f"A score that scales an update must be in [0, 1]: {name} gave scores from {low:.2g} to {high:.2g} for "
        f"{type(update).__name__}. If they are logits, end the gate in .sigmoid(). If they only decide exits, use an "
        "update that ignores them, here and in the loop: check_gate(gate, dim, update=Ungated(Interpolate()))."
    )
    return update


def _scales(update: Update, dim: int, step: int = 0) -> bool:
    """Whether the next input depends on the scores; told by the graph, because a new `ReZero` multiplies by 0."""
    kind = like(update)
    scores = drawn(6, step + 1, like=kind).sigmoid().requires_grad_()
    with torch.enable_grad():
        x, h, start = (drawn(6, dim, seed=seed, like=kind) for seed in (1, 2, 3))
        new = update(x, h, start, scores, step)
    if not new.requires_grad:
        return False
    return torch.autograd.grad(new.sum(), scores, allow_unused=True)[0] is not None


def _check_scales(update: Update, dim: int, steps: int) -> None:
    """Check that the update says whether it multiplies by a score."""
    name = type(update).__name__
    scales = any(_scales(update, dim, step) for step in range(steps - 1))
    assert update.scales or not scales, (
        f"{name} computes with a score, but has scales = False: the loop would accept an exit criterion, and scores "
        "outside [0, 1]. Write scales = True in its class."
    )
    # Without a gradient it may still read scores, if it detaches them.
    assert scales or not update.scales or any(_reads(update, dim, step) for step in range(steps - 1)), (
        f"{name} has scales = True, but its result does not depend on the scores: the loop would refuse an exit "
        "criterion. Remove the attribute: it is False by default."
    )


def _reads(update: Update, dim: int, step: int) -> bool:
    """Whether other scores give another result."""
    kind = like(update)
    x, h, start = (drawn(6, dim, seed=seed, like=kind) for seed in (1, 2, 3))
    one, other = (update(x, h, start, drawn(6, step + 1, seed=seed, like=kind).sigmoid(), step) for seed in (4, 5))
    return not torch.equal(one, other)


def check_update(update: Update, dim: int, steps: int = 4) -> None:
    """Checks that an update treats each token by itself, changes no argument, and works in a loop.

    Its `scales` must say whether it multiplies by a score.

    Arguments: `update`, of which a copy is checked in evaluation mode; `dim`, the width of the state; `steps`, those
    of the loop.
    Raises: `AssertionError`; `ValueError` if `update` is not an update.
    """
    if not isinstance(update, Update):
        raise unfit("check_update expected an adadepth.Update", update, "Write it as a subclass of Update.")
    update, kind = copy.deepcopy(update).eval(), like(update)
    for step in range(steps - 1):
        for leading in _LEADING:
            x, h, start = (drawn(*leading, dim, seed=seed, like=kind) for seed in (1, 2, 3))
            _next_input(update, x, h, start, drawn(*leading, step + 1, like=kind).sigmoid(), step)
        x, h, start, scores = (
            *(drawn(6, dim, seed=seed, like=kind) for seed in (1, 2, 3)),
            drawn(6, step + 1, like=kind).sigmoid(),
        )
        each_alone("update", partial(_last, update, step), x, h, start, scores)
        if not update.reads_step:
            later = torch.nn.functional.pad(scores, (1, 0), value=1.0)
            assert torch.equal(update(x, h, start, later, step + 1), update(x, h, start, scores, step)), _READS.format(
                type(update).__name__,
                f"it gives another input with a score of 1 before the others, at step {step + 1}",
            )
    _check_scales(update, dim, steps)
    agree(dim, steps, LinearGate(dim, bias=0.0).to(*kind), Survival(), update, kind)
    agree(dim, steps, LinearGate(dim, bias=0.0).to(*kind), Threshold(0.5), update, kind)


def _next_input(update: Update, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int) -> None:
    """Check that the update gives the next input, with the shape of the last one."""
    try:
        new = untouched(update, x, h, start, scores, step)
    except RuntimeError as error:
        if "size of tensor" not in str(error):
            raise
        raise AssertionError(
            f"An update must give the next input, shape {tuple(x.shape)}: {type(update).__name__} raised {error!s}. "
            f"{_AXIS}"
        ) from error
    assert new.shape == x.shape, (
        f"An update must give the next input: expected shape {tuple(x.shape)}, got {tuple(new.shape)}. {_AXIS}"
    )


def _last(piece: Callable[..., Tensor], step: int, *rows: Tensor) -> Tensor:
    return piece(*rows, step)
