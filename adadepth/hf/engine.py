"""Many requests at once: their tokens share calls of the block, each at its own iteration."""

from collections import deque
from collections.abc import Iterable
from itertools import groupby
from time import perf_counter
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..serving import DepthBatch, Failed
from .cache import AdaptiveCache
from .drafts import Drafts
from .inputs import learned_positions
from .outside import Outside, in_rows
from .requests import Depths, Request, Tokens, check_rule

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

    Raises: `ValueError` for sizes below 1, a cache that holds something or has no capacity, or a rule
        that is only for some rows.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        width: int,
        cache: AdaptiveCache,
        drafts: Drafts | None = None,
    ) -> None:
        if model.loop.rule is not None:
            check_rule(model.loop.rule, model.device)
        self.outside = Outside(model, rows, width, cache)
        self.loop = DepthBatch(model.loop, cache.parts["loop"], rows, width)
        limit, given = learned_positions(model.base, model.anatomy), cache.parts["loop"].capacity
        self.width, self.drafts = width, drafts
        self.capacity = min(capacity for capacity in (limit, given) if capacity is not None)
        self._free = [*reversed(range(rows))]
        self._owners: dict[int, Request] = {}
        self._waiting = deque[Request]()
        self._new: list[Tokens] = []
        self._ready = deque[Tokens]()
        self._flying: dict[tuple[int, int], Tokens] = {}  # in the loop, by row and position
        self._left = deque[Tokens]()  # have left the loop, before coda and head
        self._guessing: list[Tokens] = []  # what stands behind them may be guessed now

    def add(self, request: Request) -> None:
        """Serve a request as soon as a row is free.

        Raises: `ValueError` if it does not fit into a row.
        """
        self._check_fits(request.longest)
        self._waiting.append(request)

    def go_on(self, request: Request) -> None:
        """A request whose token was chosen is to get another."""
        if request.chain:
            self._certain(request.chain[0])
        else:
            self._next(request, request.ids[-1])

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
    def run_through(self, requests: list[Request]) -> None:
        """Run the last tokens of requests that are stopped, for whoever goes on from their rows."""
        for request in requests:
            request.longest = len(request.ids)
            self._next(request, request.ids[-1])
        while not all(tokens.left for request in requests for tokens in request.chain):
            refused = self._before()
            self._begin()
            for one in (*refused, *self._call()):
                raise one.error
        if self._left:
            self.outside.logits([*self._left], [])  # also what stands behind the loop goes on from there
            self._left.clear()

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Begin as many tokens as there is room for; then run the head, if more could begin, or else the block."""
        refused = self._before()
        self._begin()
        return [*refused, *(self._read() if (self._left or self._guessing) and self._room > 0 else self._call())]

    @property
    def _room(self) -> int:
        """How many single tokens may begin."""
        return self.width - sum(len(tokens.ids) == 1 for tokens in self._flying.values())

    def _next(self, request: Request, *ids: int) -> None:
        """A request's next tokens are these."""
        position = request.chain[-1].end if request.chain else self.loop.length(request.row)
        tokens = Tokens(request, position, [*ids])
        request.chain.append(tokens)
        self._new.append(tokens)

    def _admit(self) -> None:
        """Prompts for which there is a row."""
        tokens = sum(len(tokens.ids) for tokens in self._flying.values() if len(tokens.ids) > 1)
        while tokens < _PROMPTS and self._waiting and self._free:
            request = self._waiting.popleft()
            request.row = self._free.pop()
            self._owners[request.row] = request
            self._next(request, *request.ids)
            tokens += len(request.ids)

    def _before(self) -> list[Refused]:
        """What comes before the loop, for all new tokens in one call; a request without depths is refused."""
        self._admit()
        new, self._new = self._new, []
        refused, bounded = list[Refused](), list[Tokens]()
        for tokens in new:
            try:
                self._check_fits(tokens.end)
                tokens.bounds = tokens.request.bounds(self.loop.looped.steps, tokens, self.outside.device)
                bounded.append(tokens)
            except Exception as error:
                refused += self._fail(tokens, error)
        for tokens, state in zip(bounded, self.outside.before(bounded) if bounded else [], strict=True):
            tokens.state = state
            self._ready.append(tokens)
        return refused

    def _begin(self) -> None:
        """Begin all prompts, and single tokens as long as there is room."""
        room, some, rest = self._room, list[Tokens](), deque[Tokens]()
        for tokens in self._ready:
            single = len(tokens.ids) == 1
            (rest if single and room <= 0 else some).append(tokens)
            room -= single
        self._ready = rest
        some.sort(key=lambda tokens: (id(tokens.request.rule), tokens.request.row))
        for _, group in groupby(some, key=lambda tokens: id(tokens.request.rule)):
            begun = [*group]
            states = [tokens.state for tokens in begun if tokens.state is not None]
            x, mask = in_rows(states)
            least, most = self._depths(states, [tokens.bounds for tokens in begun])
            rows = [tokens.request.row for tokens in begun]
            self.loop.begin(rows, x, mask=mask, min_depth=least, max_depth=most, rule=begun[0].request.rule)
            self._flying |= {(tokens.request.row, tokens.position): tokens for tokens in begun}

    def _depths(self, states: list[Tensor], bounds: list[Depths]) -> tuple[Tensor | None, ...]:
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
        self._guessing = []
        refused, began, singles = list[Refused](), perf_counter(), self._singles()
        for ran in self.loop.call():
            tokens = self._flying[ran.row, ran.position]
            if isinstance(ran, Failed):
                refused += self._fail(tokens, ran.error)
                continue
            tokens.left, tokens.depth = ran.left, ran.depth.tolist()
            # Without layers behind the loop, only the newest token of a prompt is of use.
            tokens.state = ran.hidden if self.outside.coda is not None else ran.hidden[-1:]
            if ran.left:
                del self._flying[ran.row, ran.position]
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
            self._left.append(tokens)

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
        while self._left and len(some) < self.width and tokens < _PROMPTS:
            some.append(self._left.popleft())
            tokens += len(some[-1].ids)
        return some

    def _guessable(self) -> list[Tokens]:
        """Those whose next token is guessed now, if there is room for it."""
        waiting, self._guessing = self._guessing, []
        if self.drafts is None or not waiting:
            return []
        rows = len({row for row, _ in self._flying})
        room = self._room - len(self._left) - len(self._ready) - len(self._new)
        alone = [tokens for tokens in waiting if tokens is tokens.request.chain[-1]][: max(0, room)]
        revised = [tokens for tokens in waiting if tokens is not tokens.request.chain[-1]]
        return [tokens for tokens in (*alone, *revised) if self.drafts.pays(max(rows, 1))]

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
        """The next token of a request, and whether what was guessed goes on."""
        request = tokens.request
        try:
            choice = tokens.next if logits is None else request.choose(tokens, logits, likeliest)
        except Exception as error:
            return self._refuse(request, error)
        assert choice is not None, "it was read"
        request.ids.append(choice.token)
        request.noise.forget(request.number, len(request.ids) - request.prompt)
        request.chain.remove(tokens)
        if request.chain and self.drafts is not None:
            right, ran = request.chain[0].ids == [choice.token], sum(sum(one.depth) for one in request.chain)
            saved = sum(request.chain[0].depth) if right else 0
            self.drafts.resolved(right, saved, tokens.lost + (0 if right else ran), tokens.reads)
            if not right:
                self._cut(request, 0)
        return Chosen(request, *choice)

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
            self._next(request, tokens.next.token)

    def _may_guess(self, tokens: Tokens) -> None:
        """Tokens that have run: whether what stands behind them may be guessed."""
        chain, drafts = tokens.request.chain, self.drafts
        if drafts is None or tokens.end >= tokens.request.longest or (tokens.left and tokens is chain[0]):
            return
        if (tokens.left or tokens.depth[-1] >= drafts.depth) and (tokens is chain[-1] or drafts.revise):
            self._guessing.append(tokens)

    def _cut(self, request: Request, place: int) -> None:
        """Drop the tokens of a request's chain from a place on."""
        gone = request.chain[place:]
        if not gone:
            return
        del request.chain[place:]
        self.outside.drop(request.row, gone[0].position)
        self.loop.drop(request.row, gone[0].position)
        for tokens in gone:
            self._flying.pop((request.row, tokens.position), None)
        self._new, self._guessing = _without(self._new, gone), _without(self._guessing, gone)
        self._ready, self._left = deque(_without(self._ready, gone)), deque(_without(self._left, gone))

    def _fail(self, tokens: Tokens, error: Exception) -> list[Refused]:
        """Tokens cannot go on: nor can their request, if they are no guess."""
        if tokens is tokens.request.chain[0]:
            return [self._refuse(tokens.request, error)]
        self._cut(tokens.request, tokens.request.chain.index(tokens))
        return []

    def _singles(self) -> int:
        """How many tokens the next call runs; 0 if prompts are among them."""
        alone = all(len(tokens.ids) == 1 for tokens in self._flying.values())
        return len(self._flying) if alone else 0

    def _refuse(self, request: Request, error: Exception) -> Refused:
        self.end(request)
        return Refused(request, error)


def _without(some: Iterable[Tokens], gone: list[Tokens]) -> list[Tokens]:
    return [tokens for tokens in some if tokens not in gone]
