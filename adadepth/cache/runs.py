"""Packed queries regrouped by row where keys and values are held by a cache.

There they are not copied: only neighbouring rows are read together, as they stand.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from ..attention.groups import FILL


class Run(NamedTuple):
    """Neighbouring rows with as many `queries` each, which are asked of what stands in their first `width` slots.

    `sees` says how much of it: "all", "causal" (the j-th query the first j slots), or "own" (each
    query the slots up to its own).
    """

    rows: slice
    size: int
    queries: int
    width: int
    sees: Literal["all", "causal", "own"]


def runs_of(asked: list[int], before: list[int], after: list[int]) -> Iterator[Run]:
    """The rows that ask something, in order: `asked` queries of each row, which held `before` and holds `after`."""
    first = 0
    for row in range(1, len(asked) + 1):
        if row < len(asked) and asked[row] == asked[first] and _similar(after[first : row + 1]):
            continue
        if asked[first]:
            yield _run(slice(first, row), asked[first], before, after)
        first = row


def _similar(lengths: list[int]) -> bool:
    return min(lengths) >= FILL * max(lengths)


def _run(rows: slice, queries: int, before: list[int], after: list[int]) -> Run:
    held, holds = before[rows], after[rows]
    size, width = len(held), max(holds)
    if queries == width and not any(held):
        return Run(rows, size, queries, width, "causal")
    one_new = all(end - start == 1 for start, end in zip(held, holds, strict=True))
    return Run(rows, size, queries, width, "all" if one_new and min(holds) == width else "own")
