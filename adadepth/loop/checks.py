"""Checks of a loop's pieces: each is of the right kind, goes with the others, and returns the right shape."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from .._given import integer, name_of, named
from ..attention.prepare import prepare
from ..gates import Gate
from ..rules import ACT, Lookahead, NotBefore, Rule, Survival, SurvivalThreshold, Threshold, TrainingOnly
from ..updates import InputInjection, Replace, Ungated, Update

PARTS = ("block", "gate", "rule", "update")
_ORDER = "The order is block, steps, gate, rule, update."
READ_CHANCES = (SurvivalThreshold, Survival, ACT)  # they take a score for the chance that the token continues
READ_SCORES = (Threshold, *READ_CHANCES)


def check_part(name: str, part: Any) -> Any:
    """The new value of `looped.<name>`, checked as in the constructor.

    Raises: `ValueError`.
    """
    if name == "update" and part is None:
        return Replace()
    if name == "block":
        _check_block(part)
    elif part is not None and (isinstance(part, type) or not _FITS[name](part)):
        raise ValueError(f"RecurrentWrapper expected {name} to be {_WANTED[name]}, got {_named(part)}. {_ORDER}")
    elif part is not None:
        _check_call(name, part)
    return part


def _check_call(name: str, part: Any) -> None:
    """Check that a piece accepts the arguments with which the loop calls it."""
    takes, call = _TAKES[name], part.forward if isinstance(part, nn.Module) else part
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):  # for a callable that is written in C
        return
    try:
        signature.bind(*takes)
    except TypeError:
        raise ValueError(
            f"The loop calls its {name} as {name}({', '.join(takes)}), but {getattr(part, '__name__', _named(part))} "
            f"takes ({', '.join(signature.parameters)}). Let it take all of these, also those that it does not read."
        ) from None


def _check_block(block: Any) -> None:
    if not isinstance(block, nn.Module):
        raise ValueError(f"RecurrentWrapper expected block to be an nn.Module, got {_named(block)}. {_ORDER}")
    prepare(block)


def check_steps(steps: Any) -> int:
    """The number of iterations, as a Python int.

    Raises: `ValueError`.
    """
    if (count := integer(steps)) is None:
        raise ValueError(f"RecurrentWrapper expected steps to be an int, got {named(steps)}. {_ORDER}")
    if count < 1:
        raise ValueError(f"RecurrentWrapper needs steps >= 1, got steps={count}.")
    return count


def _holds(kind: type[nn.Module], part: object) -> bool:
    """Whether `part` is of this kind, or a wrapper around such a module, as after sharding or compiling."""
    return isinstance(part, kind) or (
        isinstance(part, nn.Module)
        and not isinstance(part, Gate | Update)
        and any(isinstance(inner, kind) for inner in part.modules())
    )


_FITS = {
    "gate": lambda part: _holds(Gate, part),
    "rule": lambda part: callable(part) and not isinstance(part, Gate | Update),
    "update": lambda part: _holds(Update, part),
}
_TAKES = {
    "gate": ("h", "previous", "step"),
    "rule": ("scores", "remaining", "positions"),
    "update": ("x", "h", "start", "scores", "step"),
}
_WANTED = {
    "gate": "an adadepth.Gate",
    "rule": "a function or a callable object",
    "update": "an adadepth.Update",
}


def _named(part: object) -> str:
    return f"the class {part.__name__}; call it" if isinstance(part, type) else type(part).__name__


def warn_of(gate: nn.Module | None, rule: object, update: nn.Module, steps: int) -> None:
    """Warn of combinations of pieces that are allowed but seldom intended."""
    rule = inside(rule)
    if gate is None and isinstance(rule, READ_SCORES):
        warnings.warn(
            f"RecurrentWrapper has {type(rule).__name__} as its rule, which reads scores, but no gate: every score is "
            "1. Give it a gate, or no rule.",
            stacklevel=3,
        )
    if getattr(gate, "measures", False) and isinstance(rule, READ_CHANCES):
        warnings.warn(
            f"RecurrentWrapper has an exit criterion, {type(gate).__name__}, whose score is a measurement, but "
            f"{type(rule).__name__} reads a score as a chance. Use adadepth.Threshold(tau), with tau in the unit of "
            "the measurement.",
            stacklevel=3,
        )
    if gate is not None and rule is None and isinstance(update, Replace | InputInjection | Ungated):
        warnings.warn(
            f"RecurrentWrapper has a gate, but no rule, and {type(update).__name__} does not use the score: the gate "
            "affects only trace.scores. Give it a rule, such as adadepth.Threshold(0.5).",
            stacklevel=3,
        )
    if isinstance(made_for := getattr(gate, "steps", None), int) and made_for > steps:
        warnings.warn(
            f"{type(gate).__name__} was made for {made_for} steps, but the loop has {steps}: its parameters for later "
            "iterations are not used.",
            stacklevel=3,
        )
    elif isinstance(made_for, int) and made_for < steps:
        warnings.warn(
            f"{type(gate).__name__} was made for {made_for} steps, but the loop has {steps}: it raises an error if "
            f"a token reaches iteration {made_for - 1}, counted from 0. Give both the same steps.",
            stacklevel=3,
        )


def inside(rule: object) -> object:
    """The rule inside those that only change when it decides, or for what it is."""
    while isinstance(rule, Lookahead | NotBefore | TrainingOnly):
        rule = rule.rule
    return rule


def check_together(gate: nn.Module | None, update: nn.Module) -> None:
    """Check that the update does not multiply by the score of an exit criterion.

    Raises: `ValueError`.
    """
    if gate is not None and getattr(gate, "measures", False) and getattr(update, "scales", False):
        raise ValueError(
            f"{type(gate).__name__} is an exit criterion: its score is a measurement, not a factor, but "
            f"{type(update).__name__} multiplies by it. Give the loop update=adadepth.Replace() or "
            f"adadepth.Ungated({type(update).__name__}(...))."
        )


@final
class Identity:
    """The identity by which a cache recognizes its wrapper; copies of a wrapper that share its parts share it too."""


def check_scores(looped: Any, step: int, least_and_most: list[float]) -> None:
    """Check, from their minimum and maximum, that scores are not NaN, and are in [0, 1] if they must be.

    Raises: `ValueError`. Warns once of a score outside [0, 1] that scales, or that the rule reads as a chance.
    """
    low, high = least_and_most
    if low != low:
        raise ValueError(
            f"{type(looped.gate).__name__} scored NaN at iteration {step}. Look for inf or NaN in the gate's "
            "parameters, or in the block's output: without a gate, looped(x, states=True).states holds the state of "
            "every iteration."
        )
    if (low < 0 or high > 1) and (why := _wants_chances(looped)) and not looped.__dict__.get("_warned"):
        looped.__dict__["_warned"] = True
        use, instead = why
        warnings.warn(
            f"{type(looped.gate).__name__} scored {low if low < 0 else high:.3g} at iteration {step}, and {use}. End a "
            f"learned gate in a sigmoid; for a score that is not in [0, 1], use {instead}.",
            stacklevel=2,
        )


def _wants_chances(looped: Any) -> tuple[str, str] | None:
    """What in the loop needs scores in [0, 1], and what to use instead of it; None if nothing does."""
    rule = inside(looped.rule)
    if getattr(looped.update, "scales", False):
        return f"{type(looped.update).__name__} multiplies by it", "adadepth.Replace() or adadepth.Ungated(...)"
    if isinstance(rule, READ_CHANCES):
        return f"{type(rule).__name__} reads it as a chance", "adadepth.Threshold(tau)"
    return None


def check_state(looped: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Check that weights, named by `prefix` and their name, are those of a wrapper, not of the block without it.

    Raises: `ValueError`.
    """
    names = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    if not names or any(name.startswith("block.") for name in names):
        return
    bare = names & looped.get_submodule("block").state_dict().keys()
    if bare != names or names <= looped.state_dict().keys():
        return
    if prefix:
        name = min(bare)
        remedy = f"Rename them, such as {prefix}{name} to {prefix}block.{name}."
    else:
        remedy = "Load them into it: looped.block.load_state_dict(state)."
    raise ValueError(
        f"RecurrentWrapper.load_state_dict expected names that begin with '{prefix}block.', '{prefix}gate.' or "
        f"'{prefix}update.', got those of the bare block. {remedy}"
    )


