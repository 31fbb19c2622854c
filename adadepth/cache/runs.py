"""Packed queries regrouped by row where keys and values are held by a cache.

There they are not copied: only neighbouring rows are read together, as they stand.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from torch import Tensor

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

    def apart(self, tokens: Tensor) -> Tensor:
        """Of its tokens `(1, heads, size * queries, head_dim)` the rows, `(size, heads, queries, head_dim)`."""
        if self.size == 1:
            return tokens
        if self.queries == 1:
            return tokens.transpose(0, 2)
        return tokens.squeeze(0).unflatten(1, (self.size, self.queries)).transpose(0, 1)

    def joined(self, rows: Tensor) -> Tensor:
        """The way back, token by token: `(1, size * queries, heads, head_dim)`."""
        if self.size == 1:
            return rows.transpose(1, 2)
        return rows.transpose(1, 2).reshape(1, self.size * self.queries, rows.shape[1], rows.shape[3])


class Span(NamedTuple):
    """A row of a cache that a pass is about: it held `before` real tokens, and is to hold `after`."""

    row: int
    before: int
    after: int


def runs_of(asked: list[int], spans: list[Span], fill: float = FILL) -> Iterator[Run]:
    """The rows that ask something, in order: `asked` queries of each. A row joins others that it fills so far."""
    group: list[Span] = []
    queries = low = high = 0
    for count, span in zip(asked, spans, strict=True):
        if not count:
            continue
        low, high = min(low, span.after), max(high, span.after)
        if group and not (count == queries and span.row == group[-1].row + 1 and low >= fill * high):
            yield _run(queries, group)
            group = []
        if not group:
            queries, low, high = count, span.after, span.after
        group.append(span)
    if group:
        yield _run(queries, group)


def _run(queries: int, spans: list[Span]) -> Run:
    width = max(span.after for span in spans)
    rows = slice(spans[0].row, spans[-1].row + 1)
    if queries == width and not any(span.before for span in spans):
        return Run(rows, len(spans), queries, width, "causal")
    one_new = all(span.after - span.before == 1 for span in spans)
    full = min(span.after for span in spans) == width
    return Run(rows, len(spans), queries, width, "all" if one_new and full else "own")
