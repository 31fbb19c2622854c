"""Depths and rules that are passed to `generate`: the part of them for some columns, or for some rows."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

GivenDepth = int | Tensor | Callable[[Tensor], int | Tensor] | None
DEPTHS = ("min_depth", "max_depth")


def of_columns(name: str, depth: GivenDepth, ids: Tensor, past: int, length: int) -> int | Tensor | None:
    """The depths of the columns from `past` to `length`. `ids (batch, n)` are all token ids so far."""
    if callable(depth):
        if ids.shape[1] != length:
            raise ValueError(
                f"{name} is a function of all ids so far, but got only {ids.shape[1]} of {length}. Pass all ids, not "
                "embeddings, and no prefill_chunk_size."
            )
        depth = depth(ids)
    if not isinstance(depth, Tensor) or depth.dim() == 0 or depth.shape[-1] == 1:
        return depth
    if depth.shape[-1] < length:
        raise ValueError(
            f"{name} gives the depths of {depth.shape[-1]} columns, but this pass needs those of {length}, for prompt, "
            "padding and new tokens. Give one for each of these columns (the last new token needs none), or one per "
            "row, (batch, 1)."
        )
    return depth[..., past:length]


def in_rows(value: Any, choose: Callable[[Tensor], Tensor]) -> Any:
    """A value with `choose` applied to each of its tensors that has an entry for each row."""
    if isinstance(value, Tensor):
        return value if value.dim() < 2 or len(value) == 1 else choose(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: in_rows(part, choose) for name, part in parts.items()})
    return value


def check_rows(name: str, value: Any, batch: int) -> None:
    """Check that tensors with an entry for each row have one for each of the `batch` rows.

    Raises: `ValueError`.
    """

    def check(rows: Tensor) -> Tensor:
        if len(rows) != batch:
            raise ValueError(
                f"{name} expected one row, or one for each of the {batch} rows of the batch, got a tensor of shape "
                f"{tuple(rows.shape)}."
            )
        return rows

    in_rows(value, check)


def row_of(value: Any, row: int) -> Any:
    """The part of a value for one row, as a batch of one."""
    return in_rows(value, lambda rows: rows[row : row + 1])
