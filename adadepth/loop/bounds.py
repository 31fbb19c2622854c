"""Depth given from outside: ints shorten the loop and are branched on, tensors select per token."""

from operator import index
from typing import NamedTuple, SupportsIndex, final

import torch
from torch import Tensor

from .._types import WeightRows

Depth = SupportsIndex | Tensor | None


@final
class Bounds(NamedTuple):
    """How deep a token must and may go.

    `steps` is the length of the loop. `least` and `most` are depths that every token must reach
    (an int) or that each token must reach or may not pass (tensors that broadcast to the rows).
    """

    steps: int
    least: int
    least_each: Tensor | None
    most_each: Tensor | None

    @classmethod
    def of(
        cls, steps: int, min_depth: Depth, max_depth: Depth, shape: tuple[int, int], device: torch.device
    ) -> "Bounds":
        """Check both depths against the loop's `steps` and the rows' `(batch, seq)`, and move them to the rows."""
        least = _checked("min_depth", min_depth, steps, shape, device)
        most = _checked("max_depth", max_depth, steps, shape, device)
        return cls(
            steps=most if isinstance(most, int) else steps,
            least=least if isinstance(least, int) else 1,
            least_each=least if isinstance(least, Tensor) else None,
            most_each=most if isinstance(most, Tensor) else None,
        )

    def can_exit(self, step: int, rule: bool) -> bool:
        """Whether a token may leave after iteration `step` (from 0), before the loop ends; no look at the data."""
        if step + 1 >= self.steps:
            return False
        return self.most_each is not None or (rule and not self.forced(step))

    def forced(self, step: int) -> bool:
        """Whether every token stays after iteration `step` (from 0), whatever a rule says."""
        return step + 1 < self.least

    def clamp(self, stays: WeightRows, remaining: WeightRows, step: int) -> WeightRows:
        """What stays after iteration `step`, within what remains and within the depths of each token."""
        # Both bounds are tensors: at a tie the gradient then goes to `stays` alone, and whole.
        stays = stays.clamp(stays.new_zeros(()), remaining)
        if self.least_each is not None:
            stays = torch.where(step + 1 < self.least_each, remaining, stays)
        if self.most_each is not None:
            stays = torch.where(step + 1 < self.most_each, stays, 0)
        return stays


def _checked(name: str, depth: Depth, steps: int, shape: tuple[int, int], device: torch.device) -> int | Tensor | None:
    """The depth as None, a tensor on the device or an int of Python's own."""
    if isinstance(depth, Tensor):
        if depth.is_floating_point() or depth.is_complex() or depth.dtype == torch.bool:
            raise ValueError(
                f"{name} expected integers, got a tensor of {depth.dtype}. Round it to the depths you mean."
            )
        try:
            fits = depth.dim() != 1 and torch.broadcast_shapes(depth.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name} expected an int or a tensor that broadcasts to (batch, seq) = {shape}, got shape "
                f"{tuple(depth.shape)}. One depth per row has shape (batch, 1)."
            )
        return depth.to(device)
    if depth is None:
        return None
    whole = depth if isinstance(depth, int) else index(depth) if hasattr(depth, "__index__") else 0  # NumPy's, say
    if isinstance(depth, bool) or not 1 <= whole <= steps:
        raise ValueError(f"{name} expected an int from 1 to steps={steps}, got {depth}.")
    return whole
