"""`calibrate`: the threshold of any gate or exit criterion for a wanted mean depth, from data.

A threshold is in the unit of the scores, which differs from gate to gate, so the search is over depths. One pass
without early exits gives every score. A rule applied to these scores predicts the depth at any threshold. The
prediction is not exact: attention reads older keys and values of tokens that have exited, which changes the scores
of the others. A few real runs correct this.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ._given import name_of, named
from ._modes import evaluating
from .attention.tokens import places
from .cache.kv_reuse import KVReuseCache
from .loop.trace import Output, Trace
from .loop.wrapper import RecurrentWrapper
from .rules import Rule, Threshold

_RUNS = 8  # at most; three are usual
_NEAR = 0.002  # of the wanted depth: near enough to stop
_FAR = 0.1  # of the wanted depth: far enough for a warning
_ROUNDING = 1e-9


@final
class OutOfReach(ValueError):
    """No threshold reaches the goal of `calibrate`. The message gives the range that can be reached."""


@final
class Calibration(NamedTuple):
    """What `calibrate` found.

    `rule` holds the threshold `tau`: assign it to the loop's `rule`. `depth` is the mean depth of the tokens to
    which the threshold was fitted, and `unseen_depth` that of the others.
    """

    rule: Rule
    tau: float
    depth: float
    unseen_depth: float


@final
class Run(NamedTuple):
    """What the loop did with a batch: its trace, and the depth that each token had to reach, whatever the rule says."""

    trace: Trace
    least: Tensor


@final
class Goal(NamedTuple):
    """What the caller wants: an argument's name and value, its mean depth, and the function from a depth to it."""

    name: str
    asked: float
    depth: float
    of: Callable[[float], float]


def calibrate(
    model: nn.Module,
    data: Iterable[Tensor | Mapping[str, Any]],
    mean_depth: float = 2.5,
    rule: Callable[[float], Rule] = Threshold,
) -> Calibration:
    """The threshold at which a token runs `mean_depth` iterations on average, for any gate or exit criterion.

    The model does not change: assign the rule that was found to its loop. A mean depth says nothing about quality.

    Arguments:
        model: a `RecurrentWrapper`, or a module that holds exactly one.
        data: two batches or more. The threshold is fitted to the first, third, fifth and so on. The others only
            measure `unseen_depth`. A tensor is the model's first argument; a mapping holds its arguments by name.
            Tensors are moved to the model's device, those in nested mappings too.
        mean_depth: the wanted mean number of iterations over real tokens.
        rule: makes a rule from a threshold: `Threshold`, `SurvivalThreshold` or a function. The search takes
            thresholds from the scores in the data and their running products.

    Raises: `ValueError` if the model does not hold exactly one loop with a gate, or does not call it; if `rule` makes
        no rule from a threshold; if there are fewer than two batches, if one holds a cache, or if one of the two parts
        holds no real token; `OutOfReach`, a `ValueError`, if no threshold gives `mean_depth`. Warns if the nearest
        depth is off by more than 10 %, because many scores are equal.
    """
    check_rule(rule)
    loops = [part for part in model.modules() if isinstance(part, RecurrentWrapper)]
    if len(loops) != 1:
        raise ValueError(
            f"calibrate expected a RecurrentWrapper or a module that holds exactly one, got {type(model).__name__} "
            f"with {len(loops)}. Pass the wrapper itself, with data that are its arguments. For an adapted Hugging "
            "Face model use adadepth.hf.calibrate."
        )
    batches = [arguments(batch, model) for batch in data]
    return fit(model, loops[0], batches, rule, Goal("mean_depth", mean_depth, mean_depth, lambda depth: depth))


def check_rule(rule: object) -> None:
    """Check that `rule` is a class or a function that makes a rule from a threshold.

    Raises: `ValueError`.
    """
    try:
        inspect.signature(rule).bind(0.5)  # type: ignore[arg-type]  # what is not callable raises TypeError too
    except TypeError:
        raise ValueError(
            "calibrate expected rule to be a class or a function of a threshold, such as adadepth.SurvivalThreshold, "
            f"got {named(rule)}. Pass the class, not an object of it; a rule without a threshold cannot be calibrated."
        ) from None
    expected = f"calibrate expected rule to make a rule from any threshold, but {name_of(rule)}(-1.0)"
    try:
        made = rule(-1.0)  # type: ignore[operator]  # below all scores: among those that are tried
    except Exception as error:
        raise ValueError(
            f"{expected} raised: {error} Pass a class or a function such as adadepth.Threshold."
        ) from error
    if isinstance(made, type) or not callable(made):
        raise ValueError(f"{expected} gave {named(made)}. Write it as in rule=lambda tau: adadepth.Threshold(tau).")


