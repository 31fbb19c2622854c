"""Runs the block, gate and update that the loop's generator asks for, and checks their results."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._nested import tensors
from .._types import WeightRows
from ..attention.context import Here, Together
from ..attention.tokens import TokenSet
from ..attention.view import KV
from .blocks import ask_piece, run, view_of
from .checks import check_result, check_scores
from .iterations import Ask, AskGate, AskUpdate, Loop
from .reads import Reads
from .writes import check_unwritten, watched


def answer(loop: Loop, ask: Ask, given: Mapping[str, Any], reads: Reads) -> Any:
    """The result of the piece that a pass of `loop` asks for; `given` are the block's further arguments."""
    if isinstance(ask, AskGate):
        return _score(loop, ask, reads)
    if isinstance(ask, AskUpdate):
        return updated(loop, Here(ask.tokens, ask.step), ask.x, ask.h, ask.start, ask.scores, ask.step)
    if loop.checkpoint and torch.is_grad_enabled():  # the backward pass computes the iteration again
        # torch notices writes into tensors that are arguments themselves, not into those of a mapping.
        seen = (tensor for tensor in tensors(given) if not tensor.is_inference())
        return checkpoint(_iterate, loop, *ask, given, *seen, use_reentrant=False)
    return _iterate(loop, *ask, given)


def _iterate(
    loop: Loop,
    x: Tensor,
    tokens: TokenSet,
    step: int,
    past: list[KV] | None,
    keep: bool,
    given: Mapping[str, Any],
    *unread: Tensor,
) -> tuple[Tensor, list[KV] | None]:
    """The block's output, and all tokens' keys and values if the next iteration may need them."""
    del unread
    view = view_of(tokens, step, loop.causal, past, keep, loop.one_call)
    out = run(loop.block, x, view, given, tokens.live.shape)
    return out, view.present if keep else None


def _score(loop: Loop, ask: AskGate, reads: Reads) -> WeightRows:
    """The gate's scores of the active tokens, in rows; 0 elsewhere."""
    rows = ask.tokens.rows(scored(loop, Here(ask.tokens, ask.step), ask.h, ask.previous, ask.step))
    if not loop.training and not torch.compiler.is_compiling() and rows.numel():
        reads.later(torch.stack(rows.detach().aminmax()), partial(check_scores, loop, ask.step))
    return rows


def scored(loop: Loop, here: Here | Together, h: Tensor, previous: Tensor, step: int) -> Tensor:
    """The gate's scores of tokens in the state `h (rows, length, dim)`."""
    arguments = watched({"h": h, "previous": previous})
    score: Tensor = ask_piece(loop.gate, here, h, previous, step)
    check_unwritten(loop.gate, arguments)
    check_result(loop.gate, "one score per token", h.shape[:-1], score, step)
    return score


def updated(
    loop: Loop, here: Here | Together, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int
) -> Tensor:
    """The next input of the tokens that continue, from the update."""
    arguments = watched({"x": x, "h": h, "start": start})
    new: Tensor = ask_piece(loop.update, here, x, h, start, scores, step)
    check_unwritten(loop.update, arguments)
    check_result(loop.update, "the next input", x.shape, new, step)
    return new if new.dtype == x.dtype else new.to(x.dtype)
