"""`Flight`: runs tokens of requests through the layers before the loop, and through the loop."""

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


class FailedTokens(NamedTuple):
    """Tokens that failed, and the error."""

    tokens: Tokens
    error: Exception


@final
class Flight:
    """The tokens that are in flight: new, ready for the loop, or active in it.

    New tokens first run through the layers before the loop. They enter the loop when the next call has room. Tokens of
    prompts enter at once and are not counted. A row holds at most `capacity` tokens.
    """

    def __init__(self, loop: DepthBatch, outside: Outside, capacity: int) -> None:
        self.loop, self.outside, self.capacity = loop, outside, capacity
        self._new: list[Tokens] = []
        self._ready = deque[Tokens]()
        self._running: dict[tuple[int, int], Tokens] = {}  # by row and position

    @property
    def room(self) -> int:
        """How many more single tokens fit into the next call."""
        return self.loop.width - sum(len(tokens.ids) == 1 for tokens in self._running.values())

    @property
    def waiting(self) -> int:
        """How many entries have not entered the loop; a prompt is one entry."""
        return len(self._new) + len(self._ready)

    @property
    def prompt_tokens(self) -> int:
        """How many tokens of prompts are active."""
        return sum(len(tokens.ids) for tokens in self._running.values() if len(tokens.ids) > 1)

    @property
    def single_tokens(self) -> int:
        """How many tokens the next call runs; 0 if tokens of prompts are among them."""
        return 0 if self.prompt_tokens else len(self._running)

    @property
    def rows(self) -> int:
        """How many rows have active tokens."""
        return len({row for row, _ in self._running})

    def check_fits(self, tokens: int) -> None:
        """Check that a row can hold this many tokens.

        Raises: `ValueError`.
        """
        if tokens > self.capacity:
            raise ValueError(
                f"The request needs room for {tokens} tokens, of its prompt and of all new ones but the last, got a "
                f"capacity of {self.capacity}. Pass a larger capacity=, within the positions of the model, or ask for "
                "fewer new tokens."
            )

    def add(self, request: Request, ids: list[int]) -> None:
        """Add the next tokens of a request, also to its chain."""
        position = request.chain[-1].end if request.chain else self.loop.length(request.row)
        tokens = Tokens(request, position, ids)
        request.chain.append(tokens)
        self._new.append(tokens)

    def begin(self) -> list[FailedTokens]:
        """Run the layers before the loop on all new tokens in one call. Then enter the loop as far as there is room.

        Returns: the tokens that failed, because their row is full or their depths raised an error.
        """
        failed, bounded = list[FailedTokens](), list[Tokens]()
        new, self._new = self._new, []
        for tokens in new:
            try:
                self.check_fits(tokens.end)
                tokens.bounds = tokens.request.bounds(self.loop.looped.steps, tokens, self.outside.device)
                bounded.append(tokens)
            except Exception as error:
                failed.append(FailedTokens(tokens, error))
        for tokens, state in zip(bounded, self.outside.before(bounded) if bounded else [], strict=True):
            tokens.state = state
            self._ready.append(tokens)
        some = self._take_ready()
        some.sort(key=lambda tokens: (id(tokens.request.rule), tokens.request.row))
        for _, group in groupby(some, key=lambda tokens: id(tokens.request.rule)):
            self._begin([*group])
        return failed

    def call(self) -> tuple[list[Tokens], list[FailedTokens]]:
        """Run the block once on all active tokens.

        Returns: the tokens that ran, with their new state and depth; and those that failed, by position.
        """
        ran, failed = list[Tokens](), list[FailedTokens]()
        for one in self.loop.call():
            tokens = self._running[one.row, one.position]
            if isinstance(one, Failed):
                failed.append(FailedTokens(tokens, one.error))
                continue
            tokens.exited, tokens.depth = one.left, one.depth.tolist()
            # Without layers after the loop, only the last token of a prompt is needed.
            tokens.state = one.hidden if self.outside.coda is not None else one.hidden[-1:]
            if one.left:
                del self._running[one.row, one.position]
            ran.append(tokens)
        return ran, failed

    def drop(self, row: int, dropped: list[Tokens]) -> None:
        """Drop the last tokens of a row, new, ready or active."""
        self.outside.drop(row, dropped[0].position)
        self.loop.drop(row, dropped[0].position)
        for tokens in dropped:
            self._running.pop((row, tokens.position), None)
        self._new, self._ready = without(self._new, dropped), deque(without(self._ready, dropped))

    def _take_ready(self) -> list[Tokens]:
        """Take all prompts that are ready, and as many single tokens as there is room for."""
        room, some, rest = self.room, list[Tokens](), deque[Tokens]()
        for tokens in self._ready:
            single = len(tokens.ids) == 1
            (rest if single and room <= 0 else some).append(tokens)
            room -= single
        self._ready = rest
        return some

    def _begin(self, some: list[Tokens]) -> None:
        """Let tokens with the same rule enter the loop."""
        states = [tokens.state for tokens in some if tokens.state is not None]
        x, mask = in_rows(states)
        least, most = self._depths(states, [tokens.bounds for tokens in some])
        rows = [tokens.request.row for tokens in some]
        self.loop.begin(rows, x, mask=mask, min_depth=least, max_depth=most, rule=some[0].request.rule)
        self._running |= {(tokens.request.row, tokens.position): tokens for tokens in some}

    def _depths(self, states: list[Tensor], bounds: list[Depths]) -> tuple[Tensor | None, ...]:
        """The bounds of tokens that enter together, as padded rows; None if no token has bounds."""
        if not any(bounds):
            return None, None
        steps = self.loop.looped.steps
        whole = [
            torch.tensor([[1], [steps]], device=self.outside.device).expand(2, len(state)) if pair is None else pair
            for state, pair in zip(states, bounds, strict=True)
        ]
        return tuple(pad_sequence([pair[i] for pair in whole], True, 1) for i in range(2))


def without(some: Iterable[Tokens], dropped: list[Tokens]) -> list[Tokens]:
    """The tokens of `some` that are not in `dropped`."""
    return [tokens for tokens in some if tokens not in dropped]
