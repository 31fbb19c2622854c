"""Utilities on monotonic masks `(..., steps)`: True while a token runs, then False for good."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def make_monotonic(mask: Bool[Tensor, "*tokens steps"]) -> Bool[Tensor, "*tokens steps"]:
    """The mask with every rise removed: once False along the last axis, False for good.

    Shapes: `(..., steps)` bool to the same.
    """
    return mask.cumprod(-1).bool()


def is_monotonic(mask: Bool[Tensor, "*tokens steps"]) -> bool:
    """Whether no entry is True behind a False along the last axis.

    Shapes: `(..., steps)` bool. Looks at the data: a host sync on a GPU.
    """
    return not bool((mask[..., 1:] & ~mask[..., :-1]).any())


def mask_depth(mask: Bool[Tensor, "*tokens steps"]) -> Int[Tensor, "*tokens"]:
    """How many iterations each token runs: int64, the number of True before the first False.

    Shapes: `(..., steps)` bool to `(...)`.
    """
    return mask.cumprod(-1).sum(-1)


def depth_mask(depth: Int[Tensor, "*tokens"], steps: int) -> Bool[Tensor, "*tokens steps"]:
    """The monotonic mask of given depths, the inverse of `mask_depth`.

    Shapes: `(...)` int to `(..., steps)` bool.
    """
    return torch.arange(steps, device=depth.device) < depth.unsqueeze(-1)


def live_share(live: Bool[Tensor, "*tokens steps"]) -> float:
    """The share of the fixed-depth work that is done: Σ depth / (real tokens × steps), in [0, 1].

    Shapes: `(..., steps)` bool, monotonic; a token is real if its first entry is True. 0 if none is.
    Looks at the data: a host sync on a GPU.
    """
    real = int(live[..., :1].sum()) * live.shape[-1]
    return int(live.sum()) / real if real else 0.0
