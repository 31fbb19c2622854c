"""Modules that another module refers to without registering them."""

from collections.abc import Iterator
from typing import Any

from torch import nn


def referring(*names: str) -> Any:
    """A `__setattr__` for a module that holds the attributes `names` without registering them as submodules.

    A head that a model owns must not be saved, moved or counted twice. If the module is deep-copied or pickled
    together with the model, the copies still share the head.
    """

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        (object if name in names else nn.Module).__setattr__(self, name, value)

    return __setattr__


def referred(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a module or its submodules refer to without registering them, such as a head."""
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, nn.Module):
                yield value
