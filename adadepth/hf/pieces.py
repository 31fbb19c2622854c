"""The pieces of an adapted model: completed by defaults, saved as JSON, and loaded.

In JSON, a piece (gate, rule or update) is `{"class": "module.Class", "arguments": {...}}`. Each argument of its
constructor is read from the attribute of the same name. A module of the base is `{"base": "path"}`, a sequence of
modules is `{"sequence": [...]}`, a `Head` is `{"head": "base"}`. Loading imports nothing: it makes only pieces, of
classes that the program has imported.
"""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..gates import Gate
from ..updates import Interpolate, Ponder, ReZero, Ungated, Update
from .anatomy import Anatomy
from .config import AdaptiveConfig
from .ends import Head, scale_of_embedding, shape_of_logits

KINDS = ("gate", "rule", "update")


def complete(given: Mapping[str, Any], config: AdaptiveConfig, base: Any, anatomy: Anatomy) -> dict[str, Any]:
    """All pieces, with the dtype and the device of the base; those given replace those of the configuration."""
    described = config.pieces or {}
    pieces = {kind: given[kind] if kind in given else make(kind, described.get(kind), base) for kind in KINDS}
    if pieces["update"] is None:
        pieces["update"] = _default_update(base, anatomy, pieces["gate"], whole=config.span is None)
    for piece in pieces.values():
        if isinstance(piece, nn.Module):
            # If the base is on meta, loading moves the weights.
            piece.to(base.dtype) if base.device.type == "meta" else piece.to(base.device, base.dtype)
    return pieces


def _default_update(base: Any, anatomy: Anatomy, gate: Any, whole: bool) -> Update:
    """The update if `adapt` is given none. Before training, the model then computes what its base does.

    A whole backbone ends in the final norm, so its state predicts tokens: if the embedding and the head have one
    vocabulary and only scale and bound what they return, the update is `Ponder`. A slice feeds its state back. With an
    exit criterion, the update does not multiply by the score.
    """
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    one_vocabulary = isinstance(head, nn.Linear) and head.weight.shape == embedding.weight.shape
    scale = scale_of_embedding(base) if whole and one_vocabulary else None
    shape = None if scale is None else shape_of_logits(base, anatomy)
    update = Interpolate() if scale is None or shape is None else Ponder(embedding, head, scale, *shape)
    return ReZero(Ungated(update) if getattr(gate, "measures", False) else update)


def reset(loop: Any, base: nn.Module) -> None:
    """Initialise the weights of the gate and the update anew."""
    for kind in ("gate", "update"):
        piece = getattr(loop, kind)
        if isinstance(piece, nn.Module) and piece.state_dict():
            piece.load_state_dict(make(kind, describe(piece, base), base).state_dict())


def describe(piece: Any, base: nn.Module) -> Any:
    """A piece, or an argument of one, as JSON.

    Raises: `ValueError` if loading would not give the same piece.
    """
    if piece is None or isinstance(piece, (bool, int, float, str)):
        return piece
    if isinstance(piece, (list, tuple)):
        return [describe(part, base) for part in piece]
    if isinstance(piece, nn.Module) and (path := _path(piece, base)) is not None:
        return {"base": path}
    if isinstance(piece, nn.Sequential):
        return {"sequence": [describe(part, base) for part in piece]}
    if isinstance(piece, Head):
        return {"head": "base"}
    kind = type(piece)
    if _kind_of(kind) is None:
        raise ValueError(
            f"Only gates, rules, updates, numbers, strings, lists of them and modules of the base can be saved in the "
            f"configuration, got {kind.__name__}. Write it as a class with the interface of a piece, or save without "
            "it: model.base.save_pretrained(path)."
        )
    _check_buffers(piece)
    # The constructor of nn.Module accepts anything and needs nothing.
    names = () if kind.__init__ is nn.Module.__init__ else inspect.signature(kind).parameters
    arguments = {name: describe(_argument(piece, name), base) for name in names}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "arguments": arguments}


def make(name: str, description: Any, base: nn.Module) -> Any:
    """The piece `name` that JSON describes.

    Raises: `ValueError` if its class is not imported, or is another kind of piece.
    """
    piece = _make(description, base)
    if piece is not None and _kind_of(type(piece)) != name:
        raise ValueError(f"The configuration gives a {type(piece).__name__} as {name}. Pass {name}= instead.")
    return piece


def _make(description: Any, base: nn.Module) -> Any:
    if isinstance(description, list):
        return [_make(part, base) for part in description]
    if not isinstance(description, dict):
        return description
    if "base" in description:
        return base.get_submodule(description["base"])
    if "head" in description:
        return Head(base)
    if "sequence" in description:
        return nn.Sequential(*(_make(part, base) for part in description["sequence"]))
    kind = _find(description["class"])
    return kind(**{name: _make(argument, base) for name, argument in description["arguments"].items()})


def _find(name: str) -> Any:
    """The imported class of a piece, by its name."""
    module, _, _ = name.rpartition(".")
    while module and module not in sys.modules:
        module, _, _ = module.rpartition(".")
    found: Any = sys.modules.get(module)
    for part in name[len(module) + 1 :].split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or _kind_of(found) is None:
        raise ValueError(
            f"The configuration names the piece {name}, which this program has not imported. Import it before loading, "
            "or pass gate=, rule= or update= to from_pretrained."
        )
    return found


def _kind_of(kind: type) -> str | None:
    """The kind of piece that a class is. Rules have no base class: they are called with three arguments."""
    if issubclass(kind, (Gate, Update)):
        return "gate" if issubclass(kind, Gate) else "update"
    call = kind.forward if issubclass(kind, nn.Module) else kind.__call__
    return "rule" if inspect.isfunction(call) and len(inspect.signature(call).parameters) == 4 else None


def _argument(piece: Any, name: str) -> Any:
    if not hasattr(piece, name):
        raise ValueError(
            f"{type(piece).__name__} takes {name}, but has no attribute of that name, so it cannot be saved. Write "
            f"self.{name} = {name} in its constructor."
        )
    value = getattr(piece, name)
    if isinstance(value, torch.Tensor):
        if value.numel() == 1:
            return value.item()
        raise ValueError(
            f"{type(piece).__name__} holds a tensor of shape {tuple(value.shape)} as {name}, which belongs to a call "
            "rather than to a model. Pass the piece to the call, rule=, and give the model one with a number."
        )
    return value


def _check_buffers(piece: Any) -> None:
    if not isinstance(piece, nn.Module):
        return
    if lost := {name for name, _ in piece.named_buffers()} - set(piece.state_dict()):
        raise ValueError(
            f"{type(piece).__name__} has buffers that would not be saved: {', '.join(sorted(lost))}. Register them "
            "with persistent=True."
        )


def _path(module: nn.Module, base: nn.Module) -> str | None:
    """The path of a module in the base."""
    return next((name for name, known in base.named_modules() if known is module), None)
