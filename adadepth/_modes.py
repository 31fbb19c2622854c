"""Contexts for evaluation mode and for full precision."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """A context with `modules` in eval mode and without gradients; at the end, every part has its mode from before."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in before:
            part.training = training


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """A context without autocast, in which operators keep the dtypes of their inputs; `kind` is a device's type."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
