"""The tokens of passes that run in one call, joined along the sequence, and split again."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..attention.context import Here, Together
from ..cache.tokens import JoinedTokens
from ..loop.iterations import AskBlock, AskGate, AskUpdate
from .passes import Pass

A = TypeVar("A", AskBlock, AskGate, AskUpdate)
Request = tuple[Pass, A]


def groups(requests: "list[Request[A]]", piece: Any) -> "list[list[Request[A]]]":
    """The requests that share a call of a piece: each pass by itself if the piece reads `step`, otherwise all."""
    return [[one] for one in requests] if piece is None or piece.reads_step else [requests] if requests else []


def context(runs: list[Pass]) -> Here | Together:
    """The context that gives iteration, row and position of the passes' tokens."""
    parts = [run.part for run in runs]
    each = [Here(tokens, step) for step, tokens in parts]
    return each[0] if len(each) == 1 else Together(each, JoinedTokens(parts))


def joined(parts: list[Tensor]) -> Tensor:
    """The passes' tokens, concatenated along the sequence."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def split(whole: Tensor, runs: list[Pass]) -> Iterator[tuple[Pass, Tensor]]:
    """Each pass with its part of the joined tokens."""
    return zip(runs, whole.split([run.size for run in runs], 1), strict=True)


def together(parts: list[Any]) -> Any:
    """Join the `block_kwargs` of passes: tensors with one entry for each token are concatenated.

    Raises: `ValueError` if other values differ between the passes.
    """
    first = parts[0]
    if isinstance(first, Tensor) and first.dim():
        return joined(parts)
    if isinstance(first, Mapping) and all(part.keys() == first.keys() for part in parts):
        return {name: together([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple | list) and all(len(part) == len(first) for part in parts):
        made = [together([*each]) for each in zip(*parts, strict=True)]
        return type(first)(*made) if hasattr(first, "_fields") else type(first)(made)
    if any(part is not first and part != first for part in parts):
        raise ValueError(
            "Tokens that run in one call must have the same block_kwargs, except for tensors with one entry for each "
            f"token, got {parts}. Begin tokens with other block_kwargs in another DepthBatch."
        )
    return first
