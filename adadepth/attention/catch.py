"""How the attention calls of an unmodified block are caught.

Such a block calls `F.scaled_dot_product_attention`, and what catches that call must see nothing else,
must not care how the block got hold of the function, and must be safe under threads, nesting and
compilation. In eager this is a kernel on a dispatch key that no tensor has and that is included, for
this thread only, while the block runs: all other operators fall through it at no cost. Dynamo does
not trace dispatch keys; there a `TorchFunctionMode` sees every call, at trace time only.
"""

import threading
from contextlib import AbstractContextManager
from typing import Any, final

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .view import TokenView


class Active(threading.local):
    """The view under which this thread runs a block, if it does."""

    view: TokenView | None = None


active = Active()


def current_view(caller: str) -> TokenView:
    """The view under which this thread runs a block; an error that names `caller` if it does not."""
    if active.view is None:
        raise RuntimeError(
            f"{caller}() was called outside a looped block: only a RecurrentWrapper that runs one knows it."
        )
    return active.view


def catching() -> AbstractContextManager[Any]:
    """A context in which this thread's attention calls go to the active view."""
    if torch.compiler.is_compiling():
        return _AttentionMode()
    return torch._C._IncludeDispatchKeyGuard(_KEY)


def prepare(block: nn.Module) -> None:
    """Check what can be checked before any data, and keep PyTorch's fused layers off their fast path."""
    for name, module in block.named_modules():
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            raise ValueError(
                f"{name or 'The block'} is compiled by itself, and a loop cannot reach the attention calls inside its "
                "graph. Compile the wrapper instead, with skip=False, or write the block to take the view."
            )
        if not isinstance(module, nn.MultiheadAttention):
            continue
        if not module.batch_first:
            raise ValueError(
                f"RecurrentWrapper gives its block (batch, seq, dim), but {name or 'the block'} is an "
                "nn.MultiheadAttention with batch_first=False, which would mix the rows. Build it with "
                "batch_first=True."
            )
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError(
                f"{name or 'the block'} is an nn.MultiheadAttention with add_bias_kv or add_zero_attn: keys that "
                "belong to no token cannot be looped. Build it without."
            )
        if _multihead_hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_multihead_hook, with_kwargs=True)


def _caught(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What an unmodified block's `F.scaled_dot_product_attention` does."""
    view = current_view("attend")
    _check_mask(view, attn_mask, is_causal)
    return view.attend(q, k, v, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa)


def _check_mask(view: TokenView, attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None and not is_causal:
        raise ValueError(
            f"The block passes an attention mask of its own, of shape {tuple(attn_mask.shape)}. In a loop only the "
            "wrapper knows which tokens run and which are padding: pass is_causal=True instead of a causal mask, and "
            "padding as looped(x, mask=...). Other masks (windows, ALiBi, prefixes) cannot be looped."
        )
    if is_causal != view.causal:
        said = "causal" if view.causal else "not causal"
        raise ValueError(
            f"RecurrentWrapper(causal={view.causal}) expected {said} attention, but the block calls it with "
            f"is_causal={is_causal}. Pass causal={is_causal} to the wrapper, or is_causal={view.causal} in the block"
            + (" (adadepth.CausalEncoder does it for nn.TransformerEncoderLayer)." if view.causal else ".")
        )


_KEY_NAME = "TESTING_ONLY_GenericMode"  # no tensor and no mode of torch's own has it
_KEY: Any = torch._C._parse_dispatch_key(_KEY_NAME)
_KEYS = torch._C.DispatchKeySet(_KEY)


def _caught_kernel(*args: Any, **kwargs: Any) -> Tensor:
    with torch._C._ExcludeDispatchKeyGuard(_KEYS):
        return _caught(*args, **kwargs)


def _register() -> list[torch.library.Library]:
    """The registrations, which hold as long as the returned libraries live."""
    every = torch.library.Library("_", "IMPL", _KEY_NAME)
    every.fallback(torch.library.fallthrough_kernel)
    aten = torch.library.Library("aten", "IMPL", _KEY_NAME)
    aten.impl("scaled_dot_product_attention", _caught_kernel)
    return [every, aten]


_libraries = _register()


@final
class _AttentionMode(TorchFunctionMode):
    """The catch for Dynamo, which traces function modes and so leaves nothing of it in the graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
    **checked: Any,
) -> Tensor:
    """`F.multi_head_attention_forward`, whose inner attention call a function mode does not see."""
    del embed_dim, bias_k, bias_v, add_zero_attn, checked
    view = current_view("attend")
    _check_mask(view, attn_mask, is_causal)
    weights = [q_proj_weight, k_proj_weight, v_proj_weight] if weight is None else list(weight.chunk(3))
    biases = [None] * 3 if bias is None else list(bias.chunk(3))
    q, k, v = (
        rearrange(F.linear(x, w, b), "length rows (heads dim) -> rows heads length dim", heads=heads)  # type: ignore[arg-type]
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    out = view.attend(q, k, v, dropout_p=dropout_p if training else 0.0)
    return F.linear(rearrange(out, "rows heads length dim -> length rows (heads dim)"), out_weight, out_bias)


def _multihead_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before an `nn.MultiheadAttention` runs: refuse what cannot be looped, and avoid its fast path."""
    if active.view is None:
        return None
    names = (
        "query",
        "key",
        "value",
        "key_padding_mask",
        "need_weights",
        "attn_mask",
        "average_attn_weights",
        "is_causal",
    )
    given = {"need_weights": True, "key_padding_mask": None, **dict(zip(names, args, strict=False)), **kwargs}
    if given["need_weights"]:
        raise ValueError(
            "nn.MultiheadAttention was called with need_weights=True (its default), which computes attention over the "
            "packed tokens of all rows. Pass need_weights=False."
        )
    if given["key_padding_mask"] is not None:
        raise ValueError(
            "nn.MultiheadAttention was called with a key_padding_mask. In a loop only the wrapper knows which tokens "
            "run: pass padding as looped(x, mask=...)."
        )
    if not module.training and given["key"] is given["query"]:
        # The fast path is for self-attention, which it tells by identity.
        given["key"] = given["value"] = given["query"].view_as(given["query"])
    return (), given
