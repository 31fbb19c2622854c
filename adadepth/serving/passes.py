"""A pass of the loop that waits for answers, beside others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..cache.tokens import CachedTokens
from ..loop.blocks import each
from ..loop.bounds import Bounds
from ..loop.iterations import Ask, AskBlock, Only, answered, iterations
from ..loop.recorder import Recorder
from ..loop.wrapper import RecurrentWrapper


@final
@dataclass(frozen=True, eq=False)
class Flight:
    """The tokens of a row of the cache that began together: `tokens` of them, from `position` on.

    They are row `index` of the pass `run`.
    """

    run: "Pass"
    index: int
    row: int
    position: int
    tokens: int


@final
class Pass:
    """A pass over some rows of a cache, driven by answers; those that began together go on together.

    `ask` is what it asks now, None at its end; `error` what it ended with, if not well.
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
        self.flights = [
            Flight(self, i, span.row, span.before, span.after - span.before) for i, span in enumerate(tokens.held.spans)
        ]
        self.error: Exception | None = None
        self.record = Recorder(x, tokens, bounds.steps, scored=loop.gate is not None, states=False)
        self._asks = iterations(loop, self.record, x, tokens, start, bounds)
        self._dropped: set[int] = set()
        self.answer(None)
        self.going = self._rows()

    @property
    def part(self) -> tuple[int, CachedTokens]:
        """The iteration, and the tokens that are asked about."""
        assert self.ask is not None, "the pass has ended"
        assert isinstance(self.ask.tokens, CachedTokens), "a pass over a cache"
        return self.ask.step, self.ask.tokens

    @property
    def size(self) -> int:
        """How many tokens are asked about."""
        return 0 if self.ask is None else self.ask.tokens.shape[1]

    def of_tokens(self) -> list[Flight]:
        """The flight of each token that is asked about."""
        _, tokens = self.part
        return [flight for flight, number in zip(self.flights, tokens.asked, strict=True) for _ in range(number)]

    def answer(self, answer: object) -> None:
        """Go on until the pass asks again, or ends."""
        try:
            self.ask: Ask | None = answered(self._asks, answer)
        except Exception as error:  # a rule's, in whose call others have no part
            self.ask, self.error = None, error

    def drop(self, index: int) -> None:
        """Leave out a row from the next call of the block on."""
        self._dropped.add(index)
        self.going.discard(index)

    def leave_out(self) -> None:
        """Do so, where the block is asked next."""
        if not self._dropped or not isinstance(self.ask, AskBlock):
            return
        go = torch.ones(len(self.all.live), 1, dtype=torch.bool, device=self.all.live.device)
        go[list(self._dropped)] = False
        self._dropped = set()
        self.answer(Only(go))

    def left(self) -> list[tuple[Flight, Tensor, Tensor]]:
        """Those whose last token has left since this was asked, with output `(tokens, dim)` and depths `(tokens,)`.

        None where the pass ended with an error.
        """
        if self.error is not None:
            return []
        before, self.going = self.going, self._rows() - self._dropped
        if not (gone := sorted(before - self.going)):
            return []
        hidden, depth, real = self.record.hidden, self.record.depth, self.all.live
        return [(self.flights[i], hidden[i][real[i]], depth[i][real[i]]) for i in gone]

    def each_given(self) -> Any:
        """What the block is given beside its input, for each token that runs."""
        _, tokens = self.part
        return each(self.given, lambda rows: tokens.spread(rows).expand(1, self.size, *rows.shape[2:]))

    def _rows(self) -> set[int]:
        return set() if self.ask is None else {row for row, number in enumerate(self.part[1].asked) if number}
