"""Packed queries, grouped by row for the attention call.

Rows with about equally many queries form a group, padded to the longest of them. One index gathers the queries of
all groups, and another puts the results back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# A row joins others if it fills at least this share of the longest of them.
FILL = 0.75


class Group(NamedTuple):
    """Rows that share one attention call.

    `rows (n,)` int64, None for all rows in order; `queries` is their number per row, padded. `whole` is True if in
    every row the j-th query is in slot j and no slot after the last query holds a token.
    """

    rows: Tensor | None
    size: int
    queries: int
    whole: bool


class RowGroups(NamedTuple):
    """`gather` puts the queries into groups, `back` puts the results into the order of the tokens; None: no change."""

    groups: list[Group]
    gather: Tensor | None
    back: Tensor | None


def group_rows(queries: list[int], lengths: list[int], counts: Tensor, row: Tensor) -> RowGroups:
    """Group rows by their number of queries, which is at least 1.

    Arguments: `queries`, the number of packed tokens of each row, in order; `lengths`, the real tokens of each row;
    `counts (rows,)`, `queries` on the device; `row (T,)`, the row of each token.
    """
    parts, device = _partition(queries, lengths), row.device
    if len(parts) == 1:
        groups = [_group(parts[0], None, queries, lengths)]
        if groups[0].queries * len(queries) == sum(queries):
            return RowGroups(groups, None, None)
    else:
        sent = torch.tensor([number for part in parts for number in part], dtype=torch.int64, device=device)
        each = zip(parts, sent.split([len(part) for part in parts]), strict=True)
        groups = [_group(part, numbers, queries, lengths) for part, numbers in each]
    first = counts.cumsum(0) - counts
    base = torch.zeros_like(counts)
    gathers = []
    start = 0
    for group in groups:
        rows = torch.arange(len(queries), device=device) if group.rows is None else group.rows
        rank = torch.arange(group.queries, device=device)
        inside = torch.minimum(rank, counts[rows].unsqueeze(1) - 1)
        gathers.append((first[rows].unsqueeze(1) + inside).flatten())
        base[rows] = start + torch.arange(group.size, device=device) * group.queries
        start += group.size * group.queries
    back = (base - first)[row] + torch.arange(sum(queries), device=device)
    return RowGroups(groups, torch.cat(gathers), back)


def _partition(queries: list[int], lengths: list[int]) -> list[list[int]]:
    """Row numbers, split into rows in which every token runs and others, and each of these by size."""
    parts: list[list[int]] = []
    key = None
    for r in sorted(range(len(queries)), key=lambda r: (queries[r] == lengths[r], -queries[r], r)):
        whole = queries[r] == lengths[r]
        if key is None or key[0] != whole or queries[r] < FILL * key[1]:
            key = (whole, queries[r])
            parts.append([])
        parts[-1].append(r)
    return [sorted(part) for part in parts]


def _group(rows: list[int], numbers: Tensor | None, queries: list[int], lengths: list[int]) -> Group:
    return Group(
        rows=numbers,
        size=len(rows),
        queries=max(queries[r] for r in rows),
        whole=all(queries[r] == lengths[r] for r in rows),
    )
