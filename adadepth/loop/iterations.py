"""The loop, as a generator: it yields requests to run the block, the gate and the update, and gets their results.

`RecurrentWrapper` answers the requests of one pass; `adadepth.serving` answers those of several passes together.
"""

from collections.abc import Callable, Generator
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from .._types import MaskRows, WeightRows
from ..attention.tokens import TokenSet
from ..attention.view import KV
from ..gates import Gate
from ..rules import Rule
from ..updates import Update
from .bounds import Bounds
from .checks import check_result
from .recorder import Recorder
from .writes import check_unwritten, watched


@runtime_checkable
class Loop(Protocol):
    """The attributes of a `RecurrentWrapper` that its iterations need."""

    block: nn.Module
    gate: Gate | None
    rule: Rule | None
    update: Update
    causal: bool
    checkpoint: bool
    one_call: bool
    training: bool
    agree: Callable[[bool], bool]


class AskBlock(NamedTuple):
    """Asks for the block's output for the tokens `x (rows, length, dim)` of iteration `step`.

    `past` are all tokens' keys and values of the iteration before. `keep` says whether the next iteration may need
    those of this one. The answer is the output and these keys and values (or None); or it is `Only`.
    """

    x: Tensor
    tokens: TokenSet
    step: int
    past: list[KV] | None
    keep: bool


class AskGate(NamedTuple):
    """Asks for the scores of the tokens in the state `h`; the answer is in rows, `(batch, seq)`."""

    h: Tensor
    previous: Tensor
    tokens: TokenSet
    step: int


class AskUpdate(NamedTuple):
    """Asks for the next input of the tokens in the state `h`."""

    x: Tensor
    h: Tensor
    start: Tensor
    scores: Tensor
    tokens: TokenSet
    step: int


class Only(NamedTuple):
    """An answer instead of the block's output: only the tokens `go (batch, seq)` continue, the others are dropped."""

    go: MaskRows


Ask: TypeAlias = AskBlock | AskGate | AskUpdate
Asks: TypeAlias = Generator[Ask, Any, None]


def iterations(
    loop: Loop, record: Recorder, rows: Tensor, tokens: TokenSet, start: Tensor | None, bounds: Bounds
) -> Asks:
    """The iterations of a pass over `rows (batch, seq, dim)`; `record` collects the results."""
    remaining = tokens.live.to(record.dtype)
    x = tokens.take(rows)
    start = x if start is None else tokens.take(start)
    previous, past = x, None
    # With gradients, the first iteration runs even without tokens, so that parameters get a gradient of zero.
    if not (torch.is_grad_enabled() or loop.agree(not tokens.empty)):
        return
    for step in range(bounds.steps):
        exits = bounds.can_exit(step, loop.rule is not None) or tokens.empty
        answer = yield AskBlock(x, tokens, step, past, exits)
        while isinstance(answer, Only):
            remaining = torch.where(answer.go, remaining, 0)
            tokens, select = tokens.narrow(tokens.live & answer.go, None, record.reads.counts)
            if tokens.empty:
                return
            x, start, previous = select(x), select(start), select(previous)
            answer = yield AskBlock(x, tokens, step, past, exits)
        h, past = answer
        h = tokens.settle(h, x)
        del answer
        record.ran(tokens, h)
        if step == bounds.steps - 1:
            record.exited(tokens, remaining, h)
            tokens.finish(step)
            return
        if loop.gate is not None:
            record.scored((yield AskGate(h, previous, tokens, step)))
        if exits:
            continuing = _continuing(loop.rule, record.history, remaining, tokens, bounds, step)
            record.exited(tokens, remaining - continuing, h)
            remaining = continuing
            tokens, select = tokens.narrow(continuing > 0, step, record.reads.counts)
            x, h, start = select(x), select(h), select(start)
        if not loop.agree(not tokens.empty):
            return
        x = tokens.settle((yield AskUpdate(x, h, start, record.scores(tokens, x), tokens, step)), x)
        previous = x if loop.gate is None else h
        del h  # only a gate reads h: without a gate, its graph is freed with the iteration


def _continuing(
    rule: Rule | None, history: Tensor, remaining: Tensor, tokens: TokenSet, bounds: Bounds, step: int
) -> WeightRows:
    """The weight of each token that continues after iteration `step`."""
    continuing = remaining
    if rule is not None and not bounds.forced(step):
        arguments = watched({"remaining": remaining, "positions": tokens.positions})
        continuing = rule(history, remaining, tokens.positions)
        check_unwritten(rule, arguments)
        check_result(rule, "how much of each token continues", remaining.shape, continuing, step)
    return bounds.clamp(continuing, remaining, step)


def answered(asks: Asks, answer: object) -> Ask | None:
    """The next request of the loop, given an answer; None at its end."""
    try:
        return asks.send(answer)
    except StopIteration:
        return None
