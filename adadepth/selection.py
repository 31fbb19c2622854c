"""Selects the smallest or the largest values among those that are valid."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def bottom_k(
    values: Float[Tensor, "*shape"], k: float, valid: Bool[Tensor, "*shape"] | None = None
) -> Float[Tensor, " chosen"]:
    """The smallest share `k` of the valid values, in ascending order; gradients flow to them.

    Shapes: `values (...)`, any shape; `valid`, bool of the same shape, or None if all are valid. The result is
    `(n,)` with n = ⌈k · (number of valid values)⌉, so at least one value, or none if no value is valid.
    Arguments: `k`, in (0, 1].
    Raises: `ValueError` if `k` is outside (0, 1], or the shapes differ.
    Source: the selection of AdaPonderLM's penalty, arXiv 2603.01914.
    """
    return _choose("bottom_k", values, k, valid, largest=False)


def top_k(
    values: Float[Tensor, "*shape"], k: float, valid: Bool[Tensor, "*shape"] | None = None
) -> Float[Tensor, " chosen"]:
    """The largest share `k` of the valid values, in descending order; gradients flow to them.

    Shapes, arguments and errors: those of `bottom_k`.
    """
    return _choose("top_k", values, k, valid, largest=True)


def _choose(owner: str, values: Tensor, k: float, valid: Tensor | None, largest: bool) -> Tensor:
    if not 0 < k <= 1:
        raise ValueError(f"{owner} expected k, the share to choose, in (0, 1], got {k}.")
    if valid is not None:
        if valid.shape != values.shape or valid.dtype != torch.bool:
            raise ValueError(
                f"{owner} expected valid of shape {tuple(values.shape)} and dtype torch.bool, got {tuple(valid.shape)} "
                f"{valid.dtype}."
            )
        values = values[valid]
    # The product may be rounded up: 0.1 · 30 must choose 3.
    count = min(values.numel(), max(1, math.ceil(k * values.numel() - 1e-9)))
    return values.flatten().topk(count, largest=largest).values
