"""One seed of the study: stage 1 once, then every policy from the same weights."""

from collections.abc import Iterator
from copy import deepcopy
from typing import NamedTuple

import torch

import adadepth as ad

from .evaluate import Measured, at_mean, fixed, highest, measure
from .model import STEPS, Interpreter
from .policies import SURVIVAL, TRAINED, UNTRAINED, Policy
from .ranks import rank_correlation
from .task import Programs, draw
from .train import Progress, stage_1, stage_2

SHOWN = 3  # programs in the picture
EQUAL = 0.002  # a difference in accuracy that counts as none
GIVEN = "needed depth, given"


class Plan(NamedTuple):
    """Training steps of both stages, the programs a policy is judged on, and others that its threshold is fitted on."""

    steps_1: int = 2500
    steps_2: int = 1500
    judged: int = 2048
    fitted: int = 512

    @property
    def total(self) -> int:
        """Training steps of one seed."""
        return self.steps_1 + len(TRAINED) * self.steps_2


class Now(NamedTuple):
    """Where a seed is: what it does, training steps done of all, and the last step's loss and mean depth."""

    doing: str
    done: int
    loss: float
    depth: float


class Row(NamedTuple):
    """A policy on the programs it is judged on.

    `accuracy` is the share of lines that are right: `full` by the same weights without exits, `by_depth` at each fixed
    depth, `fixed` and `random` at fixed depths and with random exits of the same mean. `saved`: see
    `saved_at_equal_accuracy`; NaN where there is no threshold. `matrix[n - 1][u - 1]` counts the lines that needed n
    iterations and used u; `shown` are the depths of the first programs.
    """

    policy: str
    accuracy: float
    full: float
    mean_depth: float
    correlation: float
    saved: float
    fixed: float
    random: float
    by_depth: list[float]
    matrix: list[list[int]]
    shown: list[list[int]]


def stream(seed: int, use: int) -> torch.Generator:
    """Random numbers of their own for each seed and use: 0, 1 to train, 2 to be judged on, 3 to fit on, 4 exits."""
    return torch.Generator().manual_seed(5 * seed + use)


def judged(seed: int, plan: Plan) -> Programs:
    """The programs on which a seed's policies are judged."""
    return draw(plan.judged, stream(seed, 2))


def study(seed: int, plan: Plan) -> Iterator[Now | Row]:
    """Train and judge every policy; says where it is at every step of training."""
    torch.manual_seed(seed)
    model = Interpreter()
    yield from _progress("full depth", 0, stage_1(model, plan.steps_1, stream(seed, 0)))
    programs, others = judged(seed, plan), draw(plan.fitted, stream(seed, 3))
    mean, done = float(STEPS), plan.steps_1
    for policy in TRAINED:
        trained = deepcopy(model)
        yield from _progress(policy.name, done, stage_2(trained, policy, plan.steps_2, stream(seed, 1)))
        done += plan.steps_2
        row = judge(trained.eval(), policy, policy.tau, programs, others, stream(seed, 4))
        mean = row.mean_depth if policy is SURVIVAL else mean
        yield row
    model.eval()
    for policy in UNTRAINED:
        policy.attach(model, 0.0)
        tau = highest(model, policy, others, lambda exits: exits.mean_depth >= mean) or 0.0
        yield judge(model, policy, tau, programs, others, stream(seed, 4))
    given = measure(model, programs, programs.needed(STEPS))
    yield row_of(GIVEN, model, programs, given, float("nan"), stream(seed, 4))


def _progress(doing: str, before: int, steps: Iterator[Progress]) -> Iterator[Now]:
    for done, (loss, depth) in enumerate(steps, before + 1):
        yield Now(doing, done, loss, depth)


def judge(
    model: Interpreter, policy: Policy, tau: float, programs: Programs, others: Programs, generator: torch.Generator
) -> Row:
    """The row of a policy that is attached to the model, with threshold `tau`."""
    saved = saved_at_equal_accuracy(model, policy, programs, others)
    model.looped.rule = policy.rule(tau)
    return row_of(policy.name, model, programs, measure(model, programs), saved, generator)


def saved_at_equal_accuracy(model: Interpreter, policy: Policy, programs: Programs, others: Programs) -> float:
    """The share of the iterations that the policy saves while it gets as much right as the same weights in full.

    Its threshold is the highest whose accuracy on `others` is within 0.2 points of full depth; what that saves is
    counted on `programs`. 0 where no threshold saves anything.
    """
    enough = fixed(model, others)[-1].accuracy - EQUAL
    tau = highest(model, policy, others, lambda exits: exits.accuracy >= enough)
    if tau is None:
        return 0.0
    model.looped.rule = policy.rule(tau)
    return 1 - measure(model, programs).mean_depth / STEPS


def row_of(
    name: str, model: Interpreter, programs: Programs, exits: Measured, saved: float, generator: torch.Generator
) -> Row:
    """All that is said of exits on these weights."""
    needed, depths = programs.needed(STEPS), fixed(model, programs)
    drawn = ad.uniform_depths(exits.depth.shape, STEPS, exits.mean_depth, generator)
    pairs = (needed - 1) * STEPS + exits.depth - 1
    return Row(
        policy=name,
        accuracy=exits.accuracy,
        full=depths[-1].accuracy,
        mean_depth=exits.mean_depth,
        correlation=rank_correlation(needed, exits.depth),
        saved=saved,
        fixed=at_mean(depths, exits.mean_depth),
        random=measure(model, programs, drawn).accuracy,
        by_depth=[measured.accuracy for measured in depths],
        matrix=pairs.flatten().bincount(minlength=STEPS**2).view(STEPS, STEPS).tolist(),
        shown=exits.depth[:SHOWN].tolist(),
    )
