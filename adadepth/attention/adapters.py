"""Adapters for blocks whose attention is not caught as it is."""

from typing import Any, final

from torch import nn

from .._types import Hidden
from .view import TokenView


@final
class Pointwise(nn.Module):
    """Says of a block that it mixes no tokens, so that no attention call is expected of it.

    Shapes: those of `block`, which is called as `block(x, **block_kwargs)`.
    Raises: `ValueError` at its first call if it does attend.
    """

    takes_view = True

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Hidden, view: TokenView, **given: Any) -> Hidden:
        """`block(x, **given)`; the view is not needed."""
        del view
        return self.block(x, **given)


@final
class CausalEncoder(nn.Module):
    """Makes an `nn.TransformerEncoderLayer` or a stack of them, `nn.TransformerEncoder`, causal.

    Those layers are causal only if a mask is passed beside the hint `is_causal`; under the hint its
    values are not read, so one zero stands in for the usual `(seq, seq)`.

    Shapes: `x (rows, length, dim)` to the same.
    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.3 (the decoder's mask).
    """

    def __init__(self, encoder: nn.TransformerEncoderLayer | nn.TransformerEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Hidden) -> Hidden:
        """`encoder(x)`, each token seeing itself and what stands before it."""
        return self.encoder(x, x.new_zeros(1, 1), is_causal=True)
