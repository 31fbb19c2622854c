"""Held-out loss, depth and FLOPs under every policy, and what skipping is worth in seconds."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

import adadepth as ad
from adadepth.diagnostics import Measured, Score, forced, measure, mixture, oracle

from .jobs import BATCH, EXITS, Trained, fixed_name, score_with
from .model import AdaptiveLM

Draw = Callable[..., Tensor]  # of a shape, a number of steps, a mean depth and a generator

NOT_BEFORE = 2  # what leaves after one iteration shows others the keys of a bare embedding

KL = "KL of successive predictions"
# Exits that need no training, each of a head.
CRITERIA: dict[str, Callable[[nn.Module], ad.Gate]] = {
    "confidence (top probability)": ad.MaxProbGate,
    "convergence (relative change)": lambda head: ad.ConvergenceGate(),
    KL: ad.KLGate,
}


class Row(NamedTuple):
    """A policy by name, what it loses, and its FLOPs."""

    name: str
    measured: Measured
    flops: ad.Flops


class Timed(NamedTuple):
    """Best seconds of the same predictions, computed densely and packed, and the share of iterations that is live."""

    dense: float
    packed: float
    live: float


class Evaluation(NamedTuple):
    """All policies on the same windows of held-out bytes.

    `exits` is the learned one; `trained` were trained for one depth each; `line` mixes two of them at the FLOPs of
    `exits`, None if they are not there; `forced`, `criteria` and `random` are the weights of `exits`, with other
    exits, and `elsewhere` a criterion on those of the deepest trained model; the oracle picks by the label.
    """

    exits: Row
    trained: list[Row]
    line: Row | None
    forced: list[Row]
    criteria: list[Row]
    random: list[Row]
    elsewhere: list[Row]
    oracle: Row
    better: float
    timed: Timed


def evaluate(trained: Mapping[str, Trained], windows: Tensor, fitted: Tensor, seed: int, repeats: int) -> Evaluation:
    """Measure all policies on `windows (n, window + 1)`; thresholds of criteria are found on `fitted`."""
    model = trained[EXITS].model
    batches = windows.split(BATCH)
    exits = _row(EXITS, model, measure(score_with(model), batches))
    depth = min(max(exits.measured.mean_depth, NOT_BEFORE), model.shape.steps)
    timed = time_both(model, windows[: 2 * BATCH], repeats)
    fixed = [trained[name] for i in range(model.shape.steps) if (name := fixed_name(i + 1)) in trained]
    complete = [(each.model, each.measured) for each in fixed if each.measured is not None]
    with without_exits(model):
        curve = forced(score_with(model), batches, model.shape.steps)
        best, better = oracle(curve)
        found = _row("oracle", model, best)
        rows = [_row(f"forced to {i}", model, measured) for i, measured in enumerate(curve, 1)]
        equal = equal_depth(exits.flops, rows)
        criteria = [_criterion(name, model, batches, fitted, depth) for name in CRITERIA]
        random = list(_random(model, batches, equal, seed))
    ladder = [_row(f"trained at {i}", *each) for i, each in enumerate(complete, 1)]
    elsewhere, line = [], None
    if len(complete) == model.shape.steps:
        deepest, _ = complete[-1]
        line = _row(f"line at {equal:.2f}", deepest, mixture([row.measured for row in ladder], equal))
        with without_exits(deepest):
            row = _criterion(KL, deepest, batches, fitted, depth)
        elsewhere = [row._replace(name=f"KL, weights of {ladder[-1].name}")]
    return Evaluation(exits, ladder, line, rows, criteria, random, elsewhere, found, better, timed)


@contextmanager
def without_exits(model: AdaptiveLM) -> Iterator[None]:
    """The same weights and the plain update, with every byte at full depth, or as deep as it is told."""
    looped = model.looped
    before = model.router, looped.gate, looped.rule, looped.update
    model.router, looped.gate, looped.rule, looped.update = None, None, None, ad.Ungated(model.plain_update())
    try:
        yield
    finally:
        model.router, looped.gate, looped.rule, looped.update = before


def _criterion(name: str, model: AdaptiveLM, batches: tuple[Tensor, ...], fitted: Tensor, depth: float) -> Row:
    """Exits by one of `CRITERIA`, with the threshold that gives `depth` on other text."""
    looped = model.looped
    looped.gate = CRITERIA[name](nn.Sequential(model.norm, model.head))
    with torch.no_grad():
        rows = [{"x": model.embedding(part[:, :-1])} for part in fitted.split(BATCH // 4)]
    looped.rule = ad.calibrate(looped, rows, depth, lambda tau: ad.NotBefore(NOT_BEFORE, ad.Threshold(tau))).rule
    row = _row(name, model, measure(score_with(model), batches))
    looped.gate = looped.rule = None
    return row


def _random(model: AdaptiveLM, batches: tuple[Tensor, ...], depth: float, seed: int) -> Iterator[Row]:
    """Exits by chance at the given mean depth, and like the others not before iteration 2."""
    draws: dict[str, Draw] = {"uniform": ad.uniform_depths, "geometric": ad.geometric_depths}
    for name, draw in draws.items():
        generator, score = torch.Generator().manual_seed(seed), score_with(model)

        def drawn(
            windows: Tensor, score: Score = score, draw: Draw = draw, generator: torch.Generator = generator
        ) -> tuple[Tensor, Tensor]:
            shape = windows[:, 1:].shape
            depths = NOT_BEFORE - 1 + draw(shape, model.shape.steps - 1, depth - NOT_BEFORE + 1, generator)
            return score(windows, min_depth=depths, max_depth=depths)

        yield _row(f"{name} pruning", model, measure(drawn, batches))


def _row(name: str, model: AdaptiveLM, measured: Measured) -> Row:
    cost = ad.TokenFlops.measure(model.looped, model.shape.dim, once=[model.answer])
    depth, steps = measured.depth, model.shape.steps
    if not depth.is_floating_point():
        return Row(name, measured, cost.count(ad.depth_mask(depth, steps)))
    # A mixture of whole rows costs what its mean depth does, on the line from the first iteration to the last.
    first, last = (cost.count(ad.depth_mask(torch.full(depth.shape, end), steps)) for end in (1, steps))
    part = (measured.mean_depth - 1) / (steps - 1)
    return Row(name, measured, ad.Flops(*(a + (b - a) * part for a, b in zip(first, last, strict=True))))


def equal_depth(flops: ad.Flops, forced: list[Row]) -> float:
    """The mean depth at which bytes that are told their depth cost `flops`."""
    first, last = forced[0].flops.total, forced[-1].flops.total
    return min(len(forced), 1 + (len(forced) - 1) * (flops.total - first) / (last - first))


@torch.inference_mode()
def time_both(model: AdaptiveLM, windows: Tensor, repeats: int) -> Timed:
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
