"""Checks of a block before it gets data, and hooks that keep PyTorch's fused layers off their fast path."""

from typing import Any

from torch import nn

from .catch import COMPILED, check_caller, takes_view
from .context import active
from .linked import is_compiled


def prepare(block: nn.Module) -> None:
    """Check what can be checked without data, and keep PyTorch's fused layers off their fast path."""
    if not takes_view(block):
        refuse_compiled(block)
    for name, module in block.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        if _multihead_hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_multihead_hook, with_kwargs=True)
        if takes_view(block):
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


def refuse_compiled(block: nn.Module) -> None:
    """Refuse a block that is compiled as a whole; the caller has checked that it does not take the view."""
    if is_compiled(block):
        raise ValueError(f"The block {COMPILED}")


def _multihead_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before an `nn.MultiheadAttention` runs: refuse what cannot be looped, and avoid its fast path."""
    if active.view is None:
        return None
    check_caller(active.view, args[0] if args else kwargs["query"])
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
    of_memory = active.apart and given["key"] is not given["query"]
    if given["key_padding_mask"] is not None and not of_memory:
        raise ValueError(
            "nn.MultiheadAttention was called with a key_padding_mask. In a loop the wrapper makes the mask: pass "
            "padding as looped(x, mask=...)."
        )
    if not module.training and given["key"] is given["query"]:
        # The fast path is for self-attention only, which PyTorch tells by `key is query`.
        given["key"] = given["value"] = given["query"].view_as(given["query"])
    return (), given
