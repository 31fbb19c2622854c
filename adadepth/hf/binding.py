"""The modules of the base that pieces refer to, such as embedding and head, found again before each pass.

Modules of the base are replaced and wrapped: embeddings are resized, peft wraps what it trains. peft also copies the
pieces that it trains, together with what they refer to. So each module that a piece refers to has a mark that says
where in the base it belongs. Copies have the mark too.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..updates import Ponder
from .ends import Head

_MARK = "_adadepth_path"


def mark(piece: Any, base: nn.Module) -> None:
    """Mark the modules of the base that a piece refers to."""
    paths: dict[nn.Module, str] = {}
    for path, module in base.named_modules():
        for part in module.modules() if _of_peft(module) else (module,):
            paths.setdefault(part, path)

    def marked(module: nn.Module) -> nn.Module:
        if module in paths:
            module.__dict__[_MARK] = paths[module]
        return module

    _map_references(piece, marked)


def bind(piece: Any, base: nn.Module) -> None:
    """Make a piece refer to the modules that are now at the marked places of the base.

    Raises: `ValueError` if a piece reads weights that are not in memory, or only a part of those that are in use.
    """

    def own(module: nn.Module) -> nn.Module:
        if isinstance(module, Head):
            return module if module.base is base else Head(base)
        if (path := module.__dict__.get(_MARK)) is None:
            return module
        placed: Any = base.get_submodule(path)
        if _of_peft(placed):
            placed = _called(placed)
        elif module in placed.modules():  # as ever, or in a wrapper that changes nothing, such as torch.compile's
            return module
        placed.__dict__[_MARK] = path
        return placed

    _map_references(piece, own)
    for holder in piece.modules() if isinstance(piece, nn.Module) else ():
        if isinstance(holder, Ponder):
            for table in (holder.embedding, holder.head):
                _check_weights(table)


def _check_weights(table: Any) -> None:
    """Check that all weights of an embedding or a head can be read."""
    if _of_peft(table):
        name = table.__dict__[_MARK].rpartition(".")[2]
        raise ValueError(
            f"Ponder reads the weights of embedding and head, but peft has put an adapter on {name}, which they do not "
            f"include. Take {name} out of target_modules and trainable_token_indices. To train it, name it in "
            "modules_to_save."
        )
    if hasattr(table, "_hf_hook") and table.weight.is_meta:
        raise ValueError(
            "Ponder reads the weights of embedding and head, but accelerate has moved them out of memory. Keep "
            "both on a device in device_map, or give adapt another update."
        )


def _of_peft(module: nn.Module) -> bool:
    """Whether a module wraps another one for peft. peft need not be installed."""
    return type(module).__module__.startswith("peft.")


def _called(wrapper: Any) -> Any:
    """What peft calls in place of a module that it wraps: an adapter's copy of it, or the module itself.

    It is the wrapper if neither alone gives the result, as with LoRA.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(wrapper, ModulesToSaveWrapper):
        active = [] if wrapper.disable_adapters else wrapper.active_adapters
        return wrapper.modules_to_save[active[0]] if active else wrapper.original_module
    # A layer that is merged and disabled is unmerged when it is called.
    if isinstance(wrapper, BaseTunerLayer) and wrapper.merged != wrapper.disable_adapters:
        return wrapper.get_base_layer()
    return wrapper


def _map_references(piece: Any, to: Callable[[nn.Module], nn.Module]) -> None:
    """Replace each module that a piece refers to, alone or in a sequence, by `to` of it."""
    for holder in piece.modules() if isinstance(piece, nn.Module) else ():
        for name, value in list(vars(holder).items()):
            if isinstance(value, nn.Sequential):
                for i, part in enumerate(value):
                    if (new := to(part)) is not part:
                        value[i] = new
            elif isinstance(value, nn.Module) and (new := to(value)) is not value:
                setattr(holder, name, new)
