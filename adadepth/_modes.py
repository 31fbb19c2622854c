"""Contexts for evaluation mode, without gradients, and for full precision."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

# Before, torch used the casts of weights that autocast keeps without gradients also where gradients are wanted.
_SEPARATES_CASTS = torch.__version__ >= "2.11"


def without_gradients() -> AbstractContextManager[Any]:
    """A context without gradients; what runs in it leaves no trace in a region of autocast around it."""
    if _SEPARATES_CASTS or torch.compiler.is_compiling():  # in a graph autocast keeps no casts
        return torch.no_grad()
    return _keeping_no_casts()


@contextmanager
def _keeping_no_casts() -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """A context with `modules` in eval mode and without gradients; at the end, every part has its mode from before.

    Quantised layers stay in training mode: in evaluation, bitsandbytes packs them on a CPU, and they lose gradients.
    """
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    for part, _ in before:
        if _quantised(part):
            part.training = True
    try:
        with without_gradients():
            yield
    finally:
        for part, training in before:
            part.training = training


def _quantised(part: nn.Module) -> bool:
    """Whether a layer's own weights are integers."""
    return any(not (w.is_floating_point() or w.is_complex()) for w in part.parameters(recurse=False))


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """A context without autocast, in which operators keep the dtypes of their inputs; `kind` is a device's type."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