def check_any_row(rule: Rule, what: str, device: torch.device) -> None:
    """Check that a rule accepts any row: for a single token, `what` it returns must have the shape of one.

    Raises: `ValueError`.
    """
    one = torch.ones(1, 1, device=device)
    check_result(rule, what, one.shape, rule(one.unsqueeze(2), one, one.long()), 0)


def check_result(piece: object, what: str, shape: torch.Size, result: Any, step: int) -> None:
    """Check what a gate, a rule or an update returned at iteration `step`.

    Raises: `ValueError`.
    """
    if isinstance(result, Tensor) and result.shape == shape:
        return
    got = str(tuple(result.shape)) if isinstance(result, Tensor) else f"a {type(result).__name__}"
    raise ValueError(
        f"{name_of(piece)} expected to return {what}, shape {tuple(shape)}, got {got} at iteration {step}."
        f"{_remedy(piece, shape, result)}"
    )


def _remedy(piece: object, shape: torch.Size, result: Any) -> str:
    """What to do about a result that is not a tensor of this shape; empty where it is plain."""
    if result is None:
        return " Does it end without a return?"
    if not isinstance(result, Tensor):
        return " Return it alone."
    if isinstance(piece, Gate):
        return " Reduce the last axis of the state alone, as h.mean(-1) does; a linear layer ends in .squeeze(-1)."
    if not isinstance(piece, Update):
        return " Compute it from remaining, and reduce the last axis of the scores alone, as scores[..., -1] does."
    if result.dim() != len(shape):
        return " To scale by a score, keep its axis: write scores[..., -1:], not scores[..., -1]."
    return ""
