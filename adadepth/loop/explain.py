"""Explains errors that PyTorch raises in a block, a gate or an update, if the cause can be told."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.apart import RowPerToken
from ..attention.catch import COMPILED, takes_view
from ..attention.context import Here, Together
from ..attention.tokens import Packed
from ..gates import Gate
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
        return None if isinstance(piece, Gate | Update) else _arguments(piece, given)
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


def per_row(block: nn.Module, given: Mapping[str, Any], error: Exception) -> str:
    """What to try if a raw `error` may come from an argument that the block expects once for each row; else empty."""
    names = [name for name, value in given.items() if isinstance(value, Tensor) and value.dim() > 2]
    if not names or isinstance(error, TypeError) or any(isinstance(part, RowPerToken) for part in block.modules()):
        return ""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is not None and frame.tb_frame.f_globals.get("__name__", "").startswith("adadepth."):
        return ""  # our own errors say what to do
    return (
        f"{type(block).__name__} got {' and '.join(names)} as (rows, length, ...). If it expects (batch, ...), wrap "
        "it: adadepth.RowPerToken(block)."
    )


def missing(block: nn.Module, given: Mapping[str, Any]) -> list[str]:
    """The arguments without a default that a block's forward takes beside `x` and the view, and that are not given."""
    try:
        takes = list(inspect.signature(block.forward).parameters.values())
    except (TypeError, ValueError):
        return []
    named = [p for p in takes[1 + takes_view(block) :] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in named if p.default is p.empty and p.name not in given]


def _arguments(block: nn.Module, given: Mapping[str, Any]) -> str | None:
    """The explanation of missing or unknown arguments of a block's forward."""
    if not isinstance(block, nn.Module):
        return None
    if isinstance(block, RowPerToken):
        block = block.block
    try:
        takes = inspect.signature(block.forward)
    except (TypeError, ValueError):
        return None
    if takes_view(block) and not _fits(takes, "x", "view"):
        return (
            f"{type(block).__name__} has takes_view = True, so it is called as block(x, view, **block_kwargs), but it "
            f"takes ({', '.join(takes.parameters)}). Write forward(self, x, view), and call view.attend(q, k, v) in it."
        )
    if twice := [name for name in [*takes.parameters][: 1 + takes_view(block)] if name in given]:
        return f"{type(block).__name__} gets {twice[0]} from the loop, but block_kwargs has it too. Leave it out there."
    unknown = [name for name in given if name not in takes.parameters]
    if any(p.kind is p.VAR_KEYWORD for p in takes.parameters.values()):
        unknown = []
    called = f"A block is called as block(x{', view' * takes_view(block)}, **block_kwargs), but {type(block).__name__}"
    if lacks := missing(block, given):
        return (
            f"{called} also needs {', '.join(lacks)}. Pass it as looped(x, block_kwargs={{'{lacks[0]}': ...}}): a "
            "tensor (batch, seq, ...) with one entry per token, or (batch, 1, ...) with one per row, is packed as x is."
        )
    if unknown:
        return f"{called} does not take {', '.join(unknown)}. It takes {', '.join(takes.parameters)}."
    return None


def _fits(takes: inspect.Signature, *args: str) -> bool:
    """Whether a function takes these arguments by position, and perhaps others."""
    try:
        takes.bind_partial(*args)
    except TypeError:
        return False
    return True


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
