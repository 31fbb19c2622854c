"""Depths from outside: ints shorten the loop and are branched on in Python, tensors select for each token."""

from numbers import Real
from typing import NamedTuple, SupportsIndex, final

import torch
from torch import Tensor

from .._given import integer
from .._types import WeightRows

Depth = SupportsIndex | Tensor | None


@final
class Bounds(NamedTuple):
    """The least and the greatest depth of each token.

    `steps` is the length of the loop, and `least` is a depth that all tokens must reach. `least_each` and `most_each`
    are tensors that broadcast to the rows: the depth that each token must reach, and the depth that it must not
    exceed.
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
        """Whether a token may exit early, after iteration `step` (from 0); does not read the data."""
        if step + 1 >= self.steps:
            return False
        return self.most_each is not None or (rule and not self.forced(step))

    def forced(self, step: int) -> bool:
        """Whether all tokens continue after iteration `step` (from 0), whatever a rule decides."""
        return step + 1 < self.least

    def clamp(self, continuing: WeightRows, remaining: WeightRows, step: int) -> WeightRows:
        """The weight that continues after iteration `step`, limited by the remaining weight and each token's depths."""
        # Both bounds are tensors: at a tie the gradient then goes to `continuing` alone, and whole.
        continuing = continuing.clamp(continuing.new_zeros(()), remaining)
        if self.least_each is not None:
            continuing = torch.where(step + 1 < self.least_each, remaining, continuing)
        if self.most_each is not None:
            continuing = torch.where(step + 1 < self.most_each, continuing, 0)
        return continuing


def _checked(name: str, depth: Depth, steps: int, shape: tuple[int, int], device: torch.device) -> int | Tensor | None:
    """The depth as None, as a tensor on the device, or as a Python int."""
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
    count = integer(depth)
    if count is None or not 1 <= count <= steps:
        per_row = "" if isinstance(depth, Real) else " For one depth per row pass a tensor, of shape (batch, 1)."
        raise ValueError(f"{name} expected an int from 1 to steps={steps}, got {depth}.{per_row}")
    return count
