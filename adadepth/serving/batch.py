"""`DepthBatch`: passes of one loop that began at different times, in one call of the block.

All iterations have the same weights, so one call may run tokens of different iterations. A row whose token has exited
starts its next token at once, beside rows whose tokens still run, so the call is always full.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, SupportsIndex, final

import torch
import torch.nn.functional as F
from torch import Tensor

from .._given import integer, named
from .._types import HiddenRows, MaskRows
from ..cache.kv_reuse import KVReuseCache
from ..cache.tokens import JoinedTokens
from ..loop.agreement import altered
from ..loop.answers import scored, updated
from ..loop.arguments import check_decodes, check_given, check_rows
from ..loop.blocks import run_block, view_of
from ..loop.bounds import Bounds, Depth
from ..loop.checks import check_any_row, check_part, check_scores, check_together
from ..loop.iterations import AskBlock, AskGate, AskUpdate
from ..loop.selfcheck import check_itself, due
from ..loop.wrapper import RecurrentWrapper
from ..rules import Rule
from .joined import A, Request, context, groups, joined, split, together
from .passes import Chunk, Pass


class Ran(NamedTuple):
    """The result of a call for the tokens of a row that began together.

    Shapes:
        row, position: the row, and the position of the first token in it.
        hidden: `(tokens, dim)`: the output of a token that has exited, the state of one that continues.
        depth: `(tokens,)` int64, the iterations that each has run.
        left: whether all have exited; if not, it is a single token that continues.
    """

    row: int
    position: int
    hidden: Tensor
    depth: Tensor
    left: bool


class Failed(NamedTuple):
    """A row that failed at `position`, and why. Its tokens from there on are dropped.

    The tokens before `position` are kept, and those of them that still run continue.
    """

    row: int
    position: int
    error: Exception


@final
class DepthBatch:
    """Runs tokens of many rows, each at its own iteration, with one call of the block for all of them.

    A row is a sequence of tokens, for example one request. `begin` gives rows new tokens. `call` runs the block once on
    every active token, and returns which have exited. Each token gives the same result as in a pass of its row alone.

    Arguments:
        looped: the loop, in evaluation mode; its own `skip` is not read.
        cache: a new `KVReuseCache` with a capacity, the most tokens that a row may hold.
        rows: the number of rows.
        width: the number of tokens that a call should run. `begin` accepts more; `room` says how many still fit.

    Raises: `ValueError` for a cache that is not new, a loop that is training or not causal, or sizes below 1.
    """

    def __init__(self, looped: RecurrentWrapper, cache: KVReuseCache, rows: int, width: int) -> None:
        if not (isinstance(looped, RecurrentWrapper) and isinstance(cache, KVReuseCache)):
            raise ValueError(
                f"DepthBatch expected a RecurrentWrapper and a KVReuseCache, got {named(looped)} and {named(cache)}. "
                "Call it as DepthBatch(looped, adadepth.KVReuseCache(capacity=2048), rows=8, width=8)."
            )
        if rows < 1 or width < 1:
            raise ValueError(f"DepthBatch expected rows and width of 1 or more, got rows={rows}, width={width}.")
        if looped.training or not looped.causal:
            raise ValueError(
                f"DepthBatch expected a causal loop in evaluation mode, got causal={looped.causal} and "
                f"training={looped.training}. Call looped.eval() first; a loop that is not causal has no next token."
            )
        device = next((p.device for p in looped.parameters()), torch.device("cpu"))
        cache.reserve(rows, looped.steps, device, looped._identity, looped.one_call)
        self.looped, self.cache, self.rows, self.width = looped, cache, rows, width
        self._passes: list[Pass] = []
        self._chunks: list[list[Chunk]] = [[] for _ in range(rows)]
        self._exited: dict[Chunk, Tensor] = {}  # depths of chunks that the cache does not keep yet
        self._failed: dict[int, Failed] = {}  # by row; kept until `call` returns them, because a later piece may raise
        self._checked: Rule | None = None

    @property
    def room(self) -> int:
        """How many more tokens fit into the next call; negative if it has more than `width`."""
        for run in self._passes:
            run.apply_drops()
        return self.width - sum(run.size for run in self._passes)

    def length(self, row: SupportsIndex) -> int:
        """The number of tokens in a row, those that still run included. It is the position of the row's next token.

        Raises: `ValueError` for a row that does not exist.
        """
        number = self._row(row)
        chunks = self._chunks[number]
        return chunks[-1].position + chunks[-1].tokens if chunks else self.cache._lengths[number]

    @torch.no_grad()
    def begin(
        self,
        rows: Iterable[SupportsIndex],
        x: HiddenRows,
        *,
        mask: MaskRows | None = None,
        start: HiddenRows | None = None,
        min_depth: Depth = None,
        max_depth: Depth = None,
        rule: Rule | None = None,
        block_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Add new tokens to the end of some rows.

        Arguments:
            rows: the numbers of the rows, from 0, each once.
            x: `(len(rows), seq, dim)`; this and the other arguments are those of `RecurrentWrapper.forward`.
            rule: used instead of the loop's.

        Raises: `ValueError` as a `RecurrentWrapper` does; for rows that do not exist, that come twice, or that would
            hold more than the cache's capacity; and if the loop's rule is for certain rows. No token is added then.
        """
        numbers = [self._row(row) for row in rows]
        if len({*numbers}) != len(numbers) or len(numbers) != len(x):
            raise ValueError(
                f"begin expected numbers of the {self.rows} rows, from 0, each once, and x for each of them, got rows "
                f"{numbers} and x of shape {tuple(x.shape)}."
            )
        check_rows(x, mask, start)
        check_together(self.looped.gate, self.looped.update)
        shape = (x.shape[0], x.shape[1])
        given = check_given(block_kwargs, shape)
        bounds = Bounds.of(self.looped.steps, min_depth, max_depth, shape, x.device)
        loop = self._loop_with(rule)
        tokens = self.cache.behind(x, mask, {row: self.length(row) for row in numbers})
        if due(self.looped, tokens, x):
            check_itself(self.looped, x, mask, {"start": start, "block_kwargs": given})
        run = Pass(loop, x, tokens, start, bounds, given)
        self._passes.append(run)
        for chunk in run.chunks:
            if chunk.tokens:
                self._chunks[chunk.row].append(chunk)

    @torch.no_grad()
    def call(self, wait: Collection[tuple[int, int]] = ()) -> list[Ran | Failed]:
        """Run the block once on all active tokens, except for some that wait.

        Arguments:
            wait: row and position of tokens, as in `Ran`, that do not run now; a later call continues them. Rows that
                began together wait together. A later token of the same row may run as many iterations as a waiting
                one has, and no more, because the next iteration reads keys and values that are not yet written.

        Returns: the results. Tokens of one row that began together are returned once all of them have exited; a
            single token is returned after each iteration.
        Raises: what the block, the gate or the update raises, and `ValueError` for tokens that cannot wait. No token
            is lost then, and you may call again.
        """
        for run in self._passes:
            run.apply_drops()
        self._answer_blocks(self._to_run(wait))
        self._answer_gates(self._requests(AskGate))
        continuing = self._requests(AskUpdate)
        ran = [*_continuing(continuing)]
        self._answer_updates(continuing)
        ran = [*self._exits(), *ran]  # after all that may raise, because each exit is returned once
        failed, self._failed = self._failed, {}
        for run in self._passes:
            if run.error is not None:
                _record_failure(failed, [run.chunks[index] for index in run.active], run.error)
        self._passes = [run for run in self._passes if run.ask is not None]
        for row, failure in failed.items():
            self.drop(row, failure.position)
        ran = [state for state in ran if state.row not in failed or state.position < failed[state.row].position]
        return [*failed.values(), *ran]

    def drop(self, row: SupportsIndex, position: SupportsIndex) -> None:
        """Forget the tokens of a row from `position` on. They stop, and the row's next token gets this position.

        Raises: `ValueError` for a row or a position that does not exist, and if tokens that began together would be
            parted, and they have not all exited.
        """
        number, start = self._row(row), integer(position)
        if start is None or start < 0:
            raise ValueError(
                f"drop expected the position of the first token to forget, 0 or more, got {position!r}. To keep the "
                "first n tokens of a row, call drop(row, n)."
            )
        chunks, end = self._chunks[number], self.length(number)
        for chunk in chunks:
            if chunk.position < start < chunk.position + chunk.tokens:
                raise ValueError(
                    f"drop expected a position at which tokens of row {number} began, got {start}: the {chunk.tokens} "
                    f"tokens from position {chunk.position} on began together, and some of them still run. Drop all "
                    "of them, or wait until they have exited."
                )
        while chunks and chunks[-1].position + chunks[-1].tokens > start:
            chunk = chunks.pop()
            self._exited.pop(chunk, None)
            chunk.run.drop(chunk.index)
        if number in self._failed and self._failed[number].position >= start:
            del self._failed[number]
        self.cache.forget(number, slice(start, end))

    def release(self, row: SupportsIndex) -> None:
        """Forget all tokens of a row, so that another request can use it.

        Raises: `ValueError` for a row that does not exist.
        """
        self.drop(row, 0)

    def _row(self, row: SupportsIndex) -> int:
        """The number of a row, as an int.

        Raises: `ValueError` for a row that does not exist.
        """
        number = integer(row)
        if number is None or not 0 <= number < self.rows:
            raise ValueError(f"DepthBatch expected the number of one of its {self.rows} rows, from 0, got {row!r}.")
        return number

    def _loop_with(self, rule: Rule | None) -> RecurrentWrapper:
        """The loop, with another rule if one is given. The loop's own rule is checked once: it must accept any row.

        Raises: `ValueError` for a rule that cannot decide about single tokens, or that is no rule.
        """
        if rule is not None:
            check_decodes(rule)
            loop: RecurrentWrapper = altered(self.looped, rule=check_part("rule", rule))
            return loop
        check_decodes(self.looped.rule)
        if self.looped.rule is not None and self.looped.rule is not self._checked:
            check_any_row(self.looped.rule, "how much of each token continues, for any row", self.cache.depth.device)
            self._checked = self.looped.rule
        return self.looped

    def _requests(self, kind: type[A]) -> "list[Request[A]]":
        return [(run, run.ask) for run in self._passes if isinstance(run.ask, kind)]

    def _to_run(self, wait: Collection[tuple[int, int]]) -> "list[Request[AskBlock]]":
        """The passes that run now, without those whose tokens wait.

        Raises: `ValueError` as `call` does.
        """
        requests = self._requests(AskBlock)
        if not wait:
            return requests
        places = {run: {(f.row, f.position) for f in run.chunks if f.index in run.active} for run, _ in requests}
        if unknown := set(wait).difference(*places.values()):
            raise ValueError(f"call expected wait to be rows and positions of tokens in flight, got {min(unknown)}.")
        waiting = [run for run in places if places[run] & set(wait)]
        if apart := [run for run in waiting if not places[run] <= set(wait)]:
            raise ValueError(
                f"Rows that began together must wait together, got wait={sorted(wait)}, without "
                f"{min(places[apart[0]] - set(wait))}. Begin rows one by one if they must wait separately."
            )
        for chunks in self._chunks:
            running = [chunk for chunk in chunks if chunk not in self._exited and chunk.run.ask is not None]
            _check_order(running, waiting)
        return [(run, ask) for run, ask in requests if run not in waiting]

    def _answer_blocks(self, requests: "list[Request[AskBlock]]") -> None:
        if not requests:
            return
        runs = [run for run, _ in requests]
        (step, tokens), *others = parts = [run.part for run in runs]
        view = view_of(JoinedTokens(parts) if others else tokens, step, True, None, False, self.looped.one_call)
        given = together([run.each_given() for run in runs])
        h = run_block(self.looped.block, joined([ask.x for _, ask in requests]), view, given)
        for run, part in split(h, runs):
            run.answer((part, None))

    def _answer_gates(self, requests: "list[Request[AskGate]]") -> None:
        """Answer the gate's requests. Rows whose score is NaN have failed."""
        for group in groups(requests, self.looped.gate):
            runs = [run for run, _ in group]
            h, previous = joined([ask.h for _, ask in group]), joined([ask.previous for _, ask in group])
            scores = scored(self.looped, context(runs), h, previous, group[0][1].step)
            for run, score in split(scores, runs):
                step, tokens = run.part
                try:
                    check_scores(self.looped, step, torch.stack(score.aminmax()).tolist())
                except ValueError as error:
                    wrong = zip(run.chunk_of_each(), score[0].isnan().tolist(), strict=True)
                    _record_failure(self._failed, [chunk for chunk, bad in wrong if bad], error)
                run.answer(tokens.rows(score.nan_to_num()))

    def _answer_updates(self, requests: "list[Request[AskUpdate]]") -> None:
        for group in groups(requests, self.looped.update):
            runs = [run for run, _ in group]
            last = max(ask.step for _, ask in group)
            scores = [F.pad(ask.scores, (last - ask.step, 0), value=1.0) for _, ask in group]
            x, h = joined([ask.x for _, ask in group]), joined([ask.h for _, ask in group])
            start = joined([ask.start for _, ask in group])
            for run, part in split(updated(self.looped, context(runs), x, h, start, joined(scores), last), runs):
                run.answer(part)

    def _exits(self) -> Iterator[Ran]:
        """The chunks that have exited. The cache keeps each once all earlier chunks of its row have exited."""
        for chunk, hidden, depth in [each for run in self._passes for each in run.exits()]:
            self._exited[chunk] = depth
            chunks = self._chunks[chunk.row]
            while chunks and chunks[0] in self._exited:
                self.cache.hold(chunk.row, self._exited.pop(chunks.pop(0)))
            yield Ran(chunk.row, chunk.position, hidden, depth, True)


