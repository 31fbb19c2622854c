"""`adapt` makes a causal language model adaptive; `load_gates` does so with gates that were trained before."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
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
    *,
    check: bool = True,
) -> AdaptiveForCausalLM:
    """Make a causal language model's depth adaptive. It changes `base` in place: use only the result from then on.

    If `adapt` raises an error, `base` runs as before.

    Arguments:
        base: the model, as from `AutoModelForCausalLM`.
        steps: the most iterations.
        gate, rule: as in `RecurrentWrapper`; a gate's width is `base.config.hidden_size`.
        update: as in `RecurrentWrapper`. None: `ReZero(Ponder(embedding, head))`, which scales both as the model does,
            or in a slice `ReZero(Interpolate())`. Their learned scale starts at 0, so that outputs are at first those
            of `base`.
        layers: the slice of layers to loop, without the final norm. None: the whole backbone, with its final norm.
        check: whether to compare outputs on a few tokens with those that are expected (`model.check()`). Pass False if
            weights are on the meta device or on other ranks, and call `model.check()` later.

    Raises: `ValueError` for a model that cannot be looped, for one whose check fails, and for layers that it does not
        have.
    """
    anatomy = anatomy_of(base)
    with _own_config(base):
        config = AdaptiveConfig(text_config=base.config, steps=steps, span=_span(layers, anatomy.number))
        return _as_base(AdaptiveForCausalLM(config, base, {"gate": gate, "rule": rule, "update": update}), check)


def load_gates(
    base: PreTrainedModel, path: str | PathLike[str], *, check: bool = True, **pieces: Any
) -> AdaptiveForCausalLM:
    """Adapt a model with gates that `save_gates` wrote; `gate=`, `rule=` and `update=` replace the saved ones.

    With `check` the model is checked as in `adapt`, because the base's configuration or the installed transformers may
    have changed since the gates were saved.

    Raises: `ValueError` if there are no gates at `path`, if they were saved from another architecture or do not fit, if
    the check fails, or for any other keyword.
    """
    if unknown := sorted(pieces.keys() - set(KINDS)):
        raise ValueError(f"load_gates expected {', '.join(KINDS)} beside base and path, got {', '.join(unknown)}.")
    anatomy_of(base)
    with _own_config(base):
        model = AdaptiveForCausalLM(read_config(path, base), base, pieces)
        read_gates(model.loop, path, pieces)
        return _as_base(model, check)


def _as_base(model: AdaptiveForCausalLM, check: bool) -> AdaptiveForCausalLM:
    """In the mode of its base, placed and quantised like it, and checked if that is asked for."""
    _note_loading(model)
    model.train(model.base.training)
    if check:
        model.check()
    return model


def _note_loading(model: AdaptiveForCausalLM) -> None:
    """Note at the model how its base was placed and quantised: trainers, peft and saving ask it.

    `is_quantized` is left out: with it Trainer refuses to train without adapters, and gates may be what learns.
    """
    if (placed := getattr(model.base, "hf_device_map", None)) is not None:
        model.hf_device_map = {f"base.{name}".rstrip("."): device for name, device in placed.items()}
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if (value := getattr(model.base, name, None)) is not None:
            setattr(model, name, value)


@contextmanager
def _own_config(base: PreTrainedModel) -> Iterator[None]:
    """Give this model alone a copy of its configuration; if an error is raised, it gets its configuration back.

    Others may be made of the same configuration, and go on as they were. How layers attend is written in it, so a
    model that was refused runs as before.
    """
    copies: dict[int, Any] = {}
    copy.deepcopy(base.config, copies)  # of the parts that it is made of too
    known = {module: getattr(module, "config", None) for module in base.modules()}
    shared: dict[Any, Any] = {module: config for module, config in known.items() if id(config) in copies}
    for module, config in shared.items():
        module.config = copies[id(config)]
        module.config._attn_implementation = config._attn_implementation  # which is not copied
    try:
        yield
    except BaseException:
        for module, config in shared.items():
            module.config = config
        raise


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
