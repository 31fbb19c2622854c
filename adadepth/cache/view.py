"""The view by which active tokens attend to a cache."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._lazy import lazy
from ..attention.context import Here, Together
from ..attention.how import How, answering
from ..attention.view import KV, TokenView, bias, seen
from .runs import Run
from .tokens import CachedTokens, JoinedTokens


class _Asking(NamedTuple):
    """A run, and the iteration of its rows."""

    step: int
    run: Run

    @property
    def size(self) -> int:
        """The number of its queries."""
        return self.run.size * self.run.queries


class CachedView(TokenView):
    """Attends to a cache, which holds these tokens after those of earlier passes.

    The tokens are of one pass, in iteration `step`, or of several passes, each in its own iteration.
    """

    known = "that the cache holds (a cache belongs to one wrapper)"

    def __init__(
        self,
        tokens: CachedTokens | JoinedTokens,
        step: int,
        causal: bool,
        past: Sequence[KV] | None = None,
        keep: bool = False,
    ) -> None:
        super().__init__(tokens, step, causal, past=None, keep=False)  # the cache keeps the keys and values
        del past, keep
        if isinstance(tokens, JoinedTokens):
            self.parts = tokens.parts
            self.here = Together([Here(part, step) for step, part in self.parts], tokens)
        else:
            self.parts = [(step, tokens)]
        self.entries = self.parts[0][1].held.entries
        self.expected = self.entries.complete

    def close(self) -> None:
        """The same; later passes must then make as many calls."""
        super().close()
        self.entries.complete = self.calls

    def _merge(self, k: Tensor, v: Tensor) -> KV:
        if self.calls == 0:
            self.entries.place([(step, tokens.slots) for step, tokens in self.parts])
        self.entries.write(self.calls, k, v)
        return k, v

    @lazy
    def asking(self) -> list[_Asking]:
        """All runs of all passes, in order."""
        return [_Asking(step, run) for step, tokens in self.parts for run in tokens.runs]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        asking = self.asking
        parts = [q] if len(asking) == 1 else q.split([one.size for one in asking], 2)
        with answering():
            answers = [self._ask(i, *asking[i], part, how) for i, part in enumerate(parts)]
        # In memory token by token, as from PyTorch's own kernel: some blocks view the heads of a token as one axis.
        return (answers[0] if len(answers) == 1 else torch.cat(answers, 1)).transpose(1, 2)

    def _ask(self, i: int, step: int, run: Run, q: Tensor, how: How) -> Tensor:
        k, v = self.entries.read(self.calls - 1, step, run.rows, run.width)
        allowed = self._allowed(i, run, q.dtype, how.window)
        return run.joined(how.answer(run.apart(q), k, v, allowed, run.sees == "causal"))

    def _allowed(self, i: int, run: Run, dtype: torch.dtype, window: int | None) -> Tensor | None:
        """The run's mask as a term to add to the scores; None if it reads all slots or `is_causal` is enough."""
        if run.sees != "own" and (window is None or window >= run.width):
            return None
        return self._mask_of((i, window), lambda: bias(self._seen(i, run, window), dtype))

    def _seen(self, i: int, run: Run, window: int | None) -> Tensor:
        """`(size, 1, queries, width)` bool."""
        own = self._own[i].view(run.size, 1, run.queries, 1)
        return seen(own, torch.arange(run.width, device=own.device), window)

    @lazy
    def _own(self) -> tuple[Tensor, ...]:
        """The slots of each run's queries in their rows."""
        return self.positions.squeeze(0).split([asking.size for asking in self.asking])
