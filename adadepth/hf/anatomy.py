"""Where the layers of a Hugging Face causal language model are, and which models cannot be looped at all."""

import inspect
from typing import Any, NamedTuple, final

from torch import nn

# Their frequencies follow the longest sequence of the batch: a token would depend on the others.
_UNSTEADY = ("dynamic", "longrope")
# Kinds of layers in which a token sees what stands before it, or a window of that.
SLIDING = "sliding_attention"
_KNOWN = (SLIDING, "full_attention", "attention", "dense", "sparse", "moe")
_RECURRENT = (nn.RNNBase, nn.RNNCellBase, nn.Conv1d, nn.Conv2d)
# What layers are given to add to attention scores: slopes by distance (ALiBi), or a table of distances.
_BIASES = {"alibi", "position_bias"}
_INSTEAD = "Loop layers of attention by hand: adadepth.RecurrentWrapper(block, steps)."


@final
class Anatomy(NamedTuple):
    """The path of the backbone in the model, and the name of its list of layers; their number."""

    backbone: str
    layers: str
    number: int

    def of(self, base: nn.Module) -> Any:
        """The backbone, as it is now."""
        return base.get_submodule(self.backbone)


def anatomy_of(base: nn.Module) -> Anatomy:
    """Where the layers of a causal language model are.

    They are the list of `num_hidden_layers` modules in its decoder, and the module that holds the list is the
    backbone. Nothing else of the model is looked for: its own forward does the rest.

    Raises: `ValueError` for what is no causal language model, or one that cannot be looped.
    """
    config: Any = getattr(base, "config", None)
    kind, name = getattr(config, "model_type", None), type(base).__name__
    if config is None or not hasattr(base, "get_decoder") or base.get_output_embeddings() is None:  # type: ignore[operator]
        raise ValueError(
            f"adapt expected a causal language model with a head, got {name} of {kind!r}. Load it with "
            "AutoModelForCausalLM, and adapt it before peft wraps it."
        )
    if kind == "adadepth":
        raise ValueError(
            f"adapt expected a model that is not adapted yet, got {name}. Adapt its base: adapt(model.base, ...)."
        )
    text = text_config(config)
    _check_config(name, text)
    number: int = getattr(text, "num_hidden_layers", 0)
    lists = {
        path: part for path, part in base.named_modules() if isinstance(part, nn.ModuleList) and len(part) == number
    }
    if not lists:
        raise ValueError(f"adapt found no list of the {number} layers in {name}. {_INSTEAD}")
    decoder = set(base.get_decoder().modules())  # type: ignore[operator]
    of_text = [path for path, part in lists.items() if part in decoder]  # others may be of images
    backbone, _, layers = [*of_text, *lists][0].rpartition(".")
    anatomy = Anatomy(backbone, layers, number)
    if getattr(text, "alibi", True):  # Falcon's layers have a place for it either way
        _check_scores(name, getattr(anatomy.of(base), layers))
    _check_backbone(name, anatomy.of(base), layers)
    return anatomy


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text."""
    return config.get_text_config(decoder=True)


def kinds_of(config: Any) -> list[str]:
    """What `layer_types` says of each layer; nothing where the configuration does not say."""
    return list(getattr(text_config(config), "layer_types", None) or [])


def _check_config(name: str, config: Any) -> None:
    if unsteady := [kind for kind in _rotary_kinds(config) if kind in _UNSTEADY]:
        raise ValueError(
            f"adapt expected rotary positions that depend on the position alone, got rope_type={unsteady[0]!r}, which "
            "follows the longest sequence of the batch. Choose another, such as 'yarn' or 'linear', in "
            "config.rope_parameters."
        )
    for option, usual in (("add_cross_attention", False), ("is_causal", True)):
        if getattr(config, option, None) not in (usual, None):
            raise ValueError(
                "adapt expected a decoder in which a token attends only to itself and to earlier tokens, got "
                f"config.{option}={getattr(config, option)}. Set it to {usual}."
            )
    if strange := sorted(set(kinds_of(config)) - set(_KNOWN)):
        raise ValueError(
            f"adapt expected layers of full or sliding attention, which can read the keys and values of exited tokens, "
            f"got layers of {', '.join(strange)} in {name}. {_INSTEAD}"
        )


def _check_scores(name: str, layers: nn.ModuleList) -> None:
    kinds: set[type[nn.Module]] = {type(part) for part in layers.modules()}
    takes = {option for kind in kinds for option in inspect.signature(kind.forward).parameters}
    if biases := sorted(takes & _BIASES):
        raise ValueError(
            f"adapt expected attention that adds nothing to its scores, but the layers of {name} take "
            f"{', '.join(biases)}. A loop's attention takes no biases, so looping the layers by hand does not help. "
            "Choose a model with rotary or learned positions."
        )


def _check_backbone(name: str, backbone: Any, layers: str) -> None:
    recurrent = sorted({type(m).__name__ for m in getattr(backbone, layers).modules() if isinstance(m, _RECURRENT)})
    if recurrent or getattr(backbone, "_is_stateful", False):
        raise ValueError(
            f"adapt expected layers that mix tokens by attention alone; those of {name} have a recurrence or a "
            "convolution"
            + (f" ({', '.join(recurrent)})" if recurrent else "")
            + f": their state would lack the exited tokens. {_INSTEAD}"
        )
    known = inspect.signature(inspect.unwrap(type(backbone).forward)).parameters
    if missing := [option for option in ("inputs_embeds", "position_ids") if option not in known]:
        raise ValueError(
            f"adapt expected a backbone whose forward takes inputs_embeds and position_ids, but that of {name}, "
            f"{type(backbone).__name__}, does not take {' nor '.join(missing)}. {_INSTEAD}"
        )


def _rotary_kinds(config: Any) -> list[str]:
    """The kinds of rotary embedding that a configuration names, for all layers or each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return [kind for part in each if (kind := part.get("rope_type")) is not None]
