"""Many requests at once: their tokens share calls of the block, each at its own iteration."""

from collections import deque
from itertools import groupby
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..cache.kv_reuse import KVReuseCache, LayoutName
from ..loop.wrapper import RecurrentWrapper
from ..serving import DepthBatch, Failed, Ran
from .ends import around, before, head
from .inputs import learned_positions
from .requests import Request, check_rule

_TILE = 16  # a matrix product of fewer rows often costs more


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


@final
class Engine:
    """Runs the requests that are added to it, action by action.

    Each gets the tokens, and each token the depth, that `generate` would give it alone. Layers before and after the
    loop run once for each token: before it begins, and, in the order of the row, when it has left.

    Arguments:
        model: an adapted model in evaluation mode.
        rows: how many requests are in progress; others wait.
        width: how many tokens a call of the block is to run. A prompt begins when there is room for one token, so a
            call may hold a prompt more.
        capacity: the most tokens of a request, prompt and answer. `rows * capacity` are allocated at once.
        layout: of the loop's cache.

    Raises: `ValueError` for sizes below 1, an unknown layout, or a rule that is only for some rows.
    """

    def __init__(self, model: Any, rows: int, width: int, capacity: int, layout: LayoutName = "filled") -> None:
        limit = learned_positions(model.base, model.anatomy)
        self.model, self.width = model, width
        self.capacity = capacity if limit is None else min(capacity, limit)
        if model.loop.rule is not None:
            check_rule(model.loop.rule, model.device)

        def batch(part: RecurrentWrapper | None, layout: LayoutName) -> DepthBatch | None:
            return None if part is None else DepthBatch(part, KVReuseCache(layout, self.capacity), rows, width)

        self.prelude, self.coda = batch(model.prelude, "filled"), batch(model.coda, "filled")
        self.loop = DepthBatch(model.loop, KVReuseCache(layout, self.capacity), rows, width)
        self._free = [*reversed(range(rows))]
        self._owners: dict[int, Request] = {}
        self._waiting, self._ready = deque[Request](), deque[Request]()
        self._left = deque[tuple[Request, Tensor]]()  # tokens that left the loop, before coda and head

    def add(self, request: Request) -> None:
        """Serve a request as soon as a row is free.

        Raises: `ValueError` if it does not fit into a row.
        """
        self._check_fits(request.longest)
        self._waiting.append(request)

    def go_on(self, request: Request) -> None:
        """A request whose token was chosen is to get another."""
        self._ready.append(request)

    def end(self, request: Request) -> None:
        """Forget a request, wherever it is; its row is free."""
        for queue in (self._waiting, self._ready):
            if request in queue:
                queue.remove(request)
        self._left = deque(left for left in self._left if left[0] is not request)
        if self._owners.pop(request.row, None) is not None:
            for batch in (self.prelude, self.loop, self.coda):
                if batch is not None:
                    batch.release(request.row)
            self._free.append(request.row)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Begin tokens as long as there is room; then run the head, if more could begin, or else the block."""
        refused = self._begin(self._next())
        return [*refused, *(self._read() if self._left and self.loop.room > 0 else self._call())]

    def _next(self) -> list[Request]:
        """The requests whose tokens begin now: prompts where a row is free, then those that have a new token."""
        room, some = self.loop.room, list[Request]()
        while room > 0 and (self._ready or (self._waiting and self._free)):
            if self._waiting and self._free:
                request = self._waiting.popleft()
                request.row = self._free.pop()
                self._owners[request.row] = request
            else:
                request = self._ready.popleft()
            some.append(request)
            room -= len(self._new(request))
        return sorted(some, key=lambda request: request.row)

    def _new(self, request: Request) -> range:
        """Where its tokens stand that have not begun."""
        return range(self.loop.length(request.row), len(request.ids))

    def _begin(self, requests: list[Request]) -> list[Refused]:
        """Begin the new tokens of requests; a depth that cannot be had refuses the request."""
        refused, bounded = list[Refused](), list[tuple[Request, tuple[Tensor, Tensor] | None]]()
        for request in requests:
            try:
                self._check_fits(len(request.ids))
                bounded.append((request, request.bounds(self.loop.looped.steps, self._new(request).start, self.device)))
            except Exception as error:
                refused.append(self._refuse(request, error))
        if bounded:
            self._begin_all([request for request, _ in bounded], [bounds for _, bounds in bounded])
        return refused

    def _begin_all(self, requests: list[Request], bounds: list[tuple[Tensor, Tensor] | None]) -> None:
        self.model.bind()
        places = [self._new(request) for request in requests]
        x = self._embedded(requests, places)
        if self.model.config.span is not None:
            x = before(self.model.base, self.model.anatomy, x, self._tensor([at for span in places for at in span]))
        states = _once(self.prelude, requests, [*x[0].split([len(span) for span in places])])
        given = sorted(zip(requests, states, bounds, strict=True), key=lambda one: id(one[0].rule))
        for _, group in groupby(given, key=lambda one: id(one[0].rule)):
            some, own, depths = zip(*group, strict=True)
            x, mask = _rows([*own])
            least, most = self._depths([*own], [*depths])
            rows = [request.row for request in some]
            self.loop.begin(rows, x, mask=mask, min_depth=least, max_depth=most, rule=some[0].rule)

    def _depths(self, states: list[Tensor], bounds: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor | None, ...]:
        """The bounds of requests that begin together, in rows; None where no request has any."""
        if not any(bounds):
            return None, None
        steps = self.loop.looped.steps
        whole = [
            torch.tensor([[1], [steps]], device=self.device).expand(2, len(state)) if pair is None else pair
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
        for ran in self.loop.call():
            request = self._owners[ran.row]
            if isinstance(ran, Failed):
                refused.append(self._refuse(request, ran.error))
            elif ran.left:
                request.depth += ran.depth.tolist()
                # Without layers behind the loop, only the newest token of a prompt is of use.
                self._left.append((request, ran.hidden if self.coda is not None else ran.hidden[-1:]))
        return refused

    def _read(self) -> list[Event]:
        """Choose the next token of some requests."""
        room, some = self.width, list[tuple[Request, Tensor]]()
        while room > 0 and self._left:
            some.append(self._left.popleft())
            room -= len(some[-1][1])
        some.sort(key=lambda left: left[0].row)
        requests = [request for request, _ in some]
        states = _once(self.coda, requests, [state for _, state in some])
        logits = self._logits(requests, torch.stack([state[-1] for state in states]))
        likeliest = logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1).tolist()
        return [*map(self._choose, requests, logits.unsqueeze(1), likeliest)]

    def _choose(self, request: Request, logits: Tensor, likeliest: int) -> Event:
        try:
            token, logprob = request.choose(logits, likeliest)
        except Exception as error:
            return self._refuse(request, error)
        request.ids.append(token)
        return Chosen(request, token, logprob)

    def _refuse(self, request: Request, error: Exception) -> Refused:
        self.end(request)
        return Refused(request, error)

    def _logits(self, requests: list[Request], hidden: Tensor) -> Tensor:
        """The logits `(n, vocabulary)` of the newest tokens of requests, in which `hidden (n, dim)` left the layers."""
        base, anatomy = self.model.base, self.model.anatomy
        hidden = hidden.unsqueeze(0)
        if self.model.config.span is not None:
            places = [range(len(request.ids) - 1, len(request.ids)) for request in requests]
            x, known = self._embedded(requests, places), hidden
            positions = self._tensor([span.start for span in places])
            hidden = around(base, anatomy, x, positions, lambda _: known, lambda: self.model.loop.block.tuples)
        padded = F.pad(hidden, (0, 0, 0, -hidden.shape[1] % _TILE))
        logits: Tensor = head(base, anatomy, padded).logits[0, : hidden.shape[1]]
        return logits.float()  # as `generate` chooses

    def _embedded(self, requests: list[Request], places: list[range]) -> Tensor:
        """Embeddings `(1, n, dim)` of their tokens at some places, one request behind the other."""
        ids = [word for one, span in zip(requests, places, strict=True) for word in one.ids[span.start : span.stop]]
        x: Tensor = self.model.get_input_embeddings()(self._tensor(ids))
        return x

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor([numbers], device=self.device)

    @property
    def device(self) -> torch.device:
        """Where ids are given to the model."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device


def _once(batch: DepthBatch | None, requests: list[Request], states: list[Tensor]) -> list[Tensor]:
    """What layers that run once give for the newest tokens of requests, `(n, dim)` each."""
    if batch is None:
        return states
    rows = [request.row for request in requests]
    x, mask = _rows(states)
    batch.begin(rows, x, mask=mask)
    ran = {one.row: one.hidden for one in batch.call() if isinstance(one, Ran)}
    return [ran[row] for row in rows]


def _rows(states: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """States `(n, dim)` each, as rows `(batch, longest, dim)` with their mask; None: they are equally long."""
    lengths = torch.tensor([len(state) for state in states], device=states[0].device)
    x = pad_sequence(states, batch_first=True)
    mask = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
    return x, None if len({len(state) for state in states}) == 1 else mask
