"""Packed queries, grouped by row, when keys and values are in a cache.

The cache is read without a copy, so only neighbouring rows can be read together.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from torch import Tensor

from ..attention.groups import FILL


class Run(NamedTuple):
    """Neighbouring rows with equally many `queries` each, which attend to the first `width` slots of their rows.

    `sees` says which of these slots a query reads: "all", "causal" (the j-th query reads the first j slots), or
    "own" (each query reads the slots up to its own).
    """

    rows: slice
    size: int
    queries: int
    width: int
    sees: Literal["all", "causal", "own"]

    def apart(self, tokens: Tensor) -> Tensor:
        """Its tokens `(1, heads, size * queries, head_dim)` as rows, `(size, heads, queries, head_dim)`."""
        if self.size == 1:
            return tokens
        if self.queries == 1:
            return tokens.transpose(0, 2)
        return tokens.squeeze(0).unflatten(1, (self.size, self.queries)).transpose(0, 1)

    def joined(self, rows: Tensor) -> Tensor:
        """Rows back as tokens: `(1, size * queries, heads, head_dim)`."""
        if self.size == 1:
            return rows.transpose(1, 2)
        return rows.transpose(1, 2).reshape(1, self.size * self.queries, rows.shape[1], rows.shape[3])


class Span(NamedTuple):
    """A row of a cache in a pass: it holds `before` real tokens before the pass, and `after` real tokens after it."""

    row: int
    before: int
    after: int


def runs_of(counts: list[int], spans: list[Span], fill: float = FILL) -> Iterator[Run]:
    """The rows with queries, in order; `counts` says how many each row has.

    Rows share a run if the shortest is at least `fill` times as long as the longest.
    """
    group: list[Span] = []
    queries = low = high = 0
    for count, span in zip(counts, spans, strict=True):
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
