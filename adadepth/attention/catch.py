"""How the attention calls of an unmodified block are caught.

Such a block calls `F.scaled_dot_product_attention`. The catch must intercept this call and no other, must work
however the block imported the function, and must be safe with threads, nesting and compilation. In eager mode it is
a kernel on a dispatch key that no tensor has. The key is included while the block runs, for this thread only; all
other operators fall through it at no cost. Dynamo does not trace dispatch keys. When it traces, a `TorchFunctionMode`
intercepts every call, at trace time only.
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
    """The view of the block that this thread runs; outside a block, an error that names `caller`."""
    if active.view is None:
        raise RuntimeError(
            f"{caller}() was called outside a looped block: it works only in a block that a RecurrentWrapper runs."
        )
    view: TokenView = active.view
    return view


def catching() -> AbstractContextManager[Any]:
    """A context in which the active view answers this thread's attention calls."""
    return _AttentionMode() if torch.compiler.is_compiling() else caught()


def takes_view(block: nn.Module | None) -> bool:
    """Whether a block is written for adadepth: it then takes the view as its second argument."""
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
    """Replaces `F.scaled_dot_product_attention` in an unmodified block, with the same argument names."""
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
    """Whether each token, as a row of its own, has several keys of its own: then no two tokens mix."""
    return k.dim() == 4 and k.shape[0] == math.prod(view.tokens.shape) and k.shape[2] != 1


def _together(t: Tensor, view: TokenView) -> Tensor:
    """Queries, keys or values of tokens as rows of their own, `(tokens, heads, 1, dim)`, back in the view's rows."""
    rows, length = view.tokens.shape
    if t.dim() != 4 or t.shape[0] != rows * length or t.shape[2] != 1:
        raise ValueError(
            f"RowPerToken expected attention over the block's own input, ({rows * length}, heads, 1, head_dim), got "
            f"{tuple(t.shape)}. A block that changes its rows or their length cannot be looped."
        )
    return t.reshape(rows, length, *t.shape[1::2]).transpose(1, 2)


def check_caller(view: TokenView, q: Tensor) -> None:
    """Refuse attention that a block may not call.

    A block that takes the view must attend through it, which may happen in a compiled graph of its own. Any other
    block must not attend inside a compiled graph.
    """
    if not active.takes_view:
        if _is_fake(q) and not _is_fake(view.tokens.live):
            raise ValueError(f"A submodule of the block {COMPILED}")
    elif type(q) in (Tensor, nn.Parameter) and not _in_graph():
        refuse_beside_view()


def refuse_beside_view() -> NoReturn:
    """Refuse a block that takes the view but attends without it.

    Raises: `ValueError`, always.
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
    """Whether this call comes from a graph, directly or through an operator, as with a compiled `view.attend`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in (__name__, "torch._ops"):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith("<eval_with_key>")


def _is_fake(tensor: Tensor) -> bool:
    """Whether a compiler traces with this tensor; told by the name, because the import would load all of Dynamo."""
    return type(tensor) is not Tensor and type(tensor).__name__ == "FakeTensor"


def _check_mask(view: TokenView, attn_mask: Tensor | None, is_causal: bool, queries: int) -> None:
    if attn_mask is not None:  # with is_causal too: PyTorch then applies both
        raise ValueError(
            f"The block passes an attention mask of its own, of shape {tuple(attn_mask.shape)}. In a loop the wrapper "
            "makes the mask, from the active tokens and the padding: pass is_causal=True instead of a causal mask, and "
            "padding as looped(x, mask=...). Other masks (windows, ALiBi, prefixes) cannot be looped."
        )
    if is_causal == view.causal or (view.causal and queries == 1):
        return  # one query attends to all earlier tokens: for it, blocks do not set the flag
    wanted = "causal attention" if view.causal else "attention that is not causal"
    raise ValueError(
        f"RecurrentWrapper(causal={view.causal}) expected {wanted}, but the block calls it with "
        f"is_causal={is_causal}. Pass causal={is_causal} to the wrapper, or is_causal={view.causal} in the block"
        + (" (adadepth.CausalEncoder does it for nn.TransformerEncoderLayer)." if view.causal else ".")
    )


def _caught_kernel(*args: Any, **kwargs: Any) -> Tensor:
    with uncaught():
        return _caught(*args, **kwargs)


def _refuse_fast_path(*_args: Any, **_kwargs: Any) -> NoReturn:
    """Refuse PyTorch's fused layers; `prepare` keeps those off them that the block has when the loop gets it."""
    raise ValueError(
        f"{type(active.block).__name__} runs a fused layer of PyTorch (nn.TransformerEncoderLayer or "
        "nn.MultiheadAttention in evaluation), which would attend to the packed tokens of all rows. If you changed a "
        "layer of the block, assign the block again: looped.block = block."
    )


def _register() -> list[torch.library.Library]:
    """The registrations; they last as long as the returned libraries exist."""
    every = torch.library.Library("_", "IMPL", NAME)
    every.fallback(torch.library.fallthrough_kernel)
    aten = torch.library.Library("aten", "IMPL", NAME)
    aten.impl("scaled_dot_product_attention", _caught_kernel)
    for fused in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        aten.impl(fused, _refuse_fast_path)
    return [every, aten]


_libraries = _register()


@final
class _AttentionMode(TorchFunctionMode):
    """The catch for Dynamo, which traces through function modes, so that the graph contains no trace of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if active.takes_view and func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
            refuse_beside_view()
        if func is F.scaled_dot_product_attention:
            return _caught(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            return _multihead(*args, **(kwargs or {})), None
        if func is Tensor.unflatten:  # Dynamo cannot trace its super() call
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
    """Replaces `F.multi_head_attention_forward`: a function mode cannot intercept its inner attention call."""
    del embed_dim, bias_k, bias_v, add_zero_attn, checked
    weights = [q_proj_weight, k_proj_weight, v_proj_weight] if weight is None else list(weight.chunk(3))
    biases = [None] * 3 if bias is None else list(bias.chunk(3))
    q, k, v = (
        rearrange(F.linear(x, w, b), "length rows (heads dim) -> rows heads length dim", heads=heads)  # type: ignore[arg-type]
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    if key_padding_mask is not None:  # of a memory; PyTorch has already made it a term that is added to the scores
        attn_mask = key_padding_mask[:, None, None]
    elif is_causal:  # says what the mask is, as in nn.MultiheadAttention
        attn_mask = None
    out = _caught(q, k, v, attn_mask, dropout_p if training else 0.0, is_causal)
    return F.linear(rearrange(out, "rows heads length dim -> length rows (heads dim)"), out_weight, out_bias)