def fit(
    model: nn.Module,
    looped: RecurrentWrapper,
    batches: list[tuple[tuple[Tensor, ...], dict[str, Any]]],
    rule: Callable[[float], Rule],
    goal: Goal,
) -> Calibration:
    """The work of `calibrate`, for a loop in the model, the arguments of each batch and a goal."""
    if looped.gate is None:
        raise ValueError(
            "calibrate needs a gate: without one, every score is 1 and no threshold can separate tokens. Give the loop "
            "a gate or an exit criterion."
        )
    if len(batches) < 2:
        raise ValueError(
            "calibrate expected at least 2 batches, because it measures the result on every second one, got "
            f"{len(batches)}. Split the data into more batches."
        )
    with _measuring(model, looped) as runs:
        full = runs(None, batches[::2])
        taus = _thresholds(full)
        wanted = _within(goal, sorted(_predict(rule(float(tau)), full) for tau in (taus[0], taus[-1])))
        tau, depth = search(
            wanted,
            taus,
            predict=lambda tau: _predict(rule(tau), full),
            measure=lambda tau: _mean(run.trace.depth for run in runs(rule(tau), batches[::2])),
        )
        if abs(depth - wanted) > _FAR * wanted:
            warnings.warn(
                f"calibrate found no threshold near {goal.name}={goal.asked}: the nearest gives {goal.of(depth):.4g}, "
                "because many tokens have the same scores and exit together. Train the gate, or choose that value.",
                stacklevel=3,
            )
        unseen = _mean(run.trace.depth for run in runs(rule(tau), batches[1::2]))
    return Calibration(rule(tau), tau, depth, unseen)


def _within(goal: Goal, ends: list[float]) -> float:
    low, high = ends
    if not low - _ROUNDING <= goal.depth <= high + _ROUNDING:
        raise OutOfReach(
            f"calibrate expected {goal.name} from {goal.of(low):.4g}, where all tokens exit as early as the rule "
            f"allows, to {goal.of(high):.4g}, where all exit as late as it allows, got {goal.asked}."
        )
    return min(max(goal.depth, low), high)


def search(
    wanted: float, taus: Tensor, predict: Callable[[float], float], measure: Callable[[float], float]
) -> tuple[float, float]:
    """The threshold whose measured mean depth is nearest to `wanted`, and that depth.

    Arguments: `taus (n,)`, in the order of their depths; `predict`, the cheap and nearly right depth at a
    threshold, monotone over `taus` and right at both ends, between which `wanted` lies; `measure`, the
    costly and true one.
    """
    ends = [float(taus[0]), float(taus[-1])]
    # By predicted depth, which is nearly the measured one: a line between two of them then finds a third that is near.
    known = {predict(tau): (tau, predict(tau)) for tau in ends}
    for _ in range(_RUNS):
        near = _neighbours(taus, predict, _interpolate(known, wanted))
        new = [(predicted, tau) for predicted, tau in near if predicted not in known]
        if not new:
            break  # no threshold lies between those that were tried
        predicted, tau = new[0]
        known[predicted] = tau, measure(tau)
        if abs(known[predicted][1] - wanted) <= _NEAR * wanted:
            break
    tau, depth = min(known.values(), key=lambda pair: abs(pair[1] - wanted))
    return tau, measure(tau) if tau in ends else depth


def _interpolate(known: dict[float, tuple[float, float]], wanted: float) -> float:
    """The predicted depth at which the measured one would be `wanted`, on a line between two that are known."""
    points = sorted((predicted, depth) for predicted, (_, depth) in known.items())
    for (x, y), (next_x, next_y) in pairwise(points):
        if min(y, next_y) <= wanted <= max(y, next_y) and y != next_y:
            return x + (next_x - x) * (wanted - y) / (next_y - y)
    return wanted


