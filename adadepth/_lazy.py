"""A cached property that Dynamo traces: before Python 3.12 that of functools holds a lock."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class lazy(Generic[T]):
    """Computed at the first access, an attribute from then on."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __get__(self, owner: Any, kind: Any = None) -> T:
        if owner is None:
            return self  # type: ignore[return-value]
        value = self.compute(owner)
        setattr(owner, self.compute.__name__, value)
        return value
