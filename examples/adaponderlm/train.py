"""Training in two stages: full depth for all tokens, then gates that learn who may leave.

Gates that move from the start close before they know anything, and a token that left gives no gradient that could
bring it back. So they come late, open, slow and small, and the penalty on them grows from nothing.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import adadepth as ad

from .model import AdaptiveLM
from .text import random_windows


class Recipe(NamedTuple):
    """`steps` of training on `batch` windows of `window` bytes, the first `open_share` of them without exits.

    The penalty is `weight` times the mean of the smallest share `k` of the survival values, halted ones counting as
    0; k grows from 0 to `k_max` over the part `warm` of the second stage.
    """

    steps: int
    batch: int = 8
    window: int = 128
    lr: float = 4e-3
    open_share: float = 0.4
    gate_lr: float = 0.1
    gate_hidden: int = 16
    gate_bias: float = 4.0
    tau: float = 0.3  # at 0.05 the gates must shrink an update to nothing before it is saved
    weight: float = 0.3
    k_max: float = 0.5
    warm: tuple[float, float] = (0.1, 0.6)


class Progress(NamedTuple):
    """One step of training: the stage (1 or 2), the loss in nats per byte and the mean depth of its batch."""

    stage: int
    loss: float
    depth: float


def train(model: AdaptiveLM, data: Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[Progress]:
    """Train on `data (n,)` uint8, one step for each item that is asked for."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), recipe.lr, betas=(0.9, 0.95), weight_decay=0.01)
    first = math.ceil(recipe.open_share * recipe.steps)
    for step in range(recipe.steps):
        if step == first:
            optimiser.add_param_group({"params": allow_exits(model, recipe), "scale": recipe.gate_lr})
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * schedule(step, recipe.steps) * group.get("scale", 1.0)
        windows = random_windows(data, recipe.batch, recipe.window, generator)
        part = (step - first) / (recipe.steps - first)
        yield _step(model, optimiser, windows, recipe, part)


def _step(
    model: AdaptiveLM, optimiser: torch.optim.Optimizer, windows: Tensor, recipe: Recipe, part: float
) -> Progress:
    prediction = model(windows[:, :-1])
    loss = nll(prediction.logits, windows[:, 1:]).mean()
    optimiser.zero_grad()
    (loss + penalty(prediction.trace, recipe, part)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return Progress(1 if part < 0 else 2, loss.item(), prediction.trace.depth.double().mean().item())


def allow_exits(model: AdaptiveLM, recipe: Recipe) -> list[torch.nn.Parameter]:
    """Begin the second stage: give the loop a gate and a rule. Returns the gate's parameters."""
    shape = model.shape
    model.looped.gate = ad.PerIterationMLPGate(shape.dim, shape.steps, recipe.gate_hidden, recipe.gate_bias)
    model.looped.rule = ad.SurvivalThreshold(recipe.tau)
    return list(model.looped.gate.parameters())


def penalty(trace: ad.Trace, recipe: Recipe, part: float) -> Tensor:
    """What going on costs, `part` of the second stage into it; below 0 is the first stage."""
    begin, end = recipe.warm
    k = recipe.k_max * min(1.0, (part - begin) / (end - begin))
    if k <= 0:
        return trace.scores.new_zeros(())
    return recipe.weight * ad.bottom_k(trace.survival, k).mean()


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats per byte, shaped like `targets`; `logits` have one more axis."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate: a linear warm-up over a twentieth of the steps, then a cosine to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / (steps - warm))
