"""Computations over a vocabulary in tiles, so that no (tokens × vocabulary) matrix is ever held in memory.

`expected_embedding` is attention over the vocabulary with scale 1, and is computed like attention: one pass with a
running maximum, and a backward pass that computes each tile again. On a CPU, a tile is a small slice of the vocabulary
for all tokens, which fits into the CPU's cache. On other devices a tile is large, some tokens over the whole
vocabulary, because each operator call has a fixed cost. It is a custom operator: for Dynamo it is one node.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._given import shown
from ._modes import without_gradients
from ._types import Hidden, Score

# Logits held at a time. On a CPU more are not faster, as measured with 256 to 2,048 words for 2,048 tokens.
ON_CPU, ELSEWHERE = 2**21, 2**28
# A tile on a CPU has at least this many words, for any number of tokens: it is then about as large as their states.
_WORDS = 256


def logits_held(device: torch.device) -> int:
    """How many logits to hold at a time."""
    return ON_CPU if device.type == "cpu" else ELSEWHERE


def tile_of(tokens: int, vocabulary: int, device: torch.device) -> tuple[int, int]:
    """The numbers of tokens and of words in a tile."""
    held = logits_held(device)
    if device.type == "cpu":
        return tokens, min(vocabulary, max(_WORDS, held // max(1, tokens)))
    return max(1, min(tokens, held // vocabulary)), vocabulary


def described(module: nn.Module) -> str:
    """The type of a module and the shape of its last matrix, as in `Linear (vocabulary, dim)`."""
    shapes = [str(tuple(p.shape)) for p in module.parameters() if p.dim() == 2]
    return " ".join([type(module).__name__, *shapes[-1:]])


def score_predictions(owner: str, measure: Callable[..., Tensor], head: nn.Module, *states: Hidden) -> Score:
    """The `measure` of each token's log-probabilities from `head`, without gradients.

    Shapes: `states`, each `(..., dim)`. For each of them, `measure` gets log-probabilities `(n, vocabulary)` in
    float32 or wider; it returns `(n,)`. The result is `(...)`.
    """
    dtype = torch.promote_types(states[0].dtype, torch.float32)
    with without_gradients():
        tokens = [state.reshape(-1, state.shape[-1]) for state in states]
        rows = max(1, logits_held(tokens[0].device) // vocabulary_of(owner, head, tokens[0][:0]))
        chunks = zip(*(state.split(rows) for state in tokens), strict=True)
        scores = [measure(*(head(state).log_softmax(-1, dtype=dtype) for state in chunk)) for chunk in chunks]
    return torch.cat(scores).view(states[0].shape[:-1])


def vocabulary_of(owner: str, head: nn.Module, nothing: Tensor) -> int:
    """The size of the head's vocabulary, found by a call without tokens."""
    try:
        logits = head(nothing)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{owner} expected a head that maps (n, dim) to logits (n, vocabulary), but {type(head).__name__} failed "
            f"on states {shown(nothing)}: {error}. Give it the module that computes logits, of the width and dtype of "
            "the states."
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{owner} expected a head that maps (n, dim) to logits (n, vocabulary) over at least 2 words, got {got} "
            f"from {type(head).__name__} for {tuple(nothing.shape)}. Give it the module that computes logits; if the "
            "norm is outside the loop, include it: nn.Sequential(norm, lm_head)."
        )
    return logits.shape[1]


def expected_embedding(
    h: Hidden, head: nn.Linear, embedding: nn.Embedding, scale: float = 1.0, softcap: float | None = None
) -> Hidden:
    """`softmax(c(head(h))) E` in float32 or wider; matrix products are in the dtype of autocast, or else of `h`.

    c multiplies the logits by `scale`. With `softcap` it also bounds them: `softcap · tanh(scale · logit / softcap)`.

    Shapes: `h (..., dim)` to the same. Differentiable once.
    """
    kind = h.device.type
    lower = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and h.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if lower else h.dtype
    tokens, shape = h.reshape(-1, h.shape[-1]), (float(scale), float(softcap or 0.0))
    mixed, _ = _mix(tokens, head.weight, head.bias, embedding.weight, dtype, *shape)
    return mixed.view(*h.shape[:-1], mixed.shape[-1])


def _tiles(words: int, *tables: Tensor | None) -> Iterator[list[Any]]:
    """The tables' rows, `words` at a time; None gives None."""
    vocabulary = next(table.shape[0] for table in tables if table is not None)
    for start in range(0, vocabulary, words):
        yield [None if table is None else table[start : start + words] for table in tables]


def _product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """`out = a b` or `out += a b`, where `out` may be wider than the product."""
    if out.dtype == a.dtype:  # in place, so autocast does not apply
        return out.addmm_(a, b, beta=int(add))
    return out.add_(a @ b) if add else out.copy_(a @ b)


def _added(out: Tensor, new: Tensor, more: bool) -> None:
    """`out += new`, or `out = new`."""
    if more:
        out.add_(new)
    else:
        out.copy_(new)


def _logits(space: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor) -> Tensor:
    """`(words, T)`, written into `space`."""
    logits = _product(space[: weight.shape[0]], weight.to(h.dtype), h.T)
    return logits if bias is None else logits.add_(bias.unsqueeze(1))


