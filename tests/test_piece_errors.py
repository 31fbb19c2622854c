"""Every error of what a user composes, where pieces stand in each other's place or are given something else."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import adadepth

ad: Any = adadepth  # takes what no type allows

pytestmark = pytest.mark.plain

RULES: dict[str, tuple[Callable[[], object], str]] = {
    "tau a string": (
        lambda: ad.Threshold("0.5"),
        "Threshold expected tau to be a number or a tensor, got '0.5'. Write it as in Threshold(0.5).",
    ),
    "tau a bool": (
        lambda: ad.SurvivalThreshold(True),
        "SurvivalThreshold expected tau to be a number or a tensor, got True. Write it as in SurvivalThreshold(0.5).",
    ),
    "tau a list": (
        lambda: ad.Threshold([0.5]),
        "Threshold expected tau to be a number or a tensor, got list. Write it as in Threshold(0.5).",
    ),
    "eps one": (lambda: ad.ACT(1), "ACT expected eps, a number in [0, 1), got 1. The paper's is 0.01."),
    "eps a string": (lambda: ad.ACT(eps="x"), "ACT expected eps, a number in [0, 1), got 'x'. The paper's is 0.01."),
    "lookahead of a number": (
        lambda: ad.Lookahead(0.5),
        "Lookahead expected rule to be a rule, got 0.5. Give it one, such as Threshold(0.5).",
    ),
    "lookahead of a class": (
        lambda: ad.Lookahead(ad.Survival),
        "Lookahead expected rule to be a rule, got the class Survival. Call it: Survival().",
    ),
    "lookahead of a class with arguments": (
        lambda: ad.Lookahead(ad.Threshold),
        "Lookahead expected rule to be a rule, got the class Threshold. Call it: Threshold(...).",
    ),
    "iteration 0": (
        lambda: ad.NotBefore(0, ad.Threshold(0.5)),
        "NotBefore expected first, an iteration, to be an int from 1, got 0. The order is NotBefore(first, rule).",
    ),
    "half an iteration": (
        lambda: ad.NotBefore(2.5, ad.Threshold(0.5)),
        "NotBefore expected first, an iteration, to be an int from 1, got 2.5. The order is NotBefore(first, rule).",
    ),
    "lookahead's order": (
        lambda: ad.NotBefore(ad.Threshold(0.5), 2),
        "NotBefore expected first, an iteration, to be an int from 1, got Threshold. The order is NotBefore(first, "
        "rule).",
    ),
    "not before, of nothing": (
        lambda: ad.NotBefore(2, None),
        "NotBefore expected rule to be a rule, got None. Give it one, such as Threshold(0.5).",
    ),
    "training only, hidden": (
        lambda: ad.NotBefore(2, ad.TrainingOnly(ad.Survival())),
        "NotBefore expected a rule that works in decoding, got TrainingOnly. Wrap the outer rule instead: "
        "TrainingOnly(NotBefore(...)).",
    ),
    "training only, of a class": (
        lambda: ad.TrainingOnly(ad.Survival),
        "TrainingOnly expected rule to be a rule, got the class Survival. Call it: Survival().",
    ),
}
UPDATES: dict[str, tuple[Callable[[], object], str]] = {
    "a class": (
        lambda: ad.SurvivalScaled(ad.Interpolate),
        "SurvivalScaled expected update to be an adadepth.Update, got the class Interpolate. Call it: Interpolate().",
    ),
    "a class of another kind": (
        lambda: ad.Ungated(dict),
        "Ungated expected update to be an adadepth.Update, got the class dict. Call it: dict().",
    ),
    "a number": (
        lambda: ad.Ungated(3),
        "Ungated expected update to be an adadepth.Update, got 3. Wrap one: Ungated(Interpolate()).",
    ),
    "a gate": (
        lambda: ad.ReZero(ad.ConvergenceGate()),
        "ReZero expected update to be an adadepth.Update, got ConvergenceGate. Wrap one: ReZero(Interpolate()).",
    ),
}
SUITES: dict[str, tuple[Callable[[], object], str]] = {
    "a gate's class": (
        lambda: ad.testing.check_gate(ad.LinearGate, 8),
        "check_gate expected an adadepth.Gate, got the class LinearGate. Call it: LinearGate(...).",
    ),
    "a layer": (
        lambda: ad.testing.check_gate(nn.Linear(8, 1), 8),
        "check_gate expected an adadepth.Gate, got Linear. Write it as a subclass of Gate.",
    ),
    "a gate's update's class": (
        lambda: ad.testing.check_gate(ad.LinearGate(8), 8, update=ad.Replace),
        "check_gate expected update to be an adadepth.Update, got the class Replace. Call it: Replace().",
    ),
    "a rule's class": (
        lambda: ad.testing.check_rule(ad.Survival),
        "check_rule expected a rule, got the class Survival. Call it: Survival().",
    ),
    "a threshold": (
        lambda: ad.testing.check_rule(0.5),
        "check_rule expected a rule, got 0.5. Give it one, such as Threshold(0.5).",
    ),
    "an update's class": (
        lambda: ad.testing.check_update(ad.Interpolate, 8),
        "check_update expected an adadepth.Update, got the class Interpolate. Call it: Interpolate().",
    ),
}
TABLES = {"rule": RULES, "update": UPDATES, "suite": SUITES}
ERRORS = {f"{kind}, {name}": case for kind, cases in TABLES.items() for name, case in cases.items()}


@pytest.mark.parametrize("name", ERRORS)
def test_the_message(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_a_rule_is_training_only_only_where_it_is_said() -> None:
    assert isinstance(ad.TrainingOnly(ad.TrainingOnly(ad.Survival())), ad.TrainingOnly)
    assert not isinstance(ad.Lookahead(ad.Survival()), ad.TrainingOnly)
