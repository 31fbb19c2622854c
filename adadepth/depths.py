"""Depths without learning, passed as `min_depth` and `max_depth`: the baselines of every learned exit."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor


def uniform_depths(
    shape: tuple[int, ...], steps: int, mean: float, generator: torch.Generator | None = None
) -> Int[Tensor, "..."]:
    """Depths without learning: after every iteration equally many tokens leave, drawn at random.

    The live share falls by the same amount each iteration, until nobody is left.

    Arguments: `shape` of the result, int64; `steps`, the loop's; `mean`, the expected depth, in
    [1, steps]; `generator`, whose device the result is on.
    Raises: `ValueError` if `mean` is not in [1, steps].
    Source: the uniform pruning baseline of AdaPonderLM, arXiv 2603.01914.
    """
    return _draw("uniform_depths", lambda i, rate: max(0.0, 1 - i * (1 - rate)), shape, steps, mean, generator)


def geometric_depths(
    shape: tuple[int, ...], steps: int, mean: float, generator: torch.Generator | None = None
) -> Int[Tensor, "..."]:
    """Depths without learning: after every iteration the same share of what is left leaves, drawn at random.

    Arguments: `shape` of the result, int64; `steps`, the loop's; `mean`, the expected depth, in
    [1, steps]; `generator`, whose device the result is on.
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
    """Depths whose live share in iteration i is `share(i, rate)`, rising in `rate`, with `rate` fit to the mean."""
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
