"""Who decides when a token leaves: each policy a gate, an update, and a rule for every threshold."""

import math
from collections.abc import Callable
from typing import NamedTuple, final

from torch import Tensor, nn

import adadepth as ad

from .model import Interpreter

GUESS = math.log(5)  # all that a guess among five answers has to gain, in nats


class Training(NamedTuple):
    """How a policy is trained: with exits at threshold `tau`, and a penalty of `weight`."""

    tau: float
    weight: float = 0.0


class Guided(NamedTuple):
    """How gates that foretell are taught: `tau` is the price, in nats, at which half of each batch leaves.

    The other half stays to the end, and there every iteration answers: those before the last have weight `earlier`.
    With `before`, the gate of an iteration reads the state with which the iteration began, and the input answers too.
    """

    tau: float
    earlier: float = 0.3
    before: bool = False


class Policy(NamedTuple):
    """A gate, an update and a rule.

    `reads` is the property of a trace that the rule compares with its threshold and that a penalty pushes down:
    "gates" or "survival". `training` is None for what reads weights that were trained without exits.
    """

    name: str
    gate: Callable[[Interpreter], ad.Gate]
    rule: Callable[[float], ad.Rule]
    update: Callable[[], ad.Update] = ad.Replace
    reads: str = "gates"
    training: Training | Guided | None = None

    @property
    def tau(self) -> float:
        """The threshold of its training."""
        if self.training is None:
            raise ValueError(f"{self.name} is not trained.")
        return self.training.tau

    def attach(self, model: Interpreter, tau: float) -> None:
        """Give the model this policy, with new gates."""
        model.looped.gate, model.looped.update = self.gate(model), self.update()
        model.looped.rule = self.rule(tau)


def gates(model: Interpreter, hidden: int | None) -> ad.Gate:
    """Gates that start open for every token alike: larger weights let them close before they know for whom."""
    gate = ad.PerIterationMLPGate(model.shape.dim, model.shape.steps, hidden=hidden, bias=4.0)
    for weight in gate.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.02)
    return gate


@final
class Gains(ad.Gate):
    """What the rest of the loop is still worth to a token, in nats: it learns from the state, and does not shape it.

    The state is that after the iteration, or with `before` that with which it began.
    """

    def __init__(self, dim: int, steps: int, hidden: int = 16, before: bool = False) -> None:
        super().__init__()
        self.before = before
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 1)) for _ in range(steps - 1)
        )
        for mlp in self.mlps:
            nn.init.constant_(mlp.get_parameter("2.bias"), GUESS)

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        """What the MLP of iteration `step` expects."""
        return self.mlps[step]((previous if self.before else h).detach()).squeeze(-1)


def late(tau: float) -> ad.Rule:
    """The decision is one iteration old: a token stays for one more, in which others see its answer."""
    return ad.Lookahead(ad.Threshold(tau))


def guided(name: str, rule: Callable[[float], ad.Rule], before: bool = False) -> Policy:
    """Gates that foretell; with `before`, from the state with which an iteration began."""
    training = Guided(tau=0.2, before=before)
    return Policy(name, lambda model: Gains(model.shape.dim, model.shape.steps, before=before), rule, training=training)


PAPER = Policy(
    name="paper's gates",
    gate=lambda model: gates(model, hidden=None),
    rule=ad.Threshold,
    update=ad.Interpolate,
    training=Training(tau=0.05, weight=0.1),
)
SURVIVAL = Policy(
    name="survival gates",
    gate=lambda model: gates(model, hidden=16),
    rule=ad.SurvivalThreshold,
    update=lambda: ad.SurvivalScaled(ad.Interpolate()),
    reads="survival",
    training=Training(tau=0.05, weight=0.3),
)
TRAINED_ENTROPY = Policy(
    name="entropy late, trained",
    gate=lambda model: ad.EntropyGate(model.head),
    rule=late,
    training=Training(tau=0.2),
)
GUIDED = guided("guided gates", late)
# As above, a token that has its answer runs one more iteration. One that has it from the start runs once, not twice.
GUIDED_EARLY = guided("guided gates, early", ad.Threshold, before=True)
TRAINED = (GUIDED, GUIDED_EARLY, SURVIVAL, TRAINED_ENTROPY, PAPER)
# What reads the answers of weights that know no exits, and has no parameters.
READOUTS = (
    Policy("top probability", lambda model: ad.MaxProbGate(model.head), ad.Threshold),
    Policy("entropy", lambda model: ad.EntropyGate(model.head), ad.Threshold),
    Policy("entropy late", lambda model: ad.EntropyGate(model.head), late),
    Policy("KL", lambda model: ad.KLGate(model.head), ad.Threshold),
)