def _shaped(logits: Tensor, scale: float, cap: float) -> Tensor:
    """Logits, scaled, and bounded by `cap` if it is not 0; in place."""
    if cap:
        return logits.mul_(scale / cap).tanh_().mul_(cap)
    return logits if scale == 1.0 else logits.mul_(scale)


def _slope(shaped: Tensor, scale: float, cap: float) -> Tensor | float:
    """The derivative of `_shaped` by the logits, computed from its result."""
    return scale * (1 - (shaped / cap).square()) if cap else scale


@torch.library.custom_op("adadepth::expected_embedding", mutates_args=())
def _mix(
    h: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, dtype: torch.dtype, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """The mixed rows `(T, dim)`, and the logarithm of each softmax's denominator `(T,)`."""
    wide = torch.promote_types(dtype, torch.float32)
    mixed = h.new_zeros(h.shape[0], table.shape[1], dtype=wide)
    total = mixed.new_zeros(h.shape[0])
    size, words = tile_of(h.shape[0], weight.shape[0], h.device)
    for x, m, t in zip(h.split(size), mixed.split(size), total.split(size), strict=True):
        _mix_some(m, t, x.to(dtype), _tiles(words, weight, bias, table), (scale, cap))
    return mixed, total


def _mix_some(mixed: Tensor, total: Tensor, x: Tensor, tiles: Iterator[list[Any]], shape: tuple[float, float]) -> None:
    """The same for the tokens `x (T, dim)`, written into `mixed` and `total`, which are 0."""
    top = torch.full_like(total, torch.finfo(total.dtype).min)  # not -inf, because a whole tile may be -inf
    space: Tensor | None = None
    for w, b, e in tiles:
        space = mixed.new_empty(w.shape[0], x.shape[0]) if space is None else space
        p = _shaped(_logits(space, w, b, x), *shape)
        higher = torch.maximum(top, p.amax(0))
        p.sub_(higher).exp_()
        shrink = (top - higher).exp_()
        total.mul_(shrink).add_(p.sum(0))
        _product(mixed.mul_(shrink.unsqueeze(1)), p.to(x.dtype).T, e.to(x.dtype), add=True)
        top = higher
    mixed.div_(total.unsqueeze(1))
    total.log_().add_(top)


@torch.library.custom_op("adadepth::expected_embedding_backward", mutates_args=())
def _unmix(
    grad: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    mixed: Tensor,
    log_total: Tensor,
    dtype: torch.dtype,
    scale: float,
    cap: float,
    needed: list[bool],
) -> list[Tensor]:
    """The gradients of those of `h`, `weight`, `bias` and `table` that are needed, in this order."""
    dh, own = torch.zeros_like(mixed), (grad * mixed).sum(-1)
    tables = zip((weight, bias, table), needed[1:], strict=True)
    dw, db, de = (torch.empty_like(t) if t is not None and need else None for t, need in tables)
    size, words = tile_of(h.shape[0], weight.shape[0], h.device)
    parts = zip(*(each.split(size) for each in (h, grad, log_total, own, dh)), strict=True)
    for number, (x, g, log, share, out) in enumerate(parts):
        tiles = _tiles(words, weight, bias, table, dw, db, de)
        _unmix_some(out, (x.to(dtype), g.to(dtype), log, share), tiles, (scale, cap), number > 0)
    return [t for t in (dh.to(h.dtype) if needed[0] else None, dw, db, de) if t is not None]


def _unmix_some(
    dh: Tensor, given: tuple[Tensor, ...], tiles: Iterator[list[Any]], shape: tuple[float, float], more: bool
) -> None:
    """The same for some tokens: `given` are their states, gradients, log denominators, and `grad · mixed` sums.

    With `more`, the gradients of the tables already hold those of other tokens, and these are added.
    """
    x, g, log_total, own = given
    spaces: Tensor | None = None
    for w, b, e, dw, db, de in tiles:
        spaces = dh.new_empty(2, w.shape[0], x.shape[0]) if spaces is None else spaces
        p = _shaped(_logits(spaces[0], w, b, x), *shape)
        slope = _slope(p, *shape)
        p.sub_(log_total).exp_()
        d = _logits(spaces[1], e, None, g).sub_(own).mul_(p)
        if not isinstance(slope, float) or slope != 1.0:
            d.mul_(slope)
        if de is not None:
            _product(de, p.to(x.dtype), g, add=more)
        if db is not None:
            _added(db, d.sum(1), more)
        d = d.to(x.dtype)
        if dw is not None:
            _product(dw, d, x, add=more)
        _product(dh, d.T, w.to(x.dtype), add=True)


@_mix.register_fake
def _mix_like(
    h: Tensor, weight: Tensor, bias: Any, table: Tensor, dtype: torch.dtype, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    del weight, bias, scale, cap
    wide = torch.promote_types(dtype, torch.float32)
    return h.new_empty(h.shape[0], table.shape[1], dtype=wide), h.new_empty(h.shape[0], dtype=wide)


@_unmix.register_fake
def _unmix_like(*args: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t, need in zip(args[1:5], args[-1], strict=True) if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dtype, ctx.scale, ctx.cap = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:4])
    grads = iter(_unmix(grad, *ctx.saved_tensors, ctx.dtype, ctx.scale, ctx.cap, needed))
    return *(next(grads) if need else None for need in needed), None, None, None


_mix.register_autograd(_backward, setup_context=_save)
