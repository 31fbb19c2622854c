"""The models of the study: how each is built and trained, and which rows of the table are its own.

All see the same batches at the same learning rates, for the same number of steps but for one without a loop, which is
trained for as many FLOPs as full depth. Those with exits go on from one model, trained at full depth in stage 1; the
others are trained from the start, for given depths or without a loop.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .model import Interpreter, Shape
from .plan import Plan
from .policies import GUIDED, READOUTS, TRAINED, Policy
from .task import Task
from .train import Depth, Sampled, at_depth, at_exits, objective_of, prior

FULL = "full depth"
PRIOR = "prior over depths"
NEEDED = "needed depth, trained in"
SHUFFLED = f"{GUIDED.name}, depths shuffled"
RANDOM = f"{GUIDED.name}, random depths"
ORACLE = f"{GUIDED.name}, needed depth"


class Model(NamedTuple):
    """A model: its shape, what a stage of so many steps minimises, its exits, and whose weights it goes on from.

    `rows` are the rows of the table that are measured on it. `depth` is that at which its tokens exit, if it is given.
    A model with `begins` has stage 2 alone to train, one that is trained `longer` has so many times the steps. What is
    `after` another needs rows of it.
    """

    name: str
    objective: Callable[[int], Sampled]
    shape: Shape
    rows: tuple[str, ...]
    policy: Policy | None = None
    depth: Depth | None = None
    begins: str = ""
    after: str = ""
    longer: float = 1.0

    def build(self, task: Task, seed: int) -> Interpreter:
        """With initial weights that are the same for all models of one shape."""
        torch.manual_seed(seed)
        return Interpreter(task.sizes, self.shape)

    def stages(self, plan: Plan) -> dict[int, int]:
        """The steps of each stage that it is trained in."""
        numbers = (1,) if self.name == FULL else (2,) if self.begins else (1, 2)
        return {number: round(self.longer * (plan.steps_1, plan.steps_2)[number - 1]) for number in numbers}


def fixed_name(depth: int) -> str:
    """The model that is trained at this depth, and its row."""
    return f"trained at depth {depth}"


def by_place(task: Task) -> dict[str, int]:
    """The models in which each token gets as many iterations as it may need, up to a depth; and their rows."""
    return {f"at most {depth}, by kind and place": depth for depth in task.fixed[1:]}


def readout_name(policy: Policy) -> str:
    """The row of a criterion on the model with a prior over depths."""
    return f"prior, {policy.name}"


def dense_names(task: Task) -> tuple[str, str, str]:
    """The models without a loop: distinct layers, the same trained for the FLOPs of full depth, and a wide layer."""
    layers = f"{task.dense} distinct layers"
    return layers, f"{layers}, longer", f"one layer, {wide(task)} wide"


def wide(task: Task) -> int:
    """The width at which one layer costs what `task.dense` layers of the usual width cost; heads divide it."""
    return 8 * round(Shape().dim * task.dense**0.5 / 8)


def models(task: Task) -> dict[str, Model]:
    """All of them, each after those that it needs."""
    looped = Shape(task.steps)
    layers, longer, width = dense_names(task)
    more = task.steps / task.dense
    all_of_them = [
        Model(FULL, lambda steps: at_exits, looped, ()),
        *(_exits(policy, looped) for policy in TRAINED),
        *(_fixed(depth, looped) for depth in task.fixed),
        *(_by_place(task, name, depth, looped) for name, depth in by_place(task).items()),
        Model(layers, lambda steps: at_exits, Shape(1, layers=task.dense), (layers,)),
        Model(longer, lambda steps: at_exits, Shape(1, layers=task.dense), (longer,), longer=more),
        Model(width, lambda steps: at_exits, Shape(1, dim=wide(task)), (width,)),
        Model(PRIOR, lambda steps: prior, looped, tuple(map(readout_name, READOUTS)), begins=FULL, after=GUIDED.name),
        _at(NEEDED, lambda sample: sample.needed, looped, begins=FULL),
    ]
    return {model.name: model for model in all_of_them}


def _exits(policy: Policy, shape: Shape) -> Model:
    rows = (policy.name, SHUFFLED, RANDOM, ORACLE) if policy is GUIDED else (policy.name,)
    return Model(policy.name, lambda steps: objective_of(policy, steps), shape, rows, policy, begins=FULL)


def _fixed(depth: int, shape: Shape) -> Model:
    return _at(fixed_name(depth), lambda sample: depth, shape, begins=_start(depth, shape))


def _by_place(task: Task, name: str, depth: int, shape: Shape) -> Model:
    return _at(name, lambda sample: task.most(sample.ids).clamp_max(depth), shape, begins=_start(depth, shape))


def _start(depth: int, shape: Shape) -> str:
    """The deepest go on from the full depth, which is their own stage 1; from the start, shallower ones learn more."""
    return FULL if depth == shape.steps else ""


def _at(name: str, depth: Depth, shape: Shape, begins: str) -> Model:
    """Trained and measured at a given depth."""
    return Model(name, lambda steps: at_depth(depth), shape, (name,), depth=depth, begins=begins)
