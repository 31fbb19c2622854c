"""`adapt`: a causal language model made adaptive; `load_gates`: the same with gates that were trained before."""

import copy
from os import PathLike
from typing import Any

from transformers import PreTrainedModel

from ..gates import Gate
from ..rules import Rule
from ..updates import Update
from .anatomy import anatomy_of
from .config import AdaptiveConfig
from .model import AdaptiveForCausalLM
from .pieces import KINDS
from .saving import read_config, read_gates


def adapt(
    base: PreTrainedModel,
    steps: int,
    gate: Gate | None = None,
    rule: Rule | None = None,
    update: Update | None = None,
    layers: slice | None = None,
) -> AdaptiveForCausalLM:
    """Make a causal language model's depth adaptive. The model is taken over: from now on it runs in the loop.

    Arguments:
        base: the model, as AutoModelForCausalLM gives it.
        steps: the most iterations.
        gate, rule: as in `RecurrentWrapper`; a gate's width is `base.config.hidden_size`.
        update: as there; None: one behind a learned scale of 0, so that the output is at first that of
            `base`: `ReZero(Ponder(embedding, head))`, or in a slice `ReZero(Interpolate())`.
        layers: which layers are looped, the final norm outside; None: the whole backbone, norm inside.

    Raises: `ValueError` for an architecture that is not known, or layers that it does not have.
    """
    anatomy_of(base)
    _own_config(base)
    config = AdaptiveConfig(text_config=base.config, steps=steps, span=_span(layers, base.config.num_hidden_layers))
    model = AdaptiveForCausalLM(config, base, {"gate": gate, "rule": rule, "update": update})
    if (placed := getattr(base, "hf_device_map", None)) is not None:
        model.hf_device_map = {f"base.{name}".rstrip("."): device for name, device in placed.items()}
    return model.train(base.training)


def load_gates(base: PreTrainedModel, path: str | PathLike[str], **pieces: Any) -> AdaptiveForCausalLM:
    """Adapt a model with gates that `save_gates` wrote; `gate=`, `rule=` and `update=` stand in place of those saved.

    Raises: `ValueError` if there are none at `path`, if they were saved from another architecture or do
    not fit, or for any other keyword.
    """
    if unknown := sorted(pieces.keys() - set(KINDS)):
        raise ValueError(f"load_gates expected {', '.join(KINDS)} beside base and path, got {', '.join(unknown)}.")
    anatomy_of(base)
    _own_config(base)
    model = AdaptiveForCausalLM(read_config(path, base), base, pieces)
    read_gates(model.loop, path, pieces)
    return model.train(base.training)


def _own_config(base: PreTrainedModel) -> None:
    """A copy of the configuration for this model alone: others may be made of the same, and go on as they were."""
    shared, own = base.config, copy.deepcopy(base.config)
    for module in base.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def _span(layers: slice | None, number: int) -> list[int] | None:
    if layers is None:
        return None
    if not isinstance(layers, slice):
        raise ValueError(f"adapt expected layers to be a slice, such as slice(8, 20), or None, got {layers!r}.")
    start = 0 if layers.start is None else layers.start
    stop = number if layers.stop is None else layers.stop
    if layers.step not in (None, 1) or not 0 <= start < stop <= number:
        raise ValueError(
            f"adapt expected layers to be a slice of one or more of the {number} layers, from 0 to {number}, got "
            f"{layers}. slice(None) loops all of them, with the final norm outside."
        )
    return [start, stop]
