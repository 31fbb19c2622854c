"""Many requests at once: their tokens share calls of the block, each at its own iteration."""

from collections import deque
from time import perf_counter
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..serving import DepthBatch
from .cache import AdaptiveCache
from .counts import Counts
from .drafts import Drafts
from .flight import Flight, Lost, without
from .inputs import learned_positions
from .outside import Outside
from .requests import Request, Tokens, check_rule

_PROMPTS = 512  # tokens of prompts that may be in flight when another prompt begins


class Chosen(NamedTuple):
    """The next token of a request; `go_on` or `end` is to follow before the next step."""

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
    loop run once for each token: before it begins, and, in the order of the row, when it has left. A token may begin as
    a guess, while the one before it runs: it goes on if that is chosen in the end, and is dropped if not.

    Arguments:
        model: an adapted model in evaluation mode.
        rows: how many requests are in progress; others wait.
        width: how many tokens a call of the block runs at most, those of prompts aside. Prompts begin as soon as a row
            is free and fewer than 512 tokens of other prompts are in flight.
        cache: a new one; its capacity is the most tokens of a request, prompt and answer. `rows * capacity` are
            allocated at once.
        drafts: how the next token is guessed, where a call has room for it; None: no token is.

    Raises: `ValueError` for sizes below 1, a cache that holds something or has no capacity, or a rule that is only for
        some rows.
    """

    def __init__(self, model: Any, rows: int, width: int, cache: AdaptiveCache, drafts: Drafts | None = None) -> None:
        if model.loop.rule is not None:
            check_rule(model.loop.rule, model.device)
        self.outside = Outside(model, rows, width, cache)
        self.loop = DepthBatch(model.loop, cache.parts["loop"], rows, width)
        limit, given = learned_positions(model.base, model.anatomy), cache.parts["loop"].capacity
        self.capacity = min(capacity for capacity in (limit, given) if capacity is not None)
        self.drafts, self.counts = drafts, Counts()
        self._flight = Flight(self.loop, self.outside, self.capacity)
        self._free = [*reversed(range(rows))]
        self._owners: dict[int, Request] = {}
        self._waiting = deque[Request]()
        self._left = deque[Tokens]()  # have left the loop, before coda and head
        self._guessing: list[Tokens] = []  # what stands behind them may be guessed now

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
        self._flight.check_fits(request.longest)
        request.bounds(self.loop.looped.steps, Tokens(request, 0, request.ids), self.outside.device)

    def add(self, request: Request) -> None:
        """Serve a request as soon as a row is free.

        Raises: `ValueError` if it does not fit into a row.
        """
        self._flight.check_fits(request.longest)
        self._waiting.append(request)

    def go_on(self, request: Request) -> None:
        """A request whose token was chosen is to get another."""
        if request.chain:
            self._certain(request.chain[0])
        else:
            self._flight.next(request, request.ids[-1:])

    def end(self, request: Request) -> None:
        """Forget a request, wherever it is; its row is free."""
        self.stop(request)
        if self._owners.pop(request.row, None) is not None:
            self.outside.release(request.row)
            self.loop.release(request.row)
            self._free.append(request.row)

    def stop(self, request: Request) -> None:
        """A request gets no more tokens; its row keeps what it holds."""
        if request.row < 0:
            self._waiting.remove(request)
        self._cut(request, 0)
        request.noise.end(request.number)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Begin as many tokens as there is room for; then run the head, if more could begin, or else the block."""
        self._admit()
        refused = self._lost(self._flight.begin())
        read = (self._left or self._guessing) and self._flight.room > 0
        return [*refused, *(self._read() if read else self._call())]

    @torch.no_grad()
    def run_through(self, requests: list[Request]) -> None:
        """Run the last tokens of requests that are stopped, for whoever goes on from their rows.

        Raises: what ends one of them.
        """
        for request in requests:
            request.longest = len(request.ids)
            self._flight.next(request, request.ids[-1:])
        while not all(tokens.left for request in requests for tokens in request.chain):
            for one in (*self._lost(self._flight.begin()), *self._call()):
                raise one.error
        if self._left:
            self.outside.logits([*self._left], [])  # also what stands behind the loop goes on from there
            self._left.clear()

    def _admit(self) -> None:
        """Prompts for which there is a row."""
        tokens = self._flight.of_prompts
        while tokens < _PROMPTS and self._waiting and self._free:
            request = self._waiting.popleft()
            request.row = self._free.pop()
            self._owners[request.row] = request
            self._flight.next(request, [*request.ids])
            tokens += len(request.ids)

    def _call(self) -> list[Refused]:
        """Run the block once on all tokens in flight."""
        self._guessing = []
        began, singles = perf_counter(), self._flight.singles
        self.counts.called(self.loop.width - self.loop.room)
        ran, lost = self._flight.call()
        refused = self._lost(lost)
        for tokens in ran:
            if tokens is tokens.request.chain[0]:
                self._certain(tokens)
            self._may_guess(tokens)
        if self.drafts is not None and singles:
            self.drafts.calls.see(singles, perf_counter() - began)
        return refused

    def _certain(self, tokens: Tokens) -> None:
        """Tokens that are no guess, or no longer: once they have left, the head may say what comes behind them."""
        if tokens.left:
            tokens.request.depth += tokens.depth
            self.counts.exited(tokens.depth)
            self._left.append(tokens)

    def _lost(self, lost: list[Lost]) -> list[Refused]:
        """Tokens that cannot go on: nor can their request, if they are no guess."""
        refused = list[Refused]()
        for tokens, error in lost:
            chain = tokens.request.chain
            if tokens is chain[0]:
                refused.append(self._refuse(tokens.request, error))
            else:
                self._cut(tokens.request, chain.index(tokens))
        return refused

    def _read(self) -> list[Event]:
        """Choose the next token of some requests, and guess that of others."""
        some, guesses = self._choosable(), self._guessable()
        certain = [tokens for tokens in some if not tokens.read]
        logits, likeliest = self._logits(certain, guesses)
        each = {id(tokens): pair for tokens, *pair in zip([*certain, *guesses], logits, likeliest, strict=True)}
        events = [self._choose(tokens, *each.get(id(tokens), (None, -1))) for tokens in some]
        for tokens in guesses:
            if tokens in tokens.request.chain:
                self._guess(tokens, *each[id(tokens)])
        return events

    def _choosable(self) -> list[Tokens]:
        """Those whose next token is chosen now."""
        tokens, some = 0, list[Tokens]()
        while self._left and len(some) < self.loop.width and tokens < _PROMPTS:
            some.append(self._left.popleft())
            tokens += len(some[-1].ids)
        return some

    def _guessable(self) -> list[Tokens]:
        """Those whose next token is guessed now: where it pays, and where there is room beside what waits."""
        waiting, self._guessing = self._guessing, []
        if self.drafts is None or not waiting:
            return []
        room = max(0, self._flight.room - self._flight.waiting - len(self._left))
        new = [tokens for tokens in waiting if tokens is tokens.request.chain[-1]][:room]
        revised = [tokens for tokens in waiting if tokens is not tokens.request.chain[-1]]
        rows = max(1, self._flight.rows)
        return [tokens for tokens in (*new, *revised) if self.drafts.pays(rows)]

    def _logits(self, certain: list[Tokens], guesses: list[Tokens]) -> tuple[Tensor | list[Tensor], list[int]]:
        """Logits behind tokens, `(1, vocabulary)` of each, and the likeliest; -1 where one is NaN."""
        if not (certain or guesses):
            return [], []
        began = perf_counter()
        logits = self.outside.logits(certain, guesses)
        likeliest: list[int] = logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1).tolist()
        if self.drafts is not None:
            self.drafts.reads.see(len(likeliest), perf_counter() - began)
        return logits.unsqueeze(1), likeliest

    def _choose(self, tokens: Tokens, logits: Tensor | None, likeliest: int) -> Event:
        """The next token of a request; what was guessed goes on if it was that."""
        request = tokens.request
        try:
            choice = tokens.next if logits is None else request.choose(tokens, logits, likeliest)
        except Exception as error:
            return self._refuse(request, error)
        assert choice is not None, "it was read"
        request.chosen(tokens, choice.token)
        self.counts.tokens += 1
        if request.chain and self.drafts is not None:
            first = request.chain[0]
            right, ran = first.ids == [choice.token], sum(sum(one.depth) for one in request.chain)
            saved, lost = (sum(first.depth), 0) if right else (0, ran)
            self.drafts.resolved(right, saved, tokens.lost + lost, tokens.reads)
            if not right:
                self._cut(request, 0)
        return Chosen(request, *choice)

    def _may_guess(self, tokens: Tokens) -> None:
        """Tokens that have run: whether what stands behind them may be guessed."""
        chain, drafts = tokens.request.chain, self.drafts
        if drafts is None or tokens.end >= tokens.request.longest or (tokens.left and tokens is chain[0]):
            return
        if (tokens.left or tokens.depth[-1] >= drafts.depth) and (tokens is chain[-1] or drafts.revise):
            self._guessing.append(tokens)

    def _guess(self, tokens: Tokens, logits: Tensor, likeliest: int) -> None:
        """Let a token begin behind these; in place of another, where the guess has changed."""
        request, place = tokens.request, tokens.request.chain.index(tokens) + 1
        try:
            tokens.next = request.choose(tokens, logits, likeliest)
        except Exception:  # where it is no guess any more, it will be raised
            return
        tokens.read = tokens.left and self.outside.coda is None
        tokens.reads += not tokens.read
        begun = request.chain[place:]
        if begun and begun[0].ids != [tokens.next.token]:
            tokens.lost += sum(sum(one.depth) for one in begun)
            self._cut(request, place)
        if place == len(request.chain):
            self._flight.next(request, [tokens.next.token])

    def _cut(self, request: Request, place: int) -> None:
        """Drop the tokens of a request's chain from a place on."""
        gone = request.chain[place:]
        if gone:
            del request.chain[place:]
            self._flight.drop(request.row, gone)
            self._guessing = without(self._guessing, gone)
            self._left = deque(without(self._left, gone))

    def _refuse(self, request: Request, error: Exception) -> Refused:
        self.end(request)
        self.counts.failed += 1
        return Refused(request, error)
