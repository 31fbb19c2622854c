"""Training in two stages: full depth for all tokens, then exits.

Stage 1 is told nothing of needed depths: cross-entropy at the last iteration alone. Stage 2 goes on from its weights,
with the cross-entropy of the state at which each token exits, and what the policy's gates learn from. What is trained
without exits goes through the same stages, with the same batches and learning rates.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

import adadepth as ad

from ..figures import cosine
from .model import Interpreter, Prediction
from .policies import Guided, Policy
from .task import Sample, Task

BATCH = 64
CHUNK = 16  # batches drawn at once, to save time
RATES = {1: 2e-3, 2: 1e-3}  # by stage; gates that move faster close too early
WARM = 100  # steps
PRIOR = 0.5  # weight of the mean over all iterations
K_MAX = 0.5
K_WARM = (0.1, 0.6)  # shares of stage 2 between which k grows


class Progress(NamedTuple):
    """One step of training: the loss in nats per token and the mean depth of its batch."""

    loss: float
    depth: float


class Losses(NamedTuple):
    """What a step minimises, and of what it says how it goes: the cross-entropy at the exits, and their trace."""

    total: Tensor
    at_exit: Tensor
    trace: ad.Trace


class Lines(Protocol):
    """What a model reads and what it is to say, each `(rows, length)` int64."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...
    def _replace(self, *, ids: Tensor, values: Tensor) -> Self: ...


Objective = Callable[[Interpreter, Lines, int], Losses]
Sampled = Callable[[Interpreter, Sample, int], Losses]  # an objective that may look at all of a sample
Depth = Callable[[Sample], int | Tensor]


def batches(task: Task, generator: torch.Generator) -> Iterator[Sample]:
    """Batches without end."""
    while True:
        yield from map(Sample, *(part.split(BATCH) for part in task.draw(CHUNK * BATCH, generator)))


def stage(
    model: Interpreter, number: int, steps: int, samples: Iterator[Sample], objective: Sampled
) -> Iterator[Progress]:
    """Stage 1 or 2: `steps` of training at its learning rate, one for each item that is asked for."""
    return optimise(model, steps, RATES[number], lambda step: objective(model, next(samples), step))


def optimise(model: Interpreter, steps: int, rate: float, losses: Callable[[int], Losses]) -> Iterator[Progress]:
    """AdamW on what `losses` gives at each step."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for step in range(steps):
        total, at_exit, trace = losses(step)
        optimiser.param_groups[0]["lr"] = rate * schedule(step, steps)
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        yield Progress(at_exit.item(), trace.depth.double().mean().item())


def objective_of(policy: Policy, steps: int) -> Objective:
    """What `steps` of stage 2 minimise."""
    if isinstance(policy.training, Guided):
        return guided(policy.training)
    weight = 0.0 if policy.training is None else policy.training.weight
    return penalised(policy, weight, steps) if weight else at_exits


def at_exits(model: Interpreter, lines: Lines, step: int) -> Losses:
    """The cross-entropy of the state at which each token exits."""
    del step
    return _at(model, lines, None)


def at_depth(depth: Depth) -> Sampled:
    """The cross-entropy of all tokens at a given depth, or at depths that are a function of the sample."""
    return lambda model, sample, step: _at(model, sample, depth(sample))


def _at(model: Interpreter, lines: Lines, depth: int | Tensor | None) -> Losses:
    out = model(lines.ids, depth=depth)
    loss = cross_entropy(out, lines.values)
    return Losses(loss, loss, out.trace)


def prior(model: Interpreter, lines: Lines, step: int) -> Losses:
    """Every iteration answers: the last one's cross-entropy, and the mean of all of them."""
    del step
    out = model(lines.ids, depth=model.shape.steps, every=True)
    each = each_iteration(out.logits, lines.values)
    return Losses(each[..., -1].mean() + PRIOR * each.mean(), each[..., -1].mean(), out.trace)


def each_iteration(logits: Tensor, values: Tensor) -> Tensor:
    """Nats `(rows, length, steps)` of the logits of every iteration, `(rows, length, steps, answers)`."""
    steps = logits.shape[-2]
    each = F.cross_entropy(logits.flatten(0, -2), values.repeat_interleave(steps), reduction="none")
    return each.view(*values.shape, steps)


def penalised(policy: Policy, weight: float, steps: int) -> Objective:
    """The same and a penalty, of which k grows, on what the policy's rule reads."""
    first, last = (int(share * steps) for share in K_WARM)
    bottom_k = ad.BottomKPenalty(K_MAX, warmup=(first, last))

    def objective(model: Interpreter, lines: Lines, step: int) -> Losses:
        loss, _, trace = at_exits(model, lines, step)
        penalty = bottom_k(getattr(trace, policy.reads), trace.live, step)
        return Losses(loss + weight * penalty, loss, trace)

    return objective


def guided(training: Guided) -> Objective:
    """Half of the batch leaves; in the other nobody does, every iteration answers, and gates learn what is to come."""

    def objective(model: Interpreter, lines: Lines, step: int) -> Losses:
        (stay, leave), (answers, others) = lines.ids.chunk(2), lines.values.chunk(2)
        out = model(stay, depth=model.shape.steps, every=True)
        logits = out.logits
        if training.before:
            logits = torch.cat([model.head(model.embed(stay)).unsqueeze(-2), logits], -2)
        each = each_iteration(logits, answers)
        earlier, last = each[..., :-1], each[..., -1:]
        # Not to the best of the later ones: where losses are noisy, noise alone makes one of them better.
        gain = (earlier[..., : out.trace.scores.shape[-1]] - last).detach()
        taught = last.mean() + training.earlier * earlier.mean() + F.mse_loss(out.trace.scores, gain)
        exits = at_exits(model, lines._replace(ids=leave, values=others), step)
        return Losses((taught + exits.total) / 2, *exits[1:])

    return objective


def cross_entropy(out: Prediction, values: Tensor) -> Tensor:
    """Nats per token."""
    return F.cross_entropy(out.logits.flatten(0, 1), values.flatten())


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate: a linear warm-up, then a cosine to a tenth."""
    return cosine(step, steps, min(WARM, max(1, steps // 10)))
