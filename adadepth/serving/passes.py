"""`Pass`: a pass of the loop that runs step by step, together with others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from .._nested import each
from ..cache.tokens import CachedTokens
from ..loop.bounds import Bounds
from ..loop.iterations import Ask, AskBlock, Only, answered, iterations
from ..loop.recorder import Recorder
from ..loop.wrapper import RecurrentWrapper


@final
@dataclass(frozen=True, eq=False)
class Chunk:
    """The tokens of a row of the cache that began together: `tokens` of them, from `position` on.

    In the pass `run`, they are row `index`.
    """

    run: "Pass"
    index: int
    row: int
    position: int
    tokens: int


@final
class Pass:
    """A pass over some rows of a cache. It asks for calls of the block, the gate and the update, and gets the results.

    `ask` is the current request, None once the pass has ended. `error` is the exception that ended it, if any. `active`
    holds the indices of the rows with active tokens.
    """

    def __init__(
        self,
        loop: RecurrentWrapper,
        x: Tensor,
        tokens: CachedTokens,
        start: Tensor | None,
        bounds: Bounds,
        given: Mapping[str, Any],
    ) -> None:
        self.all, self.given = tokens, given
        self.chunks = [
            Chunk(self, i, span.row, span.before, span.after - span.before) for i, span in enumerate(tokens.held.spans)
        ]
        self.error: Exception | None = None
        self.record = Recorder(x, tokens, bounds.steps, scored=loop.gate is not None, states=False)
        self._asks = iterations(loop, self.record, x, tokens, start, bounds)
        self._dropped: set[int] = set()
        self.answer(None)
        self.active = self._rows()

    @property
    def part(self) -> tuple[int, CachedTokens]:
        """The iteration and the tokens of the current request."""
        assert self.ask is not None, "the pass has ended"
        assert isinstance(self.ask.tokens, CachedTokens), "a pass over a cache"
        return self.ask.step, self.ask.tokens

    @property
    def size(self) -> int:
        """The number of tokens of the current request."""
        return 0 if self.ask is None else self.ask.tokens.shape[1]

    def chunk_of_each(self) -> list[Chunk]:
        """The chunk of each token of the current request."""
        _, tokens = self.part
        return [chunk for chunk, number in zip(self.chunks, tokens.queries, strict=True) for _ in range(number)]

    def answer(self, answer: object) -> None:
        """Give the answer to the current request. The pass runs on to its next request, or to its end."""
        try:
            self.ask: Ask | None = answered(self._asks, answer)
        except Exception as error:  # raised by a rule, which is called for this pass alone
            self.ask, self.error = None, error

    def drop(self, index: int) -> None:
        """Drop a row: it does not run in later calls of the block."""
        self._dropped.add(index)
        self.active.discard(index)

    def apply_drops(self) -> None:
        """Remove the dropped rows, if the current request is for the block."""
        if not self._dropped or not isinstance(self.ask, AskBlock):
            return
        go = torch.ones(len(self.all.live), 1, dtype=torch.bool, device=self.all.live.device)
        go[list(self._dropped)] = False
        self._dropped = set()
        self.answer(Only(go))

    def exits(self) -> list[tuple[Chunk, Tensor, Tensor]]:
        """The chunks that exited since the last call of this method: outputs `(tokens, dim)`, depths `(tokens,)`.

        Empty if the pass ended with an error.
        """
        if self.error is not None:
            return []
        before, self.active = self.active, self._rows() - self._dropped
        if not (exited := sorted(before - self.active)):
            return []
        hidden, depth, real = self.record.hidden, self.record.depth, self.all.live
        return [(self.chunks[i], hidden[i][real[i]], depth[i][real[i]]) for i in exited]

    def each_given(self) -> Any:
        """The `block_kwargs` for each token that runs."""
        _, tokens = self.part
        return each(self.given, lambda rows: tokens.spread(rows).expand(1, self.size, *rows.shape[2:]))

    def _rows(self) -> set[int]:
        """The indices of the rows that have tokens in the current request."""
        return set() if self.ask is None else {row for row, number in enumerate(self.part[1].queries) if number}
