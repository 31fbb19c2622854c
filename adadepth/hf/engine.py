"""The `Engine`: runs many requests at once. Their tokens share calls of the block, each at its own iteration."""

from collections import deque
from time import perf_counter
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..serving import DepthBatch
from .cache import AdaptiveCache
from .counts import Counts
from .drafts import Drafts
from .flight import FailedTokens, Flight
from .guesses import Guesses
from .inputs import learned_positions
from .outside import Outside
from .requests import Request, Tokens, check_rule

_PROMPTS = 512  # no further prompt begins while this many prompt tokens are in the loop


class Chosen(NamedTuple):
    """The next token of a request. The caller must call `go_on`, `stop` or `end` before the next step."""

    request: Request
    token: int
    logprob: float | None


class Refused(NamedTuple):
    """A request that failed, and the error. The engine has already ended it."""

    request: Request
    error: Exception


Event = Chosen | Refused


@final
class Engine:
    """Runs requests step by step. Each `step` runs either the block or the head once.

    A request gets the same tokens, at the same depths, as from `generate` alone. The layers before the loop run once
    for each token, before it enters the loop. The layers after the loop run once for each token after it has exited, in
    the order of the row. While a token still runs, the next token may start as a guess. The guess is kept if the head
    then chooses that token, and dropped otherwise.

    Arguments:
        model: an adapted model in evaluation mode.
        rows: the number of requests in progress; further requests wait.
        width: the most tokens that a call of the block runs, not counting those of prompts. A prompt starts as soon as
            a row is free and fewer than 512 tokens of other prompts are in the loop.
        cache: a new cache. Its capacity is the most tokens of a request, prompt and answer together. Memory for
            `rows * capacity` tokens is allocated at once.
        drafts: how the next token is guessed if a call has room for it; None: tokens are not guessed.

    Raises: `ValueError` for sizes below 1, a cache that is not empty or has no capacity, or a rule that does not
        accept any row.
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
        self._guesses = Guesses(drafts, self._flight)
        self._free = [*reversed(range(rows))]
        self._owners: dict[int, Request] = {}
        self._waiting = deque[Request]()
        self._exited = deque[Tokens]()  # exited the loop; coda and head have not run

    @property
    def in_progress(self) -> int:
        """The number of requests that have a row."""
        return len(self._owners)

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a row."""
        return len(self._waiting)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        parts = (self.outside.prelude, self.loop, self.outside.coda)
        return sum(part.cache.nbytes for part in parts if part is not None)

    def check(self, request: Request) -> None:
        """Check that a request can be added.

        Raises: `ValueError` if it does not fit into a row, and whatever a function that gives its depths raises.
        """
        self._flight.check_fits(_least_room(request))
        request.bounds(self.loop.looped.steps, Tokens(request, 0, request.ids), self.outside.device)

    def add(self, request: Request) -> None:
        """Add a request. It starts as soon as a row is free.

        Raises: `ValueError` if it does not fit into a row.
        """
        self._flight.check_fits(_least_room(request))
        self._waiting.append(request)

    def go_on(self, request: Request) -> None:
        """Continue a request whose token was chosen with another token."""
        if request.chain:
            self._queue_exited(request.chain[0])
        else:
            self._flight.add(request, request.ids[-1:])

    def end(self, request: Request) -> None:
        """End a request, waiting or in progress, and free its row."""
        self.stop(request)
        if self._owners.pop(request.row, None) is not None:
            self.outside.release(request.row)
            self.loop.release(request.row)
            self._free.append(request.row)

    def stop(self, request: Request) -> None:
        """Stop a request: it gets no more tokens, but its row and cache entries are kept."""
        if request.row < 0:
            self._waiting.remove(request)
        self._guesses.drop(request, 0)
        self._exited = deque(tokens for tokens in self._exited if tokens.request is not request)
        request.noise.end(request.number)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Start as many tokens as there is room for. Then run the head if room is left, otherwise the block."""
        self._begin_prompts()
        refused = self._handle_failed(self._flight.begin())
        use_head = (self._exited or self._guesses.waiting) and self._flight.room > 0
        return [*refused, *(self._run_head() if use_head else self._run_block())]

    @torch.no_grad()
    def run_last_tokens(self, requests: list[Request]) -> None:
        """Run the last tokens of stopped requests, so that a later call can continue from their rows.

        Raises: the error of the first that fails.
        """
        for request in requests:
            request.longest = len(request.ids)
            self._flight.add(request, request.ids[-1:])
        while not all(tokens.exited for request in requests for tokens in request.chain):
            for refused in (*self._handle_failed(self._flight.begin()), *self._run_block()):
                raise refused.error
        if self._exited:
            self.outside.logits([*self._exited], [])  # fills the coda's cache
            self._exited.clear()

    def _begin_prompts(self) -> None:
        """Start waiting prompts while rows are free and the limit of prompt tokens allows it."""
        count = self._flight.prompt_tokens
        while count < _PROMPTS and self._waiting and self._free:
            request = self._waiting.popleft()
            request.row = self._free.pop()
            self._owners[request.row] = request
            self._flight.add(request, [*request.ids])
            count += len(request.ids)

    def _run_block(self) -> list[Refused]:
        """Run the block once on all active tokens."""
        self._guesses.waiting = []
        began, single_tokens = perf_counter(), self._flight.single_tokens
        self.counts.called(self.loop.width - self.loop.room)
        ran, failed = self._flight.call()
        refused = self._handle_failed(failed)
        for tokens in ran:
            if tokens is tokens.request.chain[0]:
                self._queue_exited(tokens)
            self._guesses.note(tokens)
        if self.drafts is not None and single_tokens:
            self.drafts.calls.see(single_tokens, perf_counter() - began)
        return refused

    def _queue_exited(self, tokens: Tokens) -> None:
        """Queue tokens for the head if they have exited. They must not be a guess, or their guess must be confirmed."""
        if tokens.exited:
            tokens.request.depth += tokens.depth
            self.counts.exited(tokens.depth)
            self._exited.append(tokens)

    def _handle_failed(self, failed: list[FailedTokens]) -> list[Refused]:
        """Drop tokens that failed. Their request fails too, unless they were only a guess."""
        refused = list[Refused]()
        for tokens, error in failed:
            chain = tokens.request.chain
            if tokens is chain[0]:
                refused.append(self._fail(tokens.request, error))
            else:
                self._guesses.drop(tokens.request, chain.index(tokens))
        return refused

    def _run_head(self) -> list[Event]:
        """Run the head: choose the next token of some requests, and guess the next token of others."""
        exited = self._take_exited()
        guesses = self._guesses.take(self._flight.room - self._flight.waiting - len(self._exited))
        certain = [tokens for tokens in exited if not tokens.final]
        logits, likeliest = self._run_head_on(certain, guesses)
        each = {id(tokens): pair for tokens, *pair in zip([*certain, *guesses], logits, likeliest, strict=True)}
        events = [self._choose(tokens, *each.get(id(tokens), (None, -1))) for tokens in exited]
        for tokens in guesses:
            if tokens in tokens.request.chain:
                self._guess(tokens, *each[id(tokens)])
        return events

    def _take_exited(self) -> list[Tokens]:
        """Take from the queue the tokens whose next token is chosen now."""
        count, taken = 0, list[Tokens]()
        while self._exited and len(taken) < self.loop.width and count < _PROMPTS:
            taken.append(self._exited.popleft())
            count += len(taken[-1].ids)
        return taken

    def _run_head_on(self, certain: list[Tokens], guesses: list[Tokens]) -> tuple[Tensor | list[Tensor], list[int]]:
        """Logits of the next token after each, `(1, vocabulary)`, and its likeliest id; -1 for logits with NaN."""
        if not (certain or guesses):
            return [], []
        began = perf_counter()
        logits = self.outside.logits(certain, guesses)
        likeliest: list[int] = logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1).tolist()
        if self.drafts is not None:
            self.drafts.reads.see(len(likeliest), perf_counter() - began)
        return logits.unsqueeze(1), likeliest

    def _choose(self, tokens: Tokens, logits: Tensor | None, likeliest: int) -> Event:
        """Choose the next token of a request. A guess of it is kept if it was right, and dropped otherwise."""
        request = tokens.request
        try:
            choice = tokens.next if logits is None else request.choose(tokens, logits, likeliest)
        except Exception as error:
            return self._fail(request, error)
        assert choice is not None, "the head has run for it"
        request.append(tokens, choice.token)
        self.counts.tokens += 1
        self._guesses.resolve(tokens, choice.token)
        return Chosen(request, *choice)

    def _guess(self, tokens: Tokens, logits: Tensor, likeliest: int) -> None:
        """Guess the next token after these from its logits, and start it."""
        try:
            guess = tokens.request.choose(tokens, logits, likeliest)
        except Exception:  # raised again when the token is chosen
            return
        self._guesses.start(tokens, guess, final=tokens.exited and self.outside.coda is None)

    def _fail(self, request: Request, error: Exception) -> Refused:
        """End a request with an error."""
        self.end(request)
        self.counts.failed += 1
        return Refused(request, error)


def _least_room(request: Request) -> int:
    """How many tokens a row must hold for a request to begin."""
    return len(request.ids) if request.longest is None else request.longest
