"""Reads integers, and describes a wrong argument, a piece or an exception in an error message."""

import inspect
import operator
from types import NoneType
from typing import Any

import torch
from torch import Tensor


def integer(given: Any) -> int | None:
    """An integer of Python, of NumPy or of a tensor as an int; None for a bool and for anything else."""
    if isinstance(given, bool) or (isinstance(given, Tensor) and given.dtype is torch.bool):
        return None
    try:
        return operator.index(given)
    except TypeError:
        return None


def text_of(error: Exception) -> str:
    """The name and the text of an exception; the name alone if it has no text."""
    name, text = type(error).__name__, str(error)
    return f"{name}: {text}" if text else name


def named(given: object) -> str:
    """A description of what came: a number or string itself, a tensor by its shape, anything else by its type."""
    if isinstance(given, type):
        return f"the class {given.__name__}"
    if isinstance(given, Tensor):
        return f"a tensor of shape {tuple(given.shape)} {given.dtype}"
    return repr(given) if type(given) in (NoneType, bool, int, float, str) else type(given).__name__


def shown(given: object) -> str:
    """The shape and dtype of a tensor; of anything else the same as `named`."""
    return f"{tuple(given.shape)} {given.dtype}" if isinstance(given, Tensor) else named(given)


def name_of(piece: object) -> str:
    """The name of a function, or that of an object's class."""
    name: str = getattr(piece, "__name__", type(piece).__name__)
    return name


def unfit(expected: str, given: object, advice: str) -> ValueError:
    """The error for an argument of a wrong kind, with the `advice`; or, if a class came, the advice to call it."""
    if isinstance(given, type):
        advice = f"Call it: {given.__name__}({'...' if _wants_arguments(given) else ''})."
    return ValueError(f"{expected}, got {named(given)}. {advice}")


def _wants_arguments(kind: type) -> bool:
    try:
        parameters = inspect.signature(kind).parameters.values()
    except ValueError:  # for a class that is written in C
        return False
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
