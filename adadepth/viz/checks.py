"""What a picture is made of: depths of a trace and what belongs to them, or an error that teaches."""

import torch
from torch import Tensor


def check_depth(owner: str, depth: Tensor, steps: int) -> None:
    """Depths of tokens, from 0 (padding) to `steps`."""
    if depth.is_floating_point() or depth.dtype == torch.bool:
        raise ValueError(f"{owner} expected integer depths, as trace.depth has them, got {depth.dtype}.")
    if depth.numel() and not 0 <= int(depth.min()) <= int(depth.max()) <= steps:
        raise ValueError(
            f"{owner} expected depths from 0 (padding) to steps={steps}, got {int(depth.min())} to "
            f"{int(depth.max())}. steps is that of the loop."
        )


def check_like_depth(owner: str, what: str, values: Tensor | None, depth: Tensor) -> None:
    """One value per token."""
    if values is not None and values.shape != depth.shape:
        raise ValueError(
            f"{owner} expected {what} of the shape of the depths, {tuple(depth.shape)}, got {tuple(values.shape)}."
        )


def check_real(owner: str, depth: Tensor) -> None:
    """At least one token that is not padding."""
    if not bool((depth > 0).any()):
        raise ValueError(f"{owner} expected at least one token of depth 1 or more, got {depth.numel()}, all padding.")
