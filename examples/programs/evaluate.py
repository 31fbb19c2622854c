"""What a model gets right, what it loses, how deep it goes, and what that costs."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import adadepth as ad

from .model import Interpreter
from .policies import Policy
from .task import Sample

BATCH = 256
GRID = 512  # steps between thresholds, in quantiles


class Measured(NamedTuple):
    """Which tokens are right, bool; their nats; the depths at which they exited, int64; which of them count.

    All of shape `(sequences, length)`. Accuracy and loss are those of the tokens that count, depth is that of all.
    """

    right: Tensor
    nats: Tensor
    depth: Tensor
    counted: Tensor

    @property
    def accuracy(self) -> float:
        """The share of tokens that are right."""
        return self.right[self.counted].double().mean().item()

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats[self.counted].double().mean().item()

    @property
    def mean_depth(self) -> float:
        """Mean number of iterations per token."""
        return self.depth.double().mean().item()


@torch.inference_mode()
def measure(model: Interpreter, sample: Sample, depth: Tensor | int | None = None) -> Measured:
    """The model's own exits, or those given: one for all, or `(sequences, length)`."""
    depths = depth.split(BATCH) if isinstance(depth, Tensor) else [depth] * len(sample.ids)
    outs = [model(ids, depth=given) for ids, given in zip(sample.ids.split(BATCH), depths, strict=False)]
    logits = torch.cat([out.logits for out in outs])
    nats = F.cross_entropy(logits.transpose(1, 2), sample.values, reduction="none")
    used = torch.cat([out.trace.depth for out in outs])
    return Measured(logits.argmax(-1) == sample.values, nats, used, sample.counted)


@torch.inference_mode()
def cut(model: Interpreter, sample: Sample) -> list[Measured]:
    """Every token exits after 1, 2, … iterations: all at once, since without exits iterations do not differ."""
    steps = model.shape.steps
    logits = torch.cat([model(ids, depth=steps, every=True).logits for ids in sample.ids.split(BATCH)])
    values = sample.values
    return [
        Measured(
            each.argmax(-1) == values,
            F.cross_entropy(each.transpose(1, 2), values, reduction="none"),
            torch.full_like(values, i),
            sample.counted,
        )
        for i, each in enumerate(logits.unbind(2), 1)
    ]


def between(values: Sequence[float], depth: float) -> float:
    """On the straight line between the two fixed depths around `depth`, of values at depth 1, 2, …"""
    low = min(int(depth), len(values) - 1)
    share = depth - low
    return (1 - share) * values[low - 1] + share * values[low]


def flops(model: Interpreter, depth: Tensor) -> float:
    """FLOPs per token of a pass at these depths: block, attention, head, and the gate that the model has."""
    cost = ad.TokenFlops.measure(model.looped, model.shape.dim, once=[model.head])
    return cost.count(ad.depth_mask(depth, model.shape.steps)).total / depth.numel()


def seconds(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The best time of each run, all of them in turn, so that a slow moment of the machine meets all alike."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


@torch.inference_mode()
def thresholds(model: Interpreter, policy: Policy, sample: Sample) -> list[float]:
    """Quantiles of all that the policy's rule would compare with its threshold if no token exited, ascending."""
    traces = [model(ids, depth=model.shape.steps).trace for ids in sample.ids.split(BATCH)]
    values = torch.cat([getattr(trace, policy.reads).flatten() for trace in traces]).double()
    return values.quantile(torch.linspace(0, 1, GRID + 1, dtype=torch.float64)).tolist()


def highest(model: Interpreter, policy: Policy, sample: Sample, good: Callable[[Measured], bool]) -> float | None:
    """The highest threshold at which what the policy does on `sample` is good; None if not even the lowest is.

    By bisection: it takes for granted that what is good at a threshold is good below it.
    """
    values = thresholds(model, policy, sample)
    low, high = -1, GRID
    while low < high:
        middle = (low + high + 1) // 2
        model.looped.rule = policy.rule(values[middle])
        low, high = (middle, high) if good(measure(model, sample)) else (low, middle - 1)
    return None if low < 0 else values[low]
