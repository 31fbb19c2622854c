"""Notices when a piece of the loop writes into its arguments, which are read again later."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._given import name_of
from .._nested import tensors

Watched: TypeAlias = tuple[str, Tensor, int]  # an argument's name, a tensor in it, and how often it was written to


def watched(arguments: Mapping[str, Any]) -> list[Watched]:
    """The tensors with axes in these arguments, by name; none in a graph and in inference mode.

    There torch does not count how often a tensor is written to.
    """
    if torch.compiler.is_compiling():
        return []
    return [
        (name, tensor, tensor._version)
        for name, value in arguments.items()
        for tensor in tensors(value)
        if tensor.dim() and not tensor.is_inference()
    ]


def check_unwritten(piece: object, arguments: list[Watched]) -> None:
    """Check that the piece, which has run, wrote into none of its arguments.

    Raises: `ValueError`.
    """
    for name, tensor, version in arguments:
        if tensor._version != version:
            raise ValueError(
                f"{name_of(piece)} writes into {name}, which is read again later. Make a new tensor, or start with "
                f"{name} = {name}.clone()."
            )
