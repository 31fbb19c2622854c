"""Tokens of requests on their way: what comes before the loop, their turn, and the loop."""

from collections import deque
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..serving import DepthBatch, Failed
from .outside import Outside, in_rows
from .requests import Depths, Request, Tokens


class Lost(NamedTuple):
    """Tokens that cannot go on, and why."""

    tokens: Tokens
    error: Exception


@final
class Flight:
    """Brings tokens through the layers before the loop, and, as calls have room for them, through it.

    Those of prompts begin at once, and are not counted. A row holds at most `capacity`.
    """

    def __init__(self, loop: DepthBatch, outside: Outside, capacity: int) -> None:
        self.loop, self.outside, self.capacity = loop, outside, capacity
        self._new: list[Tokens] = []
        self._ready = deque[Tokens]()
        self._running: dict[tuple[int, int], Tokens] = {}  # by row and position

    @property
    def room(self) -> int:
        """How many single tokens more a call is to run."""
        return self.loop.width - sum(len(tokens.ids) == 1 for tokens in self._running.values())

    @property
    def waiting(self) -> int:
        """How many tokens have not begun."""
        return len(self._new) + len(self._ready)

    @property
    def of_prompts(self) -> int:
        """How many tokens of prompts run."""
        return sum(len(tokens.ids) for tokens in self._running.values() if len(tokens.ids) > 1)

    @property
    def singles(self) -> int:
        """How many tokens the next call runs; 0 if those of prompts are among them."""
        return 0 if self.of_prompts else len(self._running)

    @property
    def rows(self) -> int:
        """How many rows the tokens that run are of."""
        return len({row for row, _ in self._running})

    def check_fits(self, tokens: int) -> None:
        """That a row may hold so many.

        Raises: `ValueError`.
        """
        if tokens > self.capacity:
            raise ValueError(
                f"The request needs room for {tokens} tokens, of its prompt and of all new ones but the last, got a "
                f"capacity of {self.capacity}. Pass a larger capacity=, within the positions of the model, or ask for "
                "fewer new tokens."
            )

    def next(self, request: Request, ids: list[int]) -> None:
        """The next tokens of a request are these; from now on they are in its chain."""
        position = request.chain[-1].end if request.chain else self.loop.length(request.row)
        tokens = Tokens(request, position, ids)
        request.chain.append(tokens)
        self._new.append(tokens)

    def begin(self) -> list[Lost]:
        """What comes before the loop, for all new tokens in one call; then they begin, as long as there is room.

        Returns: those whose depths cannot be had, or for which a row is too short.
        """
        lost, bounded = list[Lost](), list[Tokens]()
        new, self._new = self._new, []
        for tokens in new:
            try:
                self.check_fits(tokens.end)
                tokens.bounds = tokens.request.bounds(self.loop.looped.steps, tokens, self.outside.device)
                bounded.append(tokens)
            except Exception as error:
                lost.append(Lost(tokens, error))
        for tokens, state in zip(bounded, self.outside.before(bounded) if bounded else [], strict=True):
            tokens.state = state
            self._ready.append(tokens)
        some = self._next_ready()
        some.sort(key=lambda tokens: (id(tokens.request.rule), tokens.request.row))
        for _, group in groupby(some, key=lambda tokens: id(tokens.request.rule)):
            self._begin([*group])
        return lost

    def call(self) -> tuple[list[Tokens], list[Lost]]:
        """Run the block once on all that have begun.

        Returns: those that ran, with what they are now; and those that cannot go on, in the order of positions.
        """
        ran, lost = list[Tokens](), list[Lost]()
        for one in self.loop.call():
            tokens = self._running[one.row, one.position]
            if isinstance(one, Failed):
                lost.append(Lost(tokens, one.error))
                continue
            tokens.left, tokens.depth = one.left, one.depth.tolist()
            # Without layers behind the loop, only the newest token of a prompt is of use.
            tokens.state = one.hidden if self.outside.coda is not None else one.hidden[-1:]
            if one.left:
                del self._running[one.row, one.position]
            ran.append(tokens)
        return ran, lost

    def drop(self, row: int, gone: list[Tokens]) -> None:
        """The last tokens of a row go no further, wherever they are."""
        self.outside.drop(row, gone[0].position)
        self.loop.drop(row, gone[0].position)
        for tokens in gone:
            self._running.pop((row, tokens.position), None)
        self._new, self._ready = without(self._new, gone), deque(without(self._ready, gone))

    def _next_ready(self) -> list[Tokens]:
        """All prompts, and as many single tokens as there is room for."""
        room, some, rest = self.room, list[Tokens](), deque[Tokens]()
        for tokens in self._ready:
            single = len(tokens.ids) == 1
            (rest if single and room <= 0 else some).append(tokens)
            room -= single
        self._ready = rest
        return some

    def _begin(self, some: list[Tokens]) -> None:
        """Begin tokens under one rule."""
        states = [tokens.state for tokens in some if tokens.state is not None]
        x, mask = in_rows(states)
        least, most = self._depths(states, [tokens.bounds for tokens in some])
        rows = [tokens.request.row for tokens in some]
        self.loop.begin(rows, x, mask=mask, min_depth=least, max_depth=most, rule=some[0].request.rule)
        self._running |= {(tokens.request.row, tokens.position): tokens for tokens in some}

    def _depths(self, states: list[Tensor], bounds: list[Depths]) -> tuple[Tensor | None, ...]:
        """The bounds of tokens that begin together, in rows; None where none has any."""
        if not any(bounds):
            return None, None
        steps = self.loop.looped.steps
        whole = [
            torch.tensor([[1], [steps]], device=self.outside.device).expand(2, len(state)) if pair is None else pair
            for state, pair in zip(states, bounds, strict=True)
        ]
        return tuple(pad_sequence([pair[i] for pair in whole], True, 1) for i in range(2))


def without(some: Iterable[Tokens], gone: list[Tokens]) -> list[Tokens]:
    """Those of some that have not gone."""
    return [tokens for tokens in some if tokens not in gone]
