"""`RowPerToken`: how blocks are looped that take one condition, or one memory, for each row of their batch."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, final

from torch import Tensor, nn

from .._types import Hidden
from .catch import catching, current_view
from .context import active


@final
class RowPerToken(nn.Module):
    """Shows a block every token as a row of its own, of length 1.

    For blocks that are conditioned by row, `x * (1 + scale[:, None])`, or attend to a memory `(batch, entries, dim)`.
    Attention of the block to its own input is over the token's whole row, as ever; whether later tokens are seen is
    the wrapper's `causal` alone. Attention to other keys is the block's own, with its masks. Positions that the
    block counts itself are all 0, and a memory of one entry would be taken for the token itself: give it two.

    Shapes: `x (rows, length, dim)` to the same; the block sees `(tokens, 1, dim)`, and of `block_kwargs` each tensor
    `(batch or 1, seq or 1, ...)` as `(tokens, ...)`: a time `(batch, 1)`, a condition `(batch, 1, dim)`, a memory
    `(batch, 1, entries, dim)`, what pads it `(batch, 1, entries)`.
    Raises: `ValueError` if the block attends to its own input in another shape.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Hidden, **given: Any) -> Hidden:
        """`block` on every token alone, but for its attention."""
        view, before = current_view("RowPerToken"), active.apart
        active.apart = True
        try:
            # The loop does not catch calls where it takes the block's own attention for all there is to do.
            with catching() if view.bare else nullcontext():
                out = self.block(x.flatten(0, 1).unsqueeze(1), **_apart(given, (x.shape[0], x.shape[1])))
        finally:
            active.apart = before
        return out.view_as(x) if isinstance(out, Tensor) and out.numel() == x.numel() else out


def _apart(given: Any, shape: tuple[int, int]) -> Any:
    """`given` with the tensors in it, which broadcast to `shape`, as one entry for each token."""
    if isinstance(given, Tensor):
        return given.expand(*shape, *given.shape[2:]).flatten(0, 1) if given.dim() else given
    if isinstance(given, Mapping):
        return {name: _apart(value, shape) for name, value in given.items()}
    if isinstance(given, tuple | list):
        return type(given)([_apart(value, shape) for value in given])
    return given
