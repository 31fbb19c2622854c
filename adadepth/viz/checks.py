"""Checks of the data of a picture: depths of a trace, and values for each token."""

import torch
from torch import Tensor


def check_depth(owner: str, depth: Tensor, steps: int) -> None:
    """Check that depths are integers from 0 (padding) to `steps`."""
    if depth.is_floating_point() or depth.dtype == torch.bool:
        raise ValueError(f"{owner} expected integer depths, as trace.depth has them, got {depth.dtype}.")
    if depth.numel() and not 0 <= int(depth.min()) <= int(depth.max()) <= steps:
        raise ValueError(
            f"{owner} expected depths from 0 (padding) to steps={steps}, got {int(depth.min())} to "
            f"{int(depth.max())}. steps is that of the loop."
        )


def check_like_depth(owner: str, what: str, values: Tensor | None, depth: Tensor) -> None:
    """Check that there is one value for each token."""
    if values is not None and values.shape != depth.shape:
        raise ValueError(
            f"{owner} expected {what} of the shape of the depths, {tuple(depth.shape)}, got {tuple(values.shape)}."
        )


def check_real(owner: str, depth: Tensor) -> None:
    """Check that at least one token is not padding."""
    if not bool((depth > 0).any()):
        raise ValueError(f"{owner} expected at least one token of depth 1 or more, got {depth.numel()}, all padding.")
