"""Relative FLOPs: the cost of a mean depth, in passes of the model before it was looped.

A token's FLOPs in a layer are taken as the layer's parameters. The embedding, the head and attention's products with
keys do not count. This is the "3.6x" of papers on looped models.
"""

from typing import Any

from ..loop.wrapper import RecurrentWrapper
from .model import AdaptiveForCausalLM


def relative(model: AdaptiveForCausalLM | RecurrentWrapper, depth: float) -> float:
    """(F0 + depth · F) / (F0 + F), with F the parameters of the looped layers and F0 those of the layers that run once.

    If the whole backbone is looped, this is the depth itself.

    Arguments: `model`, an adapted language model or a `RecurrentWrapper`; `depth`, the mean over tokens.
    Source: the relative FLOPs of AdaPonderLM, arXiv 2603.01914.
    """
    once = _share_run_once(model)
    return once + depth * (1 - once)


def depth(model: AdaptiveForCausalLM | RecurrentWrapper, relative_flops: float) -> float:
    """The mean depth that costs `relative_flops`: the inverse of `relative`."""
    once = _share_run_once(model)
    return (relative_flops - once) / (1 - once)


def _share_run_once(model: AdaptiveForCausalLM | RecurrentWrapper) -> float:
    """F0 / (F0 + F)."""
    if isinstance(model, RecurrentWrapper):
        return 0.0
    once, looped = _size(model.prelude) + _size(model.coda), _size(model.loop)
    return once / (once + looped)


def _size(part: RecurrentWrapper | None) -> int:
    """The parameters of a part's layers, which it does not hold itself."""
    layers: Any = () if part is None else part.block.layers
    return sum(p.numel() for layer in layers for p in layer.parameters())
