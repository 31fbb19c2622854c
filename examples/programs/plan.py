"""How much of everything a study takes, and what identifies its results."""

from dataclasses import asdict, is_dataclass
from typing import Any, NamedTuple

import torch

from . import train
from .policies import TRAINED
from .task import Sample, Task


class Plan(NamedTuple):
    """Training steps of both stages, sequences to judge on, others to fit thresholds on, and rounds of timing."""

    steps_1: int
    steps_2: int
    judged: int = 2048
    fitted: int = 512
    rounds: int = 7


QUICK = Plan(steps_1=4, steps_2=4, judged=32, fitted=16, rounds=1)


def stream(seed: int, use: int) -> torch.Generator:
    """Random numbers of their own for each seed and use: 0, 1 to train, 2 to be judged on, 3 to fit on, 4 exits."""
    return torch.Generator().manual_seed(5 * seed + use)


def judged(task: Task, seed: int, plan: Plan) -> Sample:
    """The sequences on which a seed's models are judged."""
    return task.draw(plan.judged, stream(seed, 2))


def settings(task: Task, seed: int, plan: Plan) -> dict[str, Any]:
    """All that a row depends on; rows that differ in it cannot stand in one table."""
    assert is_dataclass(task)
    assert not isinstance(task, type)
    recipe = {name: getattr(train, name) for name in ("BATCH", "RATES", "WARM", "PRIOR", "K_MAX", "K_WARM")}
    policies = {policy.name: policy.training and policy.training._asdict() for policy in TRAINED}
    of_task = {f"task {name}": value for name, value in asdict(task).items()}
    return {"seed": seed, **of_task, **plan._asdict(), **recipe, **policies}
