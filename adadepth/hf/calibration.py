"""`calibrate`: the threshold of any gate or exit criterion for a wanted mean depth, from text.

A threshold is in the unit of the scores, and no two gates share one; the mean depth is what counts, so
the search is over depths. One pass in which nobody leaves gives every score, and a rule applied to
these predicts the depth at any threshold, up to one thing: tokens that left go on showing older keys
and values, which moves the scores of the others. A few real runs correct for that.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from .._modes import evaluating
from ..attention.tokens import places
from ..loop.trace import Trace
from ..loop.wrapper import RecurrentWrapper
from ..rules import Rule, Threshold
from . import flops
from .model import AdaptiveForCausalLM

_RUNS = 8  # at most; three are usual
_NEAR = 0.002  # of the wanted depth: near enough to stop
_ROUNDING = 1e-9


class OutOfReach(ValueError):
    """No threshold costs what `calibrate` was asked for. The text says what it could be asked for."""


@final
class Calibration(NamedTuple):
    """What `calibrate` found.

    `rule` holds the threshold `tau`: assign it to the loop's `rule`, or pass it to a call. `depth` is the
    mean over the tokens that were fitted, `unseen_depth` over those that were not; beside each, its
    relative FLOPs.
    """

    rule: Rule
    tau: float
    depth: float
    relative_flops: float
    unseen_depth: float
    unseen_relative_flops: float


def calibrate(
    model: AdaptiveForCausalLM | RecurrentWrapper,
    data: Iterable[Tensor | Mapping[str, Tensor]],
    relative_flops: float = 3.2,
    rule: Callable[[float], Rule] = Threshold,
) -> Calibration:
    """The threshold at which a token costs, on average, `relative_flops` passes of the model before it was looped.

    For any gate or exit criterion. The model is left as it was.

    Arguments:
        model: an adapted causal language model, or a `RecurrentWrapper`.
        data: two batches or more, every second of which is kept unseen. For a language model ids
            `(batch, seq)` or mappings that hold `input_ids` and maybe `attention_mask`; for a
            `RecurrentWrapper` rows `(batch, seq, dim)` or mappings of its arguments.
        relative_flops: (F0 + mean depth · F) / (F0 + F), with F the parameters of the looped layers and
            F0 of those that run once; the mean depth where the whole backbone is looped.
        rule: makes a rule of a threshold: `Threshold`, `SurvivalThreshold` or a function. The threshold
            is looked for among the scores that were seen and their running products.

    Raises: `ValueError` if the loop has no gate, if there are fewer than two batches or one of the two
    parts holds no real token; `OutOfReach`, which is one, if nothing costs `relative_flops`.
    Source: relative FLOPs: AdaPonderLM, arXiv 2603.01914.
    """
    loop = model if isinstance(model, RecurrentWrapper) else model.loop
    if loop.gate is None:
        raise ValueError(
            "calibrate needs a gate: without one every score is 1 and no threshold can choose. Give the loop a gate or "
            "an exit criterion."
        )
    batches = [_arguments(model, batch) for batch in data]
    if len(batches) < 2:
        raise ValueError(
            f"calibrate expected at least 2 batches, since every second one is kept unseen, got {len(batches)}. Cut "
            "the text into more batches."
        )
    with _measuring(model, loop) as traces:
        full = traces(None, batches[::2])
        taus = _thresholds(full)
        low, high = sorted(_predict(rule(float(tau)), full) for tau in (taus[0], taus[-1]))
        wanted = flops.depth(model, relative_flops)
        if not low - _ROUNDING <= wanted <= high + _ROUNDING:
            raise OutOfReach(
                f"calibrate expected relative_flops from {flops.relative(model, low):.4g}, where all tokens leave as "
                f"early as the rule lets them, to {flops.relative(model, high):.4g}, where all stay as long, got "
                f"{relative_flops}."
            )
        tau, depth = search(
            min(max(wanted, low), high),
            taus,
            predict=lambda tau: _predict(rule(tau), full),
            measure=lambda tau: _mean(trace.depth for trace in traces(rule(tau), batches[::2])),
        )
        unseen = _mean(trace.depth for trace in traces(rule(tau), batches[1::2]))
    return Calibration(rule(tau), tau, depth, flops.relative(model, depth), unseen, flops.relative(model, unseen))


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


def _thresholds(full: list[Trace]) -> Tensor:
    """All that differ in what they let leave, ascending: between neighbouring scores or products, and beyond them."""
    seen = [torch.zeros(1)]
    for trace in full:
        live = trace.live[..., :-1]
        seen += [trace.scores[live].cpu(), trace.scores.cumprod(-1)[live].cpu()]
    values = torch.cat(seen).double()
    values = values[values.isfinite()].unique()
    return torch.cat([values[:1] - 1, (values[1:] + values[:-1]) / 2, values[-1:] + 1])


def _predict(rule: Rule, full: list[Trace]) -> float:
    """The mean depth by `rule` if no score depended on who has left."""
    return _mean(_apply(rule, trace) for trace in full)


def _apply(rule: Rule, full: Trace) -> Tensor:
    mask = full.live[..., 0]
    positions = places(mask)
    remaining, depth = mask.to(full.scores.dtype), mask.long()
    for seen in range(1, full.scores.shape[-1] + 1):
        remaining = torch.minimum(rule(full.scores[..., :seen], remaining, positions), remaining)
        depth = depth + (remaining > 0)
    return depth


def _mean(depths: Iterable[Tensor]) -> float:
    """Over real tokens."""
    counts = [(int(depth.sum()), int((depth > 0).sum())) for depth in depths]
    total, real = (sum(column) for column in zip(*counts, strict=True))
    if not real:
        raise ValueError(
            "calibrate found nothing but padding in every second batch, from the first or the second on. Leave such "
            "batches out."
        )
    return total / real


def _arguments(model: AdaptiveForCausalLM | RecurrentWrapper, batch: Tensor | Mapping[str, Tensor]) -> dict[str, Any]:
    """What the model is called with for one batch."""
    if not isinstance(batch, Tensor | Mapping):
        raise ValueError(
            f"calibrate expected data to be batches, each a tensor or a mapping of the model's arguments, got a "
            f"{type(batch).__name__}. One batch alone goes into a list; split it for a part that is kept unseen."
        )
    device = next(model.parameters()).device
    if isinstance(model, RecurrentWrapper):
        arguments = {"x": batch} if isinstance(batch, Tensor) else batch
        return {name: value.to(device) for name, value in arguments.items()}
    arguments = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    read = {name: arguments[name].to(device) for name in ("input_ids", "attention_mask") if name in arguments}
    return {**read, "logits_to_keep": 1}


@contextmanager
def _measuring(
    model: nn.Module, loop: RecurrentWrapper
) -> Iterator[Callable[[Rule | None, list[dict[str, Any]]], list[Trace]]]:
    """Yields what runs batches by a rule; all is as before at the end."""
    before = loop.rule

    def traces(rule: Rule | None, batches: list[dict[str, Any]]) -> list[Trace]:
        loop.rule = rule
        return [model(**batch).trace for batch in batches]

    try:
        with evaluating(model):
            yield traces
    finally:
        loop.rule = before
