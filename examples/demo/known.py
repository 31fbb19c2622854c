"""A task in which each token's needed depth is known, and gates that learn it: short programs.

A line is a constant or a function of an earlier line, and predicts its own value; a chain of references needs as many
iterations. This is the study of `examples.programs`, small: guided gates, and models of a fixed depth beside them.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from adadepth.diagnostics import group_means
from examples.programs.evaluate import Measured, measure
from examples.programs.model import Interpreter, Shape
from examples.programs.plan import stream
from examples.programs.policies import GUIDED
from examples.programs.programs import Programs
from examples.programs.task import Sample
from examples.programs.train import at_depth, batches, objective_of, stage

from .train import Progress

TASK = Programs(name="short programs", lines=12, deepest=4, steps=4)
JUDGED = 1024  # programs
GATES = "programs, gates"
FIXED = {f"programs, fixed {depth}": depth for depth in (2, 3)}  # the depths around what the gates come to
NAMES = (GATES, *FIXED)


class Known(NamedTuple):
    """A training that is done: how it went, and its exits on programs that it has not seen."""

    history: list[Progress]
    measured: Measured


def held_out(seed: int) -> Sample:
    """The programs on which all are judged."""
    return TASK.draw(JUDGED, stream(seed, 2))


def train(name: str, steps: tuple[int, int], seed: int, model: Interpreter) -> Iterator[Progress]:
    """Both stages, a step for each item that is asked for; all see the same batches."""
    samples, depth = batches(TASK, stream(seed, 1)), FIXED.get(name, TASK.steps)
    first = at_depth(lambda sample: depth)
    for number, now in enumerate(stage(model, 1, steps[0], samples, first), 1):
        yield Progress(number, *now)
    if name == GATES:
        GUIDED.attach(model, GUIDED.tau)
    second = objective_of(GUIDED, steps[1]) if name == GATES else first
    for number, now in enumerate(stage(model, 2, steps[1], samples, second), steps[0] + 1):
        yield Progress(number, *now)


def begin(seed: int) -> Interpreter:
    """A new model; all begin with the same weights."""
    torch.manual_seed(seed)
    return Interpreter(TASK.sizes, Shape(steps=TASK.steps))


def judge(name: str, seed: int, model: Interpreter) -> Measured:
    """On programs that no training has seen, at the model's own exits or its fixed depth."""
    return measure(model.eval(), held_out(seed), FIXED.get(name))


def rows(results: Mapping[str, Known]) -> list[tuple[str, str, str]]:
    """A row for each: its name, its mean depth and how many lines are right."""
    return [(name, f"{measured.mean_depth:.2f}", f"{measured.accuracy:.1%}") for name, (_, measured) in results.items()]


COLUMNS = ("model", "mean depth", "lines right")


def verdict(results: Mapping[str, Known], needed: Tensor) -> Iterator[str]:
    """What the table says, in words."""
    gates = results[GATES].measured
    saved = 1 - gates.mean_depth / TASK.steps
    by_need = ", ".join(f"{need:.0f}: {mean:.2f}" for need, _, mean in group_means(gates.depth.double(), needed))
    yield f"The gates run {gates.mean_depth:.2f} of {TASK.steps} iterations: {saved:.0%} fewer than all."
    yield f"Mean depth by the iterations that a line needs: {by_need}."
    for name, depth in FIXED.items():
        more = results[name].measured.accuracy - gates.accuracy
        yield f"Trained at a fixed depth of {depth}: {abs(more):.1%} {'more' if more > 0 else 'fewer'} lines are right."
