"""Training in two stages: full depth for all tokens, then exits.

Stage 1 is told nothing of levels and depths: cross-entropy at the last iteration alone. Stage 2 goes on from its
weights, with the cross-entropy of the state at which each token leaves.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import adadepth as ad

from .model import Interpreter, Prediction
from .policies import Policy
from .task import draw

BATCH = 64
RATES = {1: 2e-3, 2: 1e-3}  # by stage; gates that move faster close too early
WARM = 100  # steps
K_MAX = 0.5
K_WARM = (0.1, 0.6)  # shares of stage 2 between which k grows


class Progress(NamedTuple):
    """One step of training: the loss in nats per line and the mean depth of its batch."""

    loss: float
    depth: float


def stage_1(model: Interpreter, steps: int, generator: torch.Generator) -> Iterator[Progress]:
    """Train all tokens at full depth, one step for each item that is asked for."""
    return _train(model, steps, RATES[1], generator)


def stage_2(model: Interpreter, policy: Policy, steps: int, generator: torch.Generator) -> Iterator[Progress]:
    """Attach a policy and train with its exits, one step for each item that is asked for."""
    tau, weight = policy.training
    first, last = (int(share * steps) for share in K_WARM)
    bottom_k = ad.BottomKPenalty(K_MAX, warmup=(first, last))

    def penalty(trace: ad.Trace, step: int) -> Tensor:
        return weight * bottom_k(getattr(trace, policy.reads), trace.live, step)

    policy.attach(model, tau)
    return _train(model, steps, RATES[2], generator, penalty if weight else None)


def _train(
    model: Interpreter,
    steps: int,
    rate: float,
    generator: torch.Generator,
    penalty: Callable[[ad.Trace, int], Tensor] | None = None,
) -> Iterator[Progress]:
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(steps):
        programs = draw(BATCH, generator)
        out = model(programs.ids)
        loss = cross_entropy(out, programs.values)
        optimiser.param_groups[0]["lr"] = rate * schedule(step, steps)
        optimiser.zero_grad()
        (loss if penalty is None else loss + penalty(out.trace, step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        yield Progress(loss.item(), out.trace.depth.double().mean().item())


def cross_entropy(out: Prediction, values: Tensor) -> Tensor:
    """Nats per line."""
    return F.cross_entropy(out.logits.flatten(0, 1), values.flatten())


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate: a linear warm-up, then a cosine to a tenth."""
    warm = min(WARM, max(1, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / (steps - warm))
