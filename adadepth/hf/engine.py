"""Many requests at once: their tokens share calls of the block, each at its own iteration."""

from collections import deque
from itertools import groupby
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..cache.kv_reuse import KVReuseCache, LayoutName
from ..serving import DepthBatch, Failed
from .counts import Counts
from .inputs import learned_positions
from .outside import Outside, in_rows
from .requests import Request, check_rule

_PROMPTS = 512  # tokens of prompts that may be in flight when another prompt begins


class Chosen(NamedTuple):
    """The next token of a request, which waits for `go_on` or `end`."""

    request: Request
    token: int
    logprob: float | None


class Refused(NamedTuple):
    """A request that cannot go on, and why; it has ended."""

    request: Request
    error: Exception


Event = Chosen | Refused
Bounds = tuple[Tensor, Tensor] | None


class _Tokens(NamedTuple):
    """New tokens of a request before the loop, `state (n, dim)`, and their depths."""

    request: Request
    state: Tensor
    bounds: Bounds


@final
class Engine:
    """Runs the requests that are added to it, action by action.

    Each gets the tokens, and each token the depth, that `generate` would give it alone. Layers before and after the
    loop run once for each token: before it begins, and, in the order of the row, when it has left.

    Arguments:
        model: an adapted model in evaluation mode.
        rows: how many requests are in progress; others wait.
        width: how many tokens a call of the block runs at most, those of prompts aside. Prompts begin as soon as a row
            is free and fewer than 512 tokens of other prompts are in flight.
        capacity: the most tokens of a request, prompt and answer. `rows * capacity` are allocated at once.
        layout: of the loop's cache.

    Raises: `ValueError` for sizes below 1, an unknown layout, or a rule that is only for some rows.
    """

    def __init__(self, model: Any, rows: int, width: int, capacity: int, layout: LayoutName = "filled") -> None:
        limit = learned_positions(model.base, model.anatomy)
        self.width, self.capacity = width, capacity if limit is None else min(capacity, limit)
        if model.loop.rule is not None:
            check_rule(model.loop.rule, model.device)
        self.outside = Outside(model, rows, width, self.capacity)
        self.loop = DepthBatch(model.loop, KVReuseCache(layout, self.capacity), rows, width)
        self.counts = Counts()
        self._free = [*reversed(range(rows))]
        self._owners: dict[int, Request] = {}
        self._waiting, self._ready = deque[Request](), deque[_Tokens]()
        self._go_on: list[Request] = []
        self._flying: dict[Request, int] = {}  # how many tokens of each are in the loop
        self._left = deque[tuple[Request, Tensor]]()  # tokens that left the loop, before coda and head

    @property
    def in_progress(self) -> int:
        """How many requests have a row."""
        return len(self._owners)

    @property
    def waiting(self) -> int:
        """How many requests wait for a row."""
        return len(self._waiting)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        parts = (self.outside.prelude, self.loop, self.outside.coda)
        return sum(part.cache.nbytes for part in parts if part is not None)

    def check(self, request: Request) -> None:
        """That a request may be added.

        Raises: `ValueError` if it does not fit into a row, and what its depths raise.
        """
        self._check_fits(request.longest)
        request.bounds(self.loop.looped.steps, 0, self.outside.device)

    def add(self, request: Request) -> None:
        """Serve a request as soon as a row is free.

        Raises: `ValueError` if it does not fit into a row.
        """
        self._check_fits(request.longest)
        self._waiting.append(request)

    def go_on(self, request: Request) -> None:
        """A request whose token was chosen is to get another."""
        self._go_on.append(request)

    def end(self, request: Request) -> None:
        """Forget a request, wherever it is; its row is free."""
        if request.row < 0:
            self._waiting.remove(request)
        self._go_on = [one for one in self._go_on if one is not request]
        self._ready = deque(tokens for tokens in self._ready if tokens.request is not request)
        self._left = deque(left for left in self._left if left[0] is not request)
        self._flying.pop(request, None)
        if self._owners.pop(request.row, None) is not None:
            self.outside.release(request.row)
            self.loop.release(request.row)
            self._free.append(request.row)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Begin as many tokens as there is room for; then run the head, if more could begin, or else the block."""
        new, refused = self._bounded(self._new())
        for tokens in self._before(new):
            self._ready.append(tokens)
        self._begin()
        return [*refused, *(self._read() if self._left and self._room > 0 else self._call())]

    @property
    def _room(self) -> int:
        """How many single tokens may begin."""
        return self.width - sum(number == 1 for number in self._flying.values())

    def _new(self) -> list[Request]:
        """The requests that have new tokens: those that go on, and prompts for which there is a row."""
        some, self._go_on = self._go_on, []
        tokens = sum(number for number in self._flying.values() if number > 1)
        while tokens < _PROMPTS and self._waiting and self._free:
            request = self._waiting.popleft()
            request.row = self._free.pop()
            self._owners[request.row] = request
            some.append(request)
            tokens += len(request.ids)
        return sorted(some, key=lambda request: request.row)

    def _bounded(self, requests: list[Request]) -> tuple[list[tuple[Request, Bounds]], list[Refused]]:
        """The depths of their new tokens; a request is refused for which they cannot be had."""
        bounded, refused = list[tuple[Request, Bounds]](), list[Refused]()
        for request in requests:
            try:
                self._check_fits(len(request.ids))
                past = self.loop.length(request.row)
                bounded.append((request, request.bounds(self.loop.looped.steps, past, self.outside.device)))
            except Exception as error:
                refused.append(self._refuse(request, error))
        return bounded, refused

    def _before(self, new: list[tuple[Request, Bounds]]) -> list[_Tokens]:
        """What comes before the loop, for all new tokens in one call."""
        if not new:
            return []
        requests = [request for request, _ in new]
        places = [range(self.loop.length(request.row), len(request.ids)) for request in requests]
        states = self.outside.before(requests, places)
        return [_Tokens(request, state, bounds) for (request, bounds), state in zip(new, states, strict=True)]

    def _begin(self) -> None:
        """Begin all prompts, and single tokens as long as there is room."""
        room, some, rest = self._room, list[_Tokens](), deque[_Tokens]()
        for tokens in self._ready:
            single = len(tokens.state) == 1
            (rest if single and room <= 0 else some).append(tokens)
            room -= single
        self._ready = rest
        some.sort(key=lambda tokens: (id(tokens.request.rule), tokens.request.row))
        for _, group in groupby(some, key=lambda tokens: id(tokens.request.rule)):
            requests, states, bounds = map(list, zip(*group, strict=True))
            x, mask = in_rows(states)
            least, most = self._depths(states, bounds)
            rows = [request.row for request in requests]
            self.loop.begin(rows, x, mask=mask, min_depth=least, max_depth=most, rule=requests[0].rule)
            self._flying |= {request: len(state) for request, state in zip(requests, states, strict=True)}

    def _depths(self, states: list[Tensor], bounds: list[Bounds]) -> tuple[Tensor | None, ...]:
        """The bounds of requests that begin together, in rows; None where no request has any."""
        if not any(bounds):
            return None, None
        steps = self.loop.looped.steps
        whole = [
            torch.tensor([[1], [steps]], device=self.outside.device).expand(2, len(state)) if pair is None else pair
            for state, pair in zip(states, bounds, strict=True)
        ]
        return tuple(pad_sequence([pair[i] for pair in whole], True, 1) for i in range(2))

    def _check_fits(self, tokens: int) -> None:
        if tokens > self.capacity:
            raise ValueError(
                f"The request needs room for {tokens} tokens, of its prompt and of all new ones but the last, got a "
                f"capacity of {self.capacity}. Pass a larger capacity=, as far as the model knows positions, or ask "
                "for fewer new tokens."
            )

    def _call(self) -> list[Refused]:
        """Run the block once on all tokens in flight."""
        refused = list[Refused]()
        self.counts.called(self.loop.width - self.loop.room)
        for ran in self.loop.call():
            request = self._owners[ran.row]
            if isinstance(ran, Failed):
                refused.append(self._refuse(request, ran.error))
            elif ran.left:
                del self._flying[request]
                depth = ran.depth.tolist()
                self.counts.exited(depth)
                request.depth += depth
                # Without layers behind the loop, only the newest token of a prompt is of use.
                self._left.append((request, ran.hidden if self.outside.coda is not None else ran.hidden[-1:]))
        return refused

    def _read(self) -> list[Event]:
        """Choose the next token of some requests."""
        tokens, some = 0, list[tuple[Request, Tensor]]()
        while self._left and len(some) < self.width and tokens < _PROMPTS:
            some.append(self._left.popleft())
            tokens += len(some[-1][1])
        some.sort(key=lambda left: left[0].row)
        requests = [request for request, _ in some]
        logits = self.outside.logits(requests, [state for _, state in some])
        likeliest = logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1).tolist()
        return [*map(self._choose, requests, logits.unsqueeze(1), likeliest)]

    def _choose(self, request: Request, logits: Tensor, likeliest: int) -> Event:
        try:
            token, logprob = request.choose(logits, likeliest)
        except Exception as error:
            return self._refuse(request, error)
        request.ids.append(token)
        self.counts.tokens += 1
        return Chosen(request, token, logprob)

    def _refuse(self, request: Request, error: Exception) -> Refused:
        self.end(request)
        self.counts.failed += 1
        return Refused(request, error)
