"""Utilities for monotonic masks `(..., steps)`: True for the iterations that a token runs, False for all later ones."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def make_monotonic(mask: Bool[Tensor, "*tokens steps"]) -> Bool[Tensor, "*tokens steps"]:
    """Makes a mask monotonic: along the last axis, all entries after the first False become False.

    Shapes: `(..., steps)` bool to the same.
    """
    return mask.cumprod(-1).bool()


def is_monotonic(mask: Bool[Tensor, "*tokens steps"]) -> bool:
    """Whether, along the last axis, no entry is True after a False.

    Shapes: `(..., steps)` bool. Reads the data, which is a host sync on a GPU.
    """
    return not bool((mask[..., 1:] & ~mask[..., :-1]).any())


def mask_depth(mask: Bool[Tensor, "*tokens steps"]) -> Int[Tensor, "*tokens"]:
    """The number of iterations of each token: how many entries are True before the first False, int64.

    Shapes: `(..., steps)` bool to `(...)`.
    """
    return mask.cumprod(-1).sum(-1)


def depth_mask(depth: Int[Tensor, "*tokens"], steps: int) -> Bool[Tensor, "*tokens steps"]:
    """The monotonic mask for given depths; the inverse of `mask_depth`.

    Shapes: `(...)` int to `(..., steps)` bool.
    """
    return torch.arange(steps, device=depth.device) < depth.unsqueeze(-1)


def live_share(live: Bool[Tensor, "*tokens steps"]) -> float:
    """The share of all iterations that run: Σ depth / (real tokens × steps), in [0, 1].

    Shapes: `(..., steps)` bool, monotonic. A token is real if its first entry is True; without real tokens, the
    share is 0. Reads the data, which is a host sync on a GPU.
    """
    real = int(live[..., :1].sum()) * live.shape[-1]
    return int(live.sum()) / real if real else 0.0
