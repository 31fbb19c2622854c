"""The loop, as a generator: it asks for what block, gate and update give, and whoever runs it answers.

One pass is answered alone (`RecurrentWrapper`); several passes may be answered together (`adadepth.serving`).
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


@runtime_checkable
class Loop(Protocol):
    """A `RecurrentWrapper`, as far as its iterations need it."""

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
    """The block's output for the tokens `x (rows, length, dim)` of iteration `step`, and all tokens' keys and values.

    `past` are those of the iteration before; `keep` says whether the next iteration may need these. Answered with
    both; or with `Only`.
    """

    x: Tensor
    tokens: TokenSet
    step: int
    past: list[KV] | None
    keep: bool


class AskGate(NamedTuple):
    """The scores of the tokens in the state `h`, answered in rows, `(batch, seq)`."""

    h: Tensor
    previous: Tensor
    tokens: TokenSet
    step: int


class AskUpdate(NamedTuple):
    """The next input of the tokens in the state `h`."""

    x: Tensor
    h: Tensor
    start: Tensor
    scores: Tensor
    tokens: TokenSet
    step: int


class Only(NamedTuple):
    """In place of the block's output: only the tokens `go (batch, seq)` go on, the others are dropped unfinished."""

    go: MaskRows


Ask: TypeAlias = AskBlock | AskGate | AskUpdate
Asks: TypeAlias = Generator[Ask, Any, None]


def iterations(
    loop: Loop, record: Recorder, rows: Tensor, tokens: TokenSet, start: Tensor | None, bounds: Bounds
) -> Asks:
    """The iterations of a pass over `rows (batch, seq, dim)`; what they come to is in `record`."""
    remaining = tokens.live.to(record.dtype)
    x = tokens.take(rows)
    start = x if start is None else tokens.take(start)
    previous, past = x, None
    # With gradients the first iteration runs even on nothing: parameters then get one, of zero.
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
            record.left(tokens, remaining, h)
            tokens.finish(step)
            return
        if loop.gate is not None:
            record.scored((yield AskGate(h, previous, tokens, step)))
        if exits:
            stays = _stays(loop.rule, record.history, remaining, tokens, bounds, step)
            record.left(tokens, remaining - stays, h)
            remaining = stays
            tokens, select = tokens.narrow(stays > 0, step, record.reads.counts)
            x, h, start = select(x), select(h), select(start)
        if not loop.agree(not tokens.empty):
            return
        x = tokens.settle((yield AskUpdate(x, h, start, record.scores(tokens, x), tokens, step)), x)
        previous = x if loop.gate is None else h
        del h  # only a gate reads h: without one its graph does not outlive the iteration


def _stays(
    rule: Rule | None, history: Tensor, remaining: Tensor, tokens: TokenSet, bounds: Bounds, step: int
) -> WeightRows:
    """What stays of each token after iteration `step`."""
    stays = remaining
    if rule is not None and not bounds.forced(step):
        stays = rule(history, remaining, tokens.positions)
        check_result(rule, "what stays of each token", remaining.shape, stays, step)
    return bounds.clamp(stays, remaining, step)


def answered(asks: Asks, answer: object) -> Ask | None:
    """What the loop asks next, given an answer; None at its end."""
    try:
        return asks.send(answer)
    except StopIteration:
        return None
