"""Some layers of a Hugging Face backbone as the block of a loop, run by the backbone's own forward."""

import inspect
from typing import Any, final

from torch import Tensor, nn

from .._vocabulary import referring
from ..attention.view import TokenView
from .anatomy import anatomy_of
from .attention import NAME


@final
class Stack(nn.Module):
    """The whole backbone, or a slice of its layers without its ends.

    The backbone's own forward runs, on its own modules as they are at that moment: what is replaced in
    it, moved or loaded later is seen. A slice leaves out the embeddings' positions and dropout and the
    final norm; the whole has all of them, in every iteration.

    Shapes: `(rows, length, dim)` to the same.
    Arguments: `base`, the causal language model, referred to and not registered; `span`, the layers as
    `[start, stop]`, None for the whole backbone.
    Raises: `ValueError` if `base` no longer attends through the view.
    """

    takes_view = True
    base: nn.Module
    __setattr__ = referring("base")

    def __init__(self, base: nn.Module, span: list[int] | None) -> None:
        super().__init__()
        self.base, self.span, self.anatomy = base, span, anatomy_of(base)

    @property
    def backbone(self) -> Any:
        """The backbone that these layers are part of."""
        return getattr(self.base, self.anatomy.backbone)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers that run."""
        layers = list(getattr(self.backbone, self.anatomy.layers))
        return layers if self.span is None else layers[slice(*self.span)]

    def forward(self, x: Tensor, view: TokenView) -> Tensor:
        """The layers' output for the tokens of the view."""
        backbone = self.backbone
        if backbone.config._attn_implementation != NAME:
            raise ValueError(
                f"An adapted model attends through the loop, but its attention was set to "
                f"{backbone.config._attn_implementation!r}. Set it back: model.base.set_attn_implementation({NAME!r})."
            )
        part = backbone if self.span is None else self._part(backbone)
        positions = view.positions
        if positions.stride(0) == 0:  # the same for all rows: rotary tables are made once
            positions = positions[:1]
        # As written in its class: what decorates it is for the outermost call, and knows only the backbone itself.
        forward = inspect.unwrap(type(backbone).forward)
        return forward(part, inputs_embeds=x, position_ids=positions, use_cache=False).last_hidden_state

    def _part(self, backbone: Any) -> Any:
        """The backbone with these layers and no ends; attributes of the copy go before its modules."""
        part = object.__new__(type(backbone))
        part.__dict__ = {**backbone.__dict__, self.anatomy.layers: self.layers, self.anatomy.norm: _same}
        if self.anatomy.dropout:
            part.__dict__[self.anatomy.dropout] = _same
        if self.anatomy.position:
            part.__dict__[self.anatomy.position] = _nowhere
        return part


def _same(x: Tensor) -> Tensor:
    return x


def _nowhere(positions: Tensor) -> Tensor:
    """A position embedding that adds nothing."""
    return positions.new_zeros(())
