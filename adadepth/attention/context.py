"""What may be known inside a looped block: which iteration runs, and where its tokens stand."""

from jaxtyping import Int
from torch import Tensor

from .catch import current_view


def iteration() -> Int[Tensor, "rows length"]:
    """The iteration of each token of the block's input, int64, from 0; for use inside a looped block.

    Shapes: `(rows, length)`, the first two axes of the block's input.
    Raises: `RuntimeError` outside a looped block.
    """
    return current_view("iteration").iteration


def positions() -> Int[Tensor, "rows length"]:
    """The position of each token of the block's input among its row's real tokens, int64, from 0.

    A block that runs on packed tokens cannot count positions by the length of its input: rotary or
    learned positions inside a looped block are read from here.

    Shapes: `(rows, length)`, the first two axes of the block's input.
    Raises: `RuntimeError` outside a looped block.
    """
    return current_view("positions").positions
