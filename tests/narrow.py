"""What a test knows of a value, and the value's type does not say."""

from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


def the(kind: type[T], value: object) -> T:
    """`value`, which is a `kind`."""
    assert isinstance(value, kind), f"expected {kind.__name__}, got {value!r}"
    return value


def last_maps(gate: Any) -> list[nn.Linear]:
    """The last linear map of each iteration's MLP, of a gate that has these."""
    return [the(nn.Linear, mlp[-1]) for mlp in gate.mlps]
