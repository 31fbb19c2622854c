"""`Guesses`: the next tokens that are guessed and started before they are chosen."""

from typing import final

from .drafts import Drafts
from .flight import Flight, without
from .requests import Choice, Request, Tokens


@final
class Guesses:
    """Starts guessed tokens in a `Flight`, and drops them if they were wrong.

    `waiting` are tokens that have run and whose next token may be guessed now. `drafts` says when to guess; None:
    never.
    """

    def __init__(self, drafts: Drafts | None, flight: Flight) -> None:
        self.drafts, self._flight = drafts, flight
        self.waiting: list[Tokens] = []

    def note(self, tokens: Tokens) -> None:
        """Note tokens that have run if their next token may be guessed now."""
        request, chain, drafts = tokens.request, tokens.request.chain, self.drafts
        most = self._flight.capacity if request.longest is None else request.longest
        if drafts is None or not request.guessable or tokens.end >= most:
            return
        if tokens.exited and tokens is chain[0]:
            return
        if (tokens.exited or tokens.depth[-1] >= drafts.depth) and (tokens is chain[-1] or drafts.revise):
            self.waiting.append(tokens)

    def take(self, room: int) -> list[Tokens]:
        """Take the tokens whose next token is guessed now: if guesses save time, and at most `room` new ones."""
        waiting, self.waiting = self.waiting, []
        if self.drafts is None or not waiting:
            return []
        new = [tokens for tokens in waiting if tokens is tokens.request.chain[-1]][: max(0, room)]
        revised = [tokens for tokens in waiting if tokens is not tokens.request.chain[-1]]
        rows = max(1, self._flight.rows)
        return [tokens for tokens in (*new, *revised) if self.drafts.pays(rows)]

    def start(self, tokens: Tokens, guess: Choice, final: bool) -> None:
        """Start a guess of the next token after these. It replaces an earlier guess that was different.

        `final` says that `guess` is what the head chooses in the end.
        """
        request, place = tokens.request, tokens.request.chain.index(tokens) + 1
        tokens.next, tokens.final = guess, final
        tokens.head_calls += not final
        earlier = request.chain[place:]
        if earlier and earlier[0].ids != [guess.token]:
            tokens.wasted += sum(sum(one.depth) for one in earlier)
            self.drop(request, place)
        if place == len(request.chain):
            self._flight.add(request, [guess.token])

    def resolve(self, tokens: Tokens, token: int) -> None:
        """Compare the guess after `tokens` with the `token` that was chosen. A wrong guess is dropped."""
        request = tokens.request
        if not request.chain or self.drafts is None:
            return
        first = request.chain[0]
        right, ran = first.ids == [token], sum(sum(one.depth) for one in request.chain)
        saved, wasted = (sum(first.depth), 0) if right else (0, ran)
        self.drafts.resolved(right, saved, tokens.wasted + wasted, tokens.head_calls)
        if not right:
            self.drop(request, 0)

    def drop(self, request: Request, place: int) -> None:
        """Drop the tokens of a request's chain from index `place` on."""
        dropped = request.chain[place:]
        if dropped:
            del request.chain[place:]
            self._flight.drop(request.row, dropped)
            self.waiting = without(self.waiting, dropped)
