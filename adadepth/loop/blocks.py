"""Runs a block with a view: passes it to a block that takes one; otherwise catches the block's attention calls."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._nested import each
from ..attention.apart import RowPerToken
from ..attention.catch import catching, takes_view
from ..attention.context import Here, Together, Window, active, call_piece
from ..attention.dense import DenseView, WholeView
from ..attention.flex import FlexView
from ..attention.linked import enter, leave
from ..attention.packed import PackedView
from ..attention.prepare import refuse_compiled
from ..attention.tokens import DenseTokens, PackedTokens, TokenSet, WholeTokens, nothing
from ..attention.view import KV, TokenView
from ..cache.paged import PagedView
from ..cache.tokens import CachedTokens, JoinedTokens
from ..cache.view import CachedView
from .explain import explain, per_row
from .writes import check_unwritten, watched

# For each kind of tokens the default view, and the view for `one_call=True`.
_VIEWS: dict[type[TokenSet], tuple[type[TokenView], type[TokenView]]] = {
    WholeTokens: (WholeView, WholeView),
    DenseTokens: (DenseView, DenseView),
    PackedTokens: (PackedView, FlexView),
    CachedTokens: (CachedView, PagedView),
    JoinedTokens: (CachedView, PagedView),
}


def view_of(
    tokens: TokenSet, step: int, causal: bool, past: Sequence[KV] | None, keep: bool, one_call: bool
) -> TokenView:
    """The view of one iteration. Without active tokens, it is for one placeholder: not every block runs on no token."""
    if tokens.empty:
        tokens, past = WholeTokens(torch.ones(1, 1, dtype=torch.bool, device=tokens.live.device), skip=True), None
    return _VIEWS[type(tokens)][one_call](tokens, step, causal, past, keep)


def run(block: nn.Module, x: Tensor, view: TokenView, given: Mapping[str, Any], shape: torch.Size) -> Tensor:
    """`block` on the tokens `x` of a view, with its further arguments `given`.

    `given` broadcasts to the rows of the pass, `shape (batch, seq)`. If the view is for a placeholder, the block runs
    on zeros, and its output is dropped.
    """
    if x.shape[:2] != view.tokens.shape:
        with _stand_in((shape[0], shape[1])):
            zeros = F.pad(x, (0, 0, 0, 1 - x.shape[1], 0, 1 - x.shape[0]))
            out = run_block(block, zeros, view, each(given, _no_token))
        return out[: x.shape[0], : x.shape[1]].expand(x.shape)
    return run_block(block, x, view, each(given, view.tokens.spread) if given else given)


def run_block(block: nn.Module, x: Tensor, view: TokenView, given: Mapping[str, Any]) -> Tensor:
    """`block` on the tokens `x` of a view, with further arguments `given` in the order of these tokens."""
    if active.view is not None:
        raise ValueError(
            "A RecurrentWrapper runs inside the block of another: it would treat the packed tokens of all rows as one "
            "row. Put the whole stack into one loop, or run one loop after the other."
        )
    taken = takes_view(block)
    if not taken:
        refuse_compiled(block)
    copied, written = _guarded(x)
    arguments = watched(given)
    copied = enter(view, block, copied)
    before = active.here
    active.view, active.here, active.block, active.takes_view = view, view.here, block, taken
    try:
        with nullcontext() if view.bare else catching():
            out = block(copied, view, **given) if taken else block(copied, **given)
    except Exception as error:
        if torch.compiler.is_compiling():
            raise
        hint, said = per_row(block, given, error), explain(block, x, view.here, given, error)
        if said is not None:
            raise ValueError(f"{said} {hint}".rstrip()) from error
        if hint:
            error.add_note(hint)
        raise
    finally:
        active.view, active.here, active.block = None, before, None
    if written is not None and x._version != written:
        raise ValueError(
            f"{type(block).__name__} writes into its input, which the update reads later. Write x = x + ... instead of "
            "x += ..., or start with x = x.clone()."
        )
    check_unwritten(block, arguments)
    view.close()
    _check_output(block, x, out, view, taken)
    out = out if out.dtype == x.dtype else out.to(x.dtype)
    return out if view.ledger is None else leave(view, out)


def ask_piece(piece: Any, here: Here | Together, h: Tensor, *more: Any) -> Any:
    """The result of a gate or an update for the tokens `h` and its further arguments."""
    if torch.compiler.is_compiling():
        return call_piece(piece, here, h, *more)
    try:
        return call_piece(piece, here, h, *more)
    except (RuntimeError, TypeError) as error:
        if (said := explain(piece, h, here, {}, error)) is not None:
            raise ValueError(said) from error
        raise


def _no_token(given: Tensor) -> Tensor:
    """The argument of the placeholder, one token."""
    return given.new_full((1, 1, *given.shape[2:]), nothing(given))


@contextmanager
def _stand_in(shape: tuple[int, int]) -> Iterator[None]:
    """A context in which the pass runs on one placeholder token, so that `adadepth.take` gives zeros for it."""
    before = active.window
    active.window = Window(shape if before is None else before.shape, 0, 0, 0)
    try:
        yield
    finally:
        active.window = before


def _guarded(x: Tensor) -> tuple[Tensor, int | None]:
    """The block's input, and how often it was written to; if torch does not count that, a copy for the block."""
    if torch.compiler.is_compiling() or x.is_inference():
        return x.clone(), None
    return x, x._version


def _check_output(block: nn.Module, x: Tensor, out: object, view: TokenView, taken: bool) -> None:
    if not isinstance(out, Tensor) or out.shape != x.shape:
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"A looped block must map (rows, length, dim) to the same shape: expected a tensor of shape "
            f"{tuple(x.shape)}, got {got} from {type(block).__name__}. Wrap it in a module that returns the state "
            "alone."
        )
    if not (view.calls or view.elsewhere or view.bare or taken):
        raise _unseen(block)


def _unseen(block: nn.Module) -> ValueError:
    """The error for a block without an attention call."""
    last = "If it mixes no tokens, wrap it: adadepth.Pointwise(block)."
    if isinstance(block, RowPerToken):
        block = block.block
        last = "adadepth.Pointwise around attention is wrong: tokens would no longer attend to each other."
    return ValueError(
        f"No attention call was seen in {type(block).__name__}. If it computes softmax(q @ k.T) @ v itself, replace "
        "that by F.scaled_dot_product_attention(q, k, v). A compiled copy of this function is not seen, nor "
        "nn.MultiheadAttention with need_weights=True. A Hugging Face layer made by hand calls it if its config has "
        f"_attn_implementation = 'sdpa'. {last}"
    )
