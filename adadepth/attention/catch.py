"""How the attention calls of an unmodified block are caught.

Such a block calls `F.scaled_dot_product_attention`, and what catches that call must see nothing else,
must not care how the block got hold of the function, and must be safe under threads, nesting and
compilation. In eager this is a kernel on a dispatch key that no tensor has and that is included, for
this thread only, while the block runs: all other operators fall through it at no cost. Dynamo does
not trace dispatch keys; there a `TorchFunctionMode` sees every call, at trace time only.
"""

import math
import sys
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, NoReturn, final

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .context import active
from .dispatch import NAME, caught, uncaught
from .how import How
from .view import TokenView

COMPILED = (
    "is compiled by itself and calls attention, and a loop cannot reach the attention calls inside its graph. Compile "
    "only submodules without attention, or the wrapper with skip=False, or write the block to take the view."
)


def current_view(caller: str) -> TokenView:
    """The view under which this thread runs a block; an error that names `caller` if it does not."""
    if active.view is None:
        raise RuntimeError(
            f"{caller}() was called outside a looped block: only a RecurrentWrapper that runs one knows it."
        )
    view: TokenView = active.view
    return view


def catching() -> AbstractContextManager[Any]:
    """A context in which this thread's attention calls go to the active view."""
    return _AttentionMode() if torch.compiler.is_compiling() else caught()


def takes_view(block: nn.Module | None) -> bool:
    """Whether a block is written for adadepth."""
    return getattr(block, "takes_view", False)


def _caught(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What an unmodified block's `F.scaled_dot_product_attention` does; the names are those of its arguments."""
    view, (q, k, v) = current_view("attend"), (query, key, value)
    check_caller(view, q)
    if (active.apart and _own_keys(k, view)) or active.takes_view:
        view.elsewhere = True
        more: Any = {"scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **more)
    if active.apart:
        q, k, v = (_together(t, view) for t in (q, k, v))
    view.check_shapes(q, k, v)
    _check_mask(view, attn_mask, is_causal, queries=1 if active.apart else q.shape[2])
    out = view.answer(q, k, v, How(dropout_p, scale, enable_gqa, None, None, None))
    return out.transpose(1, 2).flatten(0, 1).unsqueeze(2) if active.apart else out


def _own_keys(k: Tensor, view: TokenView) -> bool:
    """Whether tokens that are rows of their own have keys of their own, so that no two of them mix."""
    return k.dim() == 4 and k.shape[0] == math.prod(view.tokens.shape) and k.shape[2] != 1


def _together(t: Tensor, view: TokenView) -> Tensor:
    """Queries, keys or values of tokens that are rows of their own, `(tokens, heads, 1, dim)`, in the view's rows."""
    rows, length = view.tokens.shape
    if t.dim() != 4 or t.shape[0] != rows * length or t.shape[2] != 1:
        raise ValueError(
            f"RowPerToken expected attention over the block's own input, ({rows * length}, heads, 1, head_dim), got "
            f"{tuple(t.shape)}. A block that changes its rows or their length cannot be looped."
        )
    return t.reshape(rows, length, *t.shape[1::2]).transpose(1, 2)


def check_caller(view: TokenView, q: Tensor) -> None:
    """A block that takes the view attends by it, maybe in a graph of its own; no other attends in a graph."""
    if not active.takes_view:
        if _is_fake(q) and not _is_fake(view.tokens.live):
            raise ValueError(f"A submodule of the block {COMPILED}")
    elif type(q) in (Tensor, nn.Parameter) and not _in_graph():
        refuse_beside_view()


def refuse_beside_view() -> NoReturn:
    """The running block takes the view, and attends without it.

    Raises: `ValueError`.
    """
    name = type(active.block).__name__
    raise ValueError(
        f"{name} has takes_view = True, but calls F.scaled_dot_product_attention (or nn.MultiheadAttention): that "
        "attention would mix the packed tokens of all rows. "
        + (
            "Pointwise is for blocks that mix no tokens: give RecurrentWrapper the block itself."
            if name == "Pointwise"
            else "Call view.attend(q, k, v) in its place."
        )
    )


def _in_graph() -> bool:
    """Whether a graph makes this call, as it does for a compiled `view.attend`: by itself or through an operator."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in (__name__, "torch._ops"):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith("<eval_with_key>")


def _is_fake(tensor: Tensor) -> bool:
    """Whether a compiler traces with it; by name, for the import brings all of Dynamo."""
    return type(tensor) is not Tensor and type(tensor).__name__ == "FakeTensor"


def _check_mask(view: TokenView, attn_mask: Tensor | None, is_causal: bool, queries: int) -> None:
    if attn_mask is not None and not is_causal:
        raise ValueError(
            f"The block passes an attention mask of its own, of shape {tuple(attn_mask.shape)}. In a loop only the "
            "wrapper knows which tokens run and which are padding: pass is_causal=True instead of a causal mask, and "
            "padding as looped(x, mask=...). Other masks (windows, ALiBi, prefixes) cannot be looped."
        )
    if is_causal == view.causal or (view.causal and queries == 1):
        return  # one query sees all that stands before it: blocks leave the flag out there
    said = "causal" if view.causal else "not causal"
    raise ValueError(
        f"RecurrentWrapper(causal={view.causal}) expected {said} attention, but the block calls it with "
        f"is_causal={is_causal}. Pass causal={is_causal} to the wrapper, or is_causal={view.causal} in the block"
        + (" (adadepth.CausalEncoder does it for nn.TransformerEncoderLayer)." if view.causal else ".")
    )


def _caught_kernel(*args: Any, **kwargs: Any) -> Tensor:
    with uncaught():
        return _caught(*args, **kwargs)


def _register() -> list[torch.library.Library]:
    """The registrations, which hold as long as the returned libraries live."""
    every = torch.library.Library("_", "IMPL", NAME)
    every.fallback(torch.library.fallthrough_kernel)
    aten = torch.library.Library("aten", "IMPL", NAME)
    aten.impl("scaled_dot_product_attention", _caught_kernel)
    return [every, aten]


_libraries = _register()


@final
class _AttentionMode(TorchFunctionMode):
    """The catch for Dynamo, which traces function modes and so leaves nothing of it in the graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if active.takes_view and func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
            refuse_beside_view()
        if func is F.scaled_dot_product_attention:
            return _caught(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            return _multihead(*args, **(kwargs or {})), None
        if func is Tensor.unflatten:  # its super() call is beyond Dynamo
            return torch.unflatten(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _multihead(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    training: bool,
    attn_mask: Tensor | None,
    is_causal: bool,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    **checked: Any,
) -> Tensor:
    """`F.multi_head_attention_forward`, whose inner attention call a function mode does not see."""
    del embed_dim, bias_k, bias_v, add_zero_attn, checked
    weights = [q_proj_weight, k_proj_weight, v_proj_weight] if weight is None else list(weight.chunk(3))
    biases = [None] * 3 if bias is None else list(bias.chunk(3))
    q, k, v = (
        rearrange(F.linear(x, w, b), "length rows (heads dim) -> rows heads length dim", heads=heads)  # type: ignore[arg-type]
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    if key_padding_mask is not None:  # of a memory, by now something added to the scores
        attn_mask = key_padding_mask[:, None, None]
    out = _caught(q, k, v, attn_mask, dropout_p if training else 0.0, is_causal)
    return F.linear(rearrange(out, "rows heads length dim -> length rows (heads dim)"), out_weight, out_bias)
