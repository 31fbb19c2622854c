"""A cached property that Dynamo can trace; that of functools holds a lock before Python 3.12."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class lazy(Generic[T]):
    """A property that is computed at the first access, and is then a plain attribute."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __get__(self, owner: Any, kind: Any = None) -> T:
        if owner is None:
            return self  # type: ignore[return-value]
        value = self.compute(owner)
        setattr(owner, self.compute.__name__, value)
        return value
