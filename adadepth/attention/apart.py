"""`RowPerToken`: a wrapper for blocks that take one condition, or one memory, for each row of their batch."""

from contextlib import nullcontext
from typing import Any, final

from torch import Tensor, nn

from .._nested import each
from .._types import Hidden
from .catch import catching, current_view, takes_view
from .context import active


@final
class RowPerToken(nn.Module):
    """Calls a block with every token as a row of its own, of length 1.

    Use it for blocks that are conditioned by row, as in `x * (1 + scale[:, None])`, or that attend to a memory
    `(batch, entries, dim)`. When the block attends to its own input, each token still attends to its whole row. Only
    the wrapper's `causal` decides whether it attends to later tokens. Attention to other keys is computed as the
    block calls it, with the block's masks. Positions that the block counts itself are all 0. A memory of one entry
    would be mistaken for the token itself: give it two entries.

    Shapes: `x (rows, length, dim)` to the same; the block gets `(tokens, 1, dim)`. It gets each tensor of
    `block_kwargs`, `(batch or 1, seq or 1, ...)`, as `(tokens, ...)`: a time `(batch, 1)`, a condition
    `(batch, 1, dim)`, a memory `(batch, 1, entries, dim)`, the padding mask of a memory `(batch, 1, entries)`.
    Raises: `ValueError` if the block takes the view, or attends to its own input in another shape. The wrapper's self
        check and `check_looped` compare one iteration with the block on whole rows.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        if takes_view(block):
            name = type(block).__name__
            raise ValueError(
                f"RowPerToken expected a block that does not take the view, got {name}. "
                + (
                    "Write Pointwise(RowPerToken(block))."
                    if name == "Pointwise"
                    else "Give it to RecurrentWrapper itself, and let it read a row's condition as c[adadepth.rows()]."
                )
            )
        self.block = block

    def forward(self, x: Hidden, **given: Any) -> Hidden:
        """The block on every token by itself; only its attention reads other tokens."""
        view, before = current_view("RowPerToken"), active.apart
        active.apart = True
        try:
            # In a bare view the loop catches no calls, so they are caught here.
            with catching() if view.bare else nullcontext():
                out = self.block(x.flatten(0, 1).unsqueeze(1), **_apart(given, (x.shape[0], x.shape[1])))
        finally:
            active.apart = before
        return out.view_as(x) if isinstance(out, Tensor) and out.numel() == x.numel() else out


def _apart(given: Any, shape: tuple[int, int]) -> Any:
    """`given`, where each tensor, which broadcasts to `shape`, becomes one entry for each token."""
    return each(given, lambda tensor: tensor.expand(*shape, *tensor.shape[2:]).flatten(0, 1))
