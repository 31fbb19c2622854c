"""Random depths, passed as both `min_depth` and `max_depth`: baselines for learned exits."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor


def uniform_depths(
    shape: tuple[int, ...], steps: int, mean: float, generator: torch.Generator | None = None
) -> Int[Tensor, "..."]:
    """Random depths: after every iteration the same number of tokens exits.

    The share of active tokens falls by the same amount in each iteration, until none is active.

    Arguments: `shape`, that of the result, int64; `steps`, those of the loop; `mean`, the expected depth, in
    [1, steps]; `generator`, a random generator, on the device of the result.
    Raises: `ValueError` if `mean` is not in [1, steps].
    Source: the uniform pruning baseline of AdaPonderLM, arXiv 2603.01914.
    """
    return _draw("uniform_depths", lambda i, rate: max(0.0, 1 - i * (1 - rate)), shape, steps, mean, generator)


def geometric_depths(
    shape: tuple[int, ...], steps: int, mean: float, generator: torch.Generator | None = None
) -> Int[Tensor, "..."]:
    """Random depths: after every iteration the same share of the active tokens exits.

    Arguments: `shape`, that of the result, int64; `steps`, those of the loop; `mean`, the expected depth, in
    [1, steps]; `generator`, a random generator, on the device of the result.
    Raises: `ValueError` if `mean` is not in [1, steps].
    Source: the geometric pruning baseline of AdaPonderLM, arXiv 2603.01914.
    """
    return _draw("geometric_depths", lambda i, rate: rate**i, shape, steps, mean, generator)


def _draw(
    owner: str,
    share: Callable[[int, float], float],
    shape: tuple[int, ...],
    steps: int,
    mean: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Depths of which the share `share(i, rate)` is active in iteration i. `rate`, in which it rises, fits the mean."""
    if not 1 <= mean <= steps:
        raise ValueError(f"{owner} expected a mean depth from 1 to steps={steps}, got {mean}.")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(share(i, middle) for i in range(steps)) < mean:
            low = middle
        else:
            high = middle
    device = torch.device("cpu") if generator is None else generator.device
    drawn = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    shares = torch.tensor([share(i, high) for i in range(1, steps)], device=device, dtype=torch.float64)
    return 1 + (drawn.unsqueeze(-1) < shares).sum(-1)