def _check_order(chunks: list[Chunk], waiting: list[Pass]) -> None:
    """Check that no token runs an iteration that an earlier token of its row, which waits, has not run."""
    for before, after in pairwise(chunks):
        depth, _ = before.run.part
        if before.run in waiting and after.run not in waiting and after.run.part[0] >= depth:
            raise ValueError(
                f"The token at position {after.position} of row {after.row} attends to the one at {before.position}, "
                f"which must wait at depth {depth}, so its keys and values are missing. Let both wait, or neither."
            )


def _record_failure(failed: dict[int, Failed], chunks: list[Chunk], error: Exception) -> None:
    """Record a failure for each row: the one at the smallest position, since all later tokens are dropped."""
    for chunk in chunks:
        if chunk.row not in failed or chunk.position < failed[chunk.row].position:
            failed[chunk.row] = Failed(chunk.row, chunk.position, error)


def _continuing(requests: "list[Request[AskUpdate]]") -> Iterator[Ran]:
    """The tokens that continue and are alone in their chunk."""
    for run, ask in requests:
        depth = torch.full((1,), ask.step + 1)
        for place, chunk in enumerate(run.chunk_of_each()):
            if chunk.tokens == 1 and chunk.index in run.active:
                yield Ran(chunk.row, chunk.position, ask.h[0, place : place + 1], depth, False)
