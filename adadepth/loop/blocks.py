"""How a block is run under a view: as it is, if it takes one; else with its attention calls caught."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.catch import active, catching
from ..attention.dense import DenseView, WholeView
from ..attention.packed import PackedView
from ..attention.tokens import DenseTokens, PackedTokens, TokenSet, WholeTokens
from ..attention.view import KV, TokenView
from ..cache.tokens import CachedTokens
from ..cache.view import CachedView


def takes_view(block: nn.Module) -> bool:
    """Whether a block is written for adadepth."""
    return getattr(block, "takes_view", False)


_VIEWS: dict[type[TokenSet], type[TokenView]] = {
    WholeTokens: WholeView,
    DenseTokens: DenseView,
    PackedTokens: PackedView,
    CachedTokens: CachedView,
}


def view_of(tokens: TokenSet, step: int, causal: bool, past: Sequence[KV] | None, keep: bool) -> TokenView:
    """The view of one iteration; where no token runs, of one that stands in: not every block runs on none."""
    if tokens.empty:
        shape = [max(size, 1) for size in tokens.shape]
        tokens, past = WholeTokens(torch.ones(shape, dtype=torch.bool, device=tokens.live.device), skip=True), None
    return _VIEWS[type(tokens)](tokens, step, causal, past, keep)


def run(block: nn.Module, x: Tensor, view: TokenView) -> Tensor:
    """`block` on the tokens `x` of a view; on zeros where it has one that stands in, whose output is dropped."""
    rows, length = x.shape[:2]
    if (rows, length) != (shape := view.tokens.shape):
        return run(block, F.pad(x, (0, 0, 0, shape[1] - length, 0, shape[0] - rows)), view)[:rows, :length]
    if active.view is not None:
        raise ValueError(
            "A RecurrentWrapper runs inside the block of another: it would take the packed tokens of all rows for one "
            "row of its own. Let one loop hold the whole stack, or run one loop after the other."
        )
    given, written = _guarded(x)
    active.view = view
    try:
        if takes_view(block):
            out = block(given, view)
        elif view.bare:
            out = block(given)
        else:
            with catching():
                out = block(given)
    finally:
        active.view = None
    if written is not None and x._version != written:
        raise ValueError(
            f"{type(block).__name__} writes into its input, which the update reads after it. Write x = x + ... in "
            "place of x += ..., or start with x = x.clone()."
        )
    view.close()
    _check_output(block, x, out, view)
    return out if out.dtype == x.dtype else out.to(x.dtype)


def _guarded(x: Tensor) -> tuple[Tensor, int | None]:
    """The block's input, and how often it was written to; where that is not known, a copy of the block's own."""
    if torch.compiler.is_compiling() or x.is_inference():
        return x.clone(), None
    return x, x._version


def _check_output(block: nn.Module, x: Tensor, out: object, view: TokenView) -> None:
    if not isinstance(out, Tensor) or out.shape != x.shape:
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"A looped block must map (rows, length, dim) to the same shape: expected a tensor of shape "
            f"{tuple(x.shape)}, got {got} from {type(block).__name__}. Wrap it in a module that returns the state "
            "alone."
        )
    if not (view.calls or view.bare or takes_view(block)):
        raise ValueError(
            f"No attention call was seen in {type(block).__name__}, so its tokens would mix unseen or not at all. Its "
            "attention must call F.scaled_dot_product_attention (not a compiled copy of it, nor nn.MultiheadAttention "
            "with need_weights=True). If it mixes no tokens, say so: adadepth.Pointwise(block)."
        )
