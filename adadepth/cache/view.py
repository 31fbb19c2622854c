"""The view under which the tokens that run ask a cache."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from .._lazy import lazy
from ..attention.how import How
from ..attention.packed import bias
from ..attention.view import KV, TokenView, seen
from .runs import Run
from .tokens import CachedTokens


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
        return self._mask_of((r, window), lambda: bias(self._seen(r, run, window), dtype))

    def _seen(self, r: int, run: Run, window: int | None) -> Tensor:
        """`(size, 1, queries, width)` bool."""
        own = self._own[r].view(run.size, 1, run.queries, 1)
        return seen(own, torch.arange(run.width, device=own.device), window)

    @lazy
    def _own(self) -> tuple[Tensor, ...]:
        """The slots at which the queries of each run stand in their rows."""
        return self.positions.squeeze(0).split([run.size * run.queries for run in self.tokens.runs])
