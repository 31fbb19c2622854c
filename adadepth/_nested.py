"""Finds and changes the tensors in nested arguments."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def each(given: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`given` with each tensor changed, also in tuples, lists and mappings; a tensor without axes is kept."""
    if isinstance(given, Tensor):
        return change(given) if given.dim() else given
    if isinstance(given, Mapping):
        return {name: each(value, change) for name, value in given.items()}
    if isinstance(given, tuple | list):
        parts = [each(value, change) for value in given]
        return type(given)(*parts) if hasattr(given, "_fields") else type(given)(parts)
    return given


def tensors(given: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, Mapping | tuple | list):
        for value in given.values() if isinstance(given, Mapping) else given:
            yield from tensors(value)
