"""The views under which only the tokens that run ask: of a grid made for the pass, or of a cache."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ._lazy import lazy
from .attention import How, TokenView, seen
from .groups import Group, Run
from .layouts import KV
from .tokens import CachedTokens, PackedTokens


@final
class PackedView(TokenView):
    """What is asked is a grid in which each row's real tokens stand at its left."""

    tokens: PackedTokens

    def _merge(self, k: Tensor, v: Tensor) -> KV:
        old_k, old_v = self._past()
        return self._scatter(k, old_k), self._scatter(v, old_v)

    def _scatter(self, new: Tensor, old: Tensor | None) -> Tensor:
        """The grid `(batch, kv_heads, width, head_dim)`, token by token in memory: one copy is one run."""
        rows, width, slots = len(self.tokens.grid_rows), self.tokens.width, self.tokens.slots
        new = new.squeeze(0).transpose(0, 1)
        if old is None:
            flat = new.new_zeros(rows * width, *new.shape[1:]).index_copy_(0, slots, new)
        elif old.shape[0] == rows:
            flat = old.transpose(1, 2).flatten(0, 1).index_copy(0, slots, new)
        else:  # rows in which nothing runs any more are dropped, which makes a copy to write into
            kept = old.transpose(1, 2).index_select(0, self.tokens.inherited)
            flat = kept.flatten(0, 1).index_copy_(0, slots, new)
        return flat.unflatten(0, (rows, width)).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        groups, gather, back = self.tokens.groups
        q = q.squeeze(0).transpose(0, 1)
        if gather is not None:
            q = q.index_select(0, gather)
        parts = q.split([group.size * group.queries for group in groups])
        answers = [self._ask(g, part, k, v, how) for g, part in enumerate(parts)]
        out = answers[0] if len(answers) == 1 else torch.cat(answers)
        if back is not None:
            out = out.index_select(0, back)
        return out.transpose(0, 1).unsqueeze(0)

    def _ask(self, g: int, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        group = self.tokens.groups.groups[g]
        if group.rows is not None:
            k, v = k.index_select(0, group.rows), v.index_select(0, group.rows)
        allowed = self._allowed(g, group, q.dtype, how.window)
        if allowed is None and self.causal and group.queries < self.tokens.width:
            k, v = k[:, :, : group.queries], v[:, :, : group.queries]
        q = q.unflatten(0, (group.size, group.queries)).transpose(1, 2)
        return how.ask(q, k, v, allowed, self.causal).transpose(1, 2).flatten(0, 1)

    def _allowed(self, g: int, group: Group, dtype: torch.dtype, window: int | None) -> Tensor | None:
        """What the group's queries may see, added to the scores; None: what `is_causal` says."""
        if not self.causal and self.tokens.mask is None:
            return None
        if self.causal and group.whole and (window is None or window >= group.queries):
            return None
        return self._mask_of((g, window), lambda: _bias(self._seen(g, group, window), dtype))

    def _seen(self, g: int, group: Group, window: int | None) -> Tensor:
        """`(size, 1, queries or 1, width)` bool."""
        slots = torch.arange(self.tokens.width, device=self.tokens.live.device)
        if not self.causal:
            lengths = self.tokens.lengths if group.rows is None else self.tokens.lengths[group.rows]
            return (slots < lengths[:, None])[:, None, None, :]
        groups, gather, _ = self.tokens.groups
        own = self.tokens.slots % self.tokens.width
        own = own if gather is None else own.index_select(0, gather)
        sizes = [other.size * other.queries for other in groups]
        return seen(own.split(sizes)[g].view(group.size, 1, group.queries, 1), slots, window)


@final
class CachedView(TokenView):
    """What is asked is a cache, which holds these tokens behind those of earlier passes."""

    tokens: CachedTokens
    known = "that the cache holds (a cache belongs to one wrapper)"

    def __init__(self, tokens: CachedTokens, step: int, causal: bool, past: Sequence[KV] | None, keep: bool) -> None:
        super().__init__(tokens, step, causal, past=None, keep=False)  # the cache keeps
        self.entries = tokens.held.entries
        self.expected = self.entries.calls or (0 if any(tokens.held.before) else None)

    def _merge(self, k: Tensor, v: Tensor) -> KV:
        if self.calls == 0:
            self.entries.place(self.step, self.tokens.slots)
        self.entries.write(self.calls, k.squeeze(0).transpose(0, 1), v.squeeze(0).transpose(0, 1))
        return k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        runs = self.tokens.runs
        parts = q.squeeze(0).transpose(0, 1).split([run.size * run.queries for run in runs])
        answers = [self._ask(r, run, part, how) for r, (run, part) in enumerate(zip(runs, parts, strict=True))]
        return (answers[0] if len(answers) == 1 else torch.cat(answers)).transpose(0, 1).unsqueeze(0)

    def _ask(self, r: int, run: Run, q: Tensor, how: How) -> Tensor:
        k, v = self.entries.read(self.calls - 1, run.rows, run.width)
        q = q.view(run.size, run.queries, *q.shape[1:]).transpose(1, 2)
        out = how.ask(q, k, v, self._allowed(r, run, q.dtype, how.window), run.sees == "causal")
        return out.transpose(1, 2).flatten(0, 1)

    def _allowed(self, r: int, run: Run, dtype: torch.dtype, window: int | None) -> Tensor | None:
        """What the run's queries may see, added to the scores; None: all, or what `is_causal` says."""
        if run.sees != "own" and (window is None or window >= run.width):
            return None
        return self._mask_of((r, window), lambda: _bias(self._seen(r, run, window), dtype))

    def _seen(self, r: int, run: Run, window: int | None) -> Tensor:
        """`(size, 1, queries, width)` bool."""
        own = self._own[r].view(run.size, 1, run.queries, 1)
        return seen(own, torch.arange(run.width, device=own.device), window)

    @lazy
    def _own(self) -> tuple[Tensor, ...]:
        """The slots at which the queries of each run stand in their rows."""
        return self.positions.squeeze(0).split([run.size * run.queries for run in self.tokens.runs])


def _bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    # Added once here: a bool mask would be turned into this by every attention call.
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)