def _neighbours(taus: Tensor, predict: Callable[[float], float], depth: float) -> list[tuple[float, float]]:
    """The predictions on both sides of `depth`, the nearer one first, each with its threshold."""
    low, high = 0, len(taus) - 1
    rises = predict(float(taus[0])) < predict(float(taus[-1]))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (predict(float(taus[middle])) < depth) == rises else (low, middle)
    pairs = [(predict(tau), tau) for tau in (float(taus[low]), float(taus[high]))]
    return sorted(pairs, key=lambda pair: abs(pair[0] - depth))


def _thresholds(full: list[Run]) -> Tensor:
    """All thresholds that give different exits, ascending: between neighbouring scores or products, and beyond them."""
    seen = [torch.zeros(1, device="cpu")]
    for trace, _ in full:
        live = trace.live[..., :-1]
        seen += [trace.scores[live].cpu(), trace.scores.cumprod(-1)[live].cpu()]
    values = torch.cat(seen).double()
    values = values[values.isfinite()].unique()
    return torch.cat([values[:1] - 1, (values[1:] + values[:-1]) / 2, values[-1:] + 1])


def _predict(rule: Rule, full: list[Run]) -> float:
    """The mean depth by `rule` if no score depended on which tokens have exited."""
    return _mean(_apply(rule, *run) for run in full)


def _apply(rule: Rule, full: Trace, least: Tensor) -> Tensor:
    mask = full.live[..., 0]
    positions = places(mask)
    remaining, depth = mask.to(full.scores.dtype), mask.long()
    for seen in range(1, full.scores.shape[-1] + 1):
        continuing = torch.minimum(rule(full.scores[..., :seen], remaining, positions), remaining)
        continuing = torch.where(seen < least, remaining, continuing)
        remaining = torch.where(full.live[..., seen], continuing, 0)  # a depth from outside may end it
        depth = depth + (remaining > 0)
    return depth


def _mean(depths: Iterable[Tensor]) -> float:
    """Over real tokens."""
    counts = [(int(depth.sum()), int((depth > 0).sum())) for depth in depths]
    total, real = (sum(column) for column in zip(*counts, strict=True))
    if not real:
        raise ValueError(
            "calibrate expected real tokens in the batches 1, 3, 5, ... and in the batches 2, 4, 6, ..., got only "
            "padding in one of these two parts. Remove batches without real tokens."
        )
    return total / real


def arguments(batch: Any, model: nn.Module) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What the model is called with for one batch, by place and by name, on the device of the model."""
    if not isinstance(batch, Tensor | Mapping):
        raise ValueError(
            "calibrate expected data to be batches, each a tensor or a mapping of the model's arguments, got a "
            f"{type(batch).__name__}. Put a single batch into a list, split in two: the result is measured on every "
            "second batch."
        )
    if isinstance(batch, Mapping) and (names := [n for n, given in batch.items() if isinstance(given, KVReuseCache)]):
        raise ValueError(
            f"calibrate runs each batch several times, which a cache would take for one long text, got {names[0]}=a "
            "KVReuseCache. Give it whole texts, without a cache."
        )
    device = next((p.device for p in model.parameters()), None)
    moved = _moved(batch, device)
    return ((moved,), {}) if isinstance(batch, Tensor) else ((), moved)


def _moved(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return {name: _moved(part, device) for name, part in value.items()} if isinstance(value, Mapping) else value


@contextmanager
def _measuring(model: nn.Module, looped: RecurrentWrapper) -> Iterator[Callable[[Rule | None, list[Any]], list[Run]]]:
    """Yields what runs batches by a rule and returns what the loop did; all is as before at the end."""
    before, seen = looped.rule, list[Run]()

    def note(module: nn.Module, args: Any, given: Mapping[str, Any], out: Output) -> None:
        del module, args
        least = given.get("min_depth")
        seen.append(Run(out.trace, torch.as_tensor(1 if least is None else least, device=out.hidden.device)))

    def runs(rule: Rule | None, batches: list[Any]) -> list[Run]:
        looped.rule = rule
        seen.clear()
        for by_place, by_name in batches:
            model(*by_place, **by_name)
        if not seen:
            raise ValueError(
                f"calibrate saw no pass of the loop in {type(model).__name__}. The model must call its "
                "RecurrentWrapper, as looped(...): looped.forward(...) is not seen."
            )
        return [*seen]

    hook = looped.register_forward_hook(note, with_kwargs=True)
    try:
        with evaluating(model):
            yield runs
    finally:
        hook.remove()
        looped.rule = before
