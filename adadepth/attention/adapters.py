"""Adapters for blocks whose attention the loop cannot catch as it is."""

from typing import Any, final

from torch import nn

from .._types import Hidden
from .context import active
from .view import TokenView


@final
class Pointwise(nn.Module):
    """Marks a block that mixes no tokens, so that the loop expects no attention call from it.

    Shapes: those of `block`, which is called as `block(x, **block_kwargs)`.
    Raises: `ValueError` if the block calls attention after all.
    """

    takes_view = True

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Hidden, view: TokenView, **given: Any) -> Hidden:
        """`block(x, **given)`, without the view."""
        del view
        return self.block(x, **given)


@final
class CausalEncoder(nn.Module):
    """Makes an `nn.TransformerEncoderLayer` or a stack of them, `nn.TransformerEncoder`, causal.

    These layers are causal only if they get a mask together with the hint `is_causal`. With the hint, a loop does not
    read the values of the mask, so there a mask of one zero replaces the usual `(seq, seq)`.

    Shapes: `x (rows, length, dim)` to the same.
    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.3 (the decoder's mask).
    """

    def __init__(self, encoder: nn.TransformerEncoderLayer | nn.TransformerEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Hidden) -> Hidden:
        """`encoder(x)`, where each token attends to itself and to earlier tokens."""
        if active.view is None:  # outside a loop, PyTorch's fast path reads the values
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        else:
            mask = x.new_zeros(1, 1)
        return self.encoder(x, mask, is_causal=True)
