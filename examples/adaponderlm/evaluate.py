"""Held-out loss and depth of the same weights under several policies, and what skipping is worth in seconds."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

import adadepth as ad

from .model import AdaptiveLM
from .train import nll

BATCH = 32


class Measured(NamedTuple):
    """The loss of each held-out byte in nats, `(windows, window)`, and the depth at which it was predicted."""

    loss: Tensor
    depth: Tensor

    @property
    def nats(self) -> float:
        """Mean loss per byte."""
        return self.loss.mean().item()

    @property
    def mean_depth(self) -> float:
        """Mean number of iterations per byte."""
        return self.depth.double().mean().item()

    def against(self, other: "Measured") -> tuple[float, float]:
        """How much more this loses than `other`, and the standard error of that, windows being independent."""
        difference = (self.loss - other.loss).mean(1)
        return difference.mean().item(), difference.std().item() / len(difference) ** 0.5


class Timed(NamedTuple):
    """Best seconds of the same predictions, computed densely and packed, and the share of iterations that is live."""

    dense: float
    packed: float
    live: float


@torch.inference_mode()
def learned(model: AdaptiveLM, windows: Tensor) -> Measured:
    """Every byte leaves when its gate says so."""
    parts = []
    for batch in windows.split(BATCH):
        prediction = model(batch[:, :-1])
        parts.append((nll(prediction.logits, batch[:, 1:]), prediction.trace.depth))
    return _join(parts)


@torch.inference_mode()
def forced(model: AdaptiveLM, windows: Tensor) -> list[Measured]:
    """Every byte leaves after 1, 2, … iterations: all at once, since without exits iterations do not differ."""
    steps = model.shape.steps
    losses = []
    for batch in windows.split(BATCH):
        logits = model(batch[:, :-1], min_depth=steps, every=True).logits
        losses.append(nll(logits, batch[:, 1:, None].expand(-1, -1, steps)))
    loss = torch.cat(losses)
    return [Measured(loss[..., i], torch.full(loss.shape[:2], i + 1)) for i in range(steps)]


@torch.inference_mode()
def random(model: AdaptiveLM, windows: Tensor, mean: float, generator: torch.Generator) -> Measured:
    """Bytes leave by chance at the given mean depth, and like the learned exits not before iteration 2."""
    parts = []
    for batch in windows.split(BATCH):
        depth = 1 + ad.uniform_depths(batch[:, :-1].shape, model.shape.steps - 1, mean - 1, generator)
        prediction = model(batch[:, :-1], min_depth=depth, max_depth=depth)
        parts.append((nll(prediction.logits, batch[:, 1:]), prediction.trace.depth))
    return _join(parts)


@torch.inference_mode()
def timed(model: AdaptiveLM, windows: Tensor, repeats: int) -> Timed:
    """Both executions of each batch in turn, best of `repeats`, so that a slow moment of the machine meets both."""
    batches = windows[:, :-1].split(BATCH)
    seconds = {True: 0.0, False: 0.0}
    for batch in batches:
        best = dict.fromkeys(seconds, float("inf"))
        for _ in range(repeats):
            for skip in best:
                model.looped.skip = skip
                start = time.perf_counter()
                model(batch)
                best[skip] = min(best[skip], time.perf_counter() - start)
        seconds = {skip: seconds[skip] + best[skip] for skip in best}
    model.looped.skip = True
    live = ad.live_share(torch.cat([model(batch).trace.live for batch in batches]))
    return Timed(seconds[False], seconds[True], live)


def _join(parts: list[tuple[Tensor, Tensor]]) -> Measured:
    losses, depths = zip(*parts, strict=True)
    return Measured(torch.cat(losses), torch.cat(depths))


class Evaluation(NamedTuple):
    """Every policy on the same held-out windows; `forced[i]` is depth i + 1."""

    learned: Measured
    mixture: Measured
    random: Measured
    forced: list[Measured]
    timed: Timed


def evaluate(model: AdaptiveLM, windows: Tensor, generator: torch.Generator, repeats: int) -> Evaluation:
    """Measure all policies on `windows (n, window + 1)` of held-out bytes."""
    model.eval()
    exits = learned(model, windows)
    fixed = forced(model, windows)
    return Evaluation(
        learned=exits,
        mixture=mixture(fixed, exits.mean_depth),
        random=random(model, windows, exits.mean_depth, generator),
        forced=fixed,
        timed=timed(model, windows[: 2 * BATCH], repeats),
    )


def mixture(fixed: list[Measured], mean: float) -> Measured:
    """The expected loss of the two fixed depths around `mean`, whole windows drawn so that they reach it."""
    low = min(int(mean), len(fixed) - 1)
    pairs = zip(fixed[low - 1], fixed[low], strict=True)
    return Measured(*(torch.lerp(a.double(), b.double(), mean - low) for a, b in pairs))
