"""What a policy gets right, how deep it goes, and what the same weights do without it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .model import STEPS, Interpreter
from .policies import Policy
from .task import Programs

BATCH = 256
GRID = 512  # steps between thresholds, in quantiles


class Measured(NamedTuple):
    """Which lines are right, `(programs, 24)` bool, and the depths at which they left, int64."""

    right: Tensor
    depth: Tensor

    @property
    def accuracy(self) -> float:
        """The share of lines that are right."""
        return self.right.double().mean().item()

    @property
    def mean_depth(self) -> float:
        """Mean number of iterations per line."""
        return self.depth.double().mean().item()


@torch.inference_mode()
def measure(model: Interpreter, programs: Programs, depth: Tensor | None = None) -> Measured:
    """The model's own exits, or those given, `(programs, 24)`."""
    depths = [None] * len(programs.ids) if depth is None else depth.split(BATCH)
    batches = zip(programs.ids.split(BATCH), depths, strict=False)
    outs = [model(ids, depth=given) for ids, given in batches]
    predicted = torch.cat([out.logits.argmax(-1) for out in outs])
    return Measured(predicted == programs.values, torch.cat([out.trace.depth for out in outs]))


@torch.inference_mode()
def fixed(model: Interpreter, programs: Programs) -> list[Measured]:
    """Every line leaves after 1, 2, … iterations: all at once, since without exits iterations do not differ."""
    outs = [model(ids, depth=STEPS, every=True).logits.argmax(-1) for ids in programs.ids.split(BATCH)]
    right = torch.cat(outs) == programs.values.unsqueeze(-1)
    return [Measured(right[..., i], torch.full_like(programs.values, i + 1)) for i in range(STEPS)]


def at_mean(depths: list[Measured], mean: float) -> float:
    """The expected accuracy of the two fixed depths around `mean`, whole programs drawn so that they reach it."""
    return between([each.accuracy for each in depths], mean)


def between(values: Sequence[float], depth: float) -> float:
    """On the straight line between the two fixed depths around `depth`, of values at depth 1, 2, …"""
    low = min(int(depth), len(values) - 1)
    share = depth - low
    return (1 - share) * values[low - 1] + share * values[low]


@torch.inference_mode()
def thresholds(model: Interpreter, policy: Policy, programs: Programs) -> list[float]:
    """Quantiles of all that the policy's rule would compare with its threshold if nobody left, ascending."""
    traces = [model(ids, depth=STEPS).trace for ids in programs.ids.split(BATCH)]
    values = torch.cat([getattr(trace, policy.reads).flatten() for trace in traces]).double()
    return values.quantile(torch.linspace(0, 1, GRID + 1, dtype=torch.float64)).tolist()


def highest(model: Interpreter, policy: Policy, programs: Programs, good: Callable[[Measured], bool]) -> float | None:
    """The highest threshold at which what the policy does on `programs` is good; None if not even the lowest is.

    By bisection: it takes for granted that what is good at a threshold is good below it.
    """
    values = thresholds(model, policy, programs)
    low, high = -1, GRID
    while low < high:
        middle = (low + high + 1) // 2
        model.looped.rule = policy.rule(values[middle])
        low, high = (middle, high) if good(measure(model, programs)) else (low, middle - 1)
    return None if low < 0 else values[low]
