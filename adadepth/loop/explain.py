"""Explains errors that PyTorch raises in a block, a gate or an update, if the cause can be told."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.catch import COMPILED, takes_view
from ..attention.context import Here, Together
from ..attention.tokens import Packed
from ..updates import Update

FLEX = (
    "calls flex_attention, which a loop cannot reach: only F.scaled_dot_product_attention is caught in a block as it "
    "is. Call that instead, or write the block to take the view (takes_view = True) and call view.attend(q, k, v, "
    "window=...)."
)
PACKED = (
    "A tensor of the batch's shape that the block reads must be packed as x is: pass it as looped(x, "
    "block_kwargs={...}), or read adadepth.take(tensor), or tensor[adadepth.rows()] where it holds one entry per row. "
    "Positions come from adadepth.positions(), not from the length of the input."
)


def explain(
    piece: nn.Module, h: Tensor, here: Here | Together, given: Mapping[str, Any], error: Exception
) -> str | None:
    """The explanation of an `error` that a piece raised for the tokens `h`; None if there is none to add."""
    name, text = type(piece).__name__, str(error)
    if isinstance(error, NotImplementedError) or type(error).__module__.startswith("torch._dynamo"):
        return _in_graph(name, text)
    if isinstance(error, TypeError):
        return _arguments(piece, given)
    if isinstance(error, RuntimeError):
        if said := _mismatch(piece, h):
            return said
        if isinstance(piece, Update) and _on_shapes(text):
            return (
                f"{name} failed on x and h of shape {tuple(h.shape)}: {text}. To scale by a score, keep its axis: "
                "write scores[..., -1:], not scores[..., -1]."
            )
        return _packed(name, here, text) if _on_shapes(text) else None
    return None


def _in_graph(name: str, text: str) -> str | None:
    """The explanation of an error of Dynamo about attention inside a compiled graph."""
    if "flex_attention" in text:
        return f"{name} {FLEX}"
    return f"A submodule of {name} {COMPILED}" if COMPILED in text else None


def _arguments(block: nn.Module, given: Mapping[str, Any]) -> str | None:
    """The explanation of missing or unknown arguments of a block's forward."""
    if not isinstance(block, nn.Module):
        return None
    try:
        takes = inspect.signature(block.forward)
        beside = [p for p in list(takes.parameters.values())[1 + takes_view(block) :] if p.default is p.empty]
    except (TypeError, ValueError):
        return None
    missing = [p.name for p in beside if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given]
    unknown = [name for name in given if name not in takes.parameters]
    if any(p.kind is p.VAR_KEYWORD for p in takes.parameters.values()):
        unknown = []
    called = f"A block is called as block(x{', view' * takes_view(block)}, **block_kwargs), but {type(block).__name__}"
    if missing:
        return (
            f"{called} also needs {', '.join(missing)}. Pass it as looped(x, block_kwargs={{'{missing[0]}': ...}}): a "
            "tensor (batch, seq, ...) with one entry per token, or (batch, 1, ...) with one per row, is packed as x is."
        )
    if unknown:
        return f"{called} does not take {', '.join(unknown)}. It takes {', '.join(takes.parameters)}."
    return None


def _mismatch(piece: nn.Module, h: Tensor) -> str | None:
    """The explanation if parameters have another dtype or device than the state."""
    kind = h.device.type
    mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    for parameter in piece.parameters() if isinstance(piece, nn.Module) else ():
        other = parameter.device != h.device or (parameter.dtype != h.dtype and not mixed)
        if other and parameter.is_floating_point():
            return (
                f"{type(piece).__name__} expected a state of its parameters' dtype and device, {parameter.dtype} on "
                f"{parameter.device}, but the loop runs in {h.dtype} on {h.device}. Move it with the loop: "
                f"looped.to(device, dtype)."
            )
    return None


def _on_shapes(text: str) -> bool:
    return any(word in text for word in ("size", "shape", "dimension", "broadcast"))


def _packed(name: str, here: Here | Together, text: str) -> str | None:
    if not isinstance(here.tokens, Packed):
        return None
    rows, length = here.tokens.shape
    return (
        f"{name} failed on packed tokens: it was given the tokens of all rows as one sequence, ({rows}, {length}, "
        f"dim), and raised: {text.splitlines()[0] if text else ''} {PACKED}"
    )
