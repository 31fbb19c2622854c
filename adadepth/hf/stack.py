"""Some layers of a Hugging Face backbone as the block of a loop, run by the backbone's own forward."""

import inspect
from collections.abc import Callable
from typing import Any, final

from torch import Tensor, nn

from .._references import referring
from ..attention.context import checking
from ..attention.view import TokenView
from .anatomy import Anatomy
from .attention import NAME
from .stand_ins import Span, with_part


@final
class Stack(nn.Module):
    """The whole backbone, or a slice of its layers without its ends.

    The backbone's own forward runs, on its own modules as they are at that moment: what is replaced in
    it, moved or loaded later is seen. A slice leaves out what the backbone does before its layers and
    after them; the whole does all of it, in every iteration.

    Shapes: `(rows, length, dim)` to the same.
    Arguments: `base`, the causal language model, referred to and not registered; `anatomy`, where its layers are;
    `span`, the layers as `[start, stop]`, None for the whole backbone.
    Raises: `ValueError` if `base` no longer attends through the view.
    """

    takes_view = True
    base: nn.Module
    __setattr__ = referring("base")

    def __init__(self, base: nn.Module, anatomy: Anatomy, span: list[int] | None) -> None:
        super().__init__()
        self.base, self.anatomy, self.span = base, anatomy, span
        self.tuples = False  # whether the layers return tuples, known once they have run

    @property
    def backbone(self) -> Any:
        """The backbone that these layers are part of."""
        return self.anatomy.of(self.base)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers that run."""
        layers = list(getattr(self.backbone, self.anatomy.layers))
        return layers if self.span is None else layers[slice(*self.span)]

    def forward(self, x: Tensor, view: TokenView, see: Callable[[Tensor], None] | None = None) -> Tensor:
        """The layers' output for the tokens of the view; `see` is shown what each gives, in rows."""
        backbone = self.backbone
        if backbone.config._attn_implementation != NAME:
            raise ValueError(
                f"An adapted model attends through the loop, but its attention was set to "
                f"{backbone.config._attn_implementation!r}. Set it back: model.base.set_attn_implementation({NAME!r})."
            )
        positions = view.positions
        if positions.stride(0) == 0:  # the same for all rows: rotary tables are made once
            positions = positions[:1]
        if self.span is None:
            return run(backbone, x, positions)
        span = Span(list(getattr(backbone, self.anatomy.layers)), self.span[0], self.span[1], x)
        run(with_part(backbone, self.anatomy.layers, span.layers), x, positions)
        self.tuples = span.tuples
        for state in () if see is None or checking() else span.states:
            see(view.tokens.rows(state))  # type: ignore[misc]
        return span.states[-1]


def run(backbone: Any, x: Tensor, positions: Tensor) -> Tensor:
    """The backbone's last state for embeddings `x` at `positions`.

    As written in its class: what decorates it is for the outermost call, and knows only the backbone itself.
    """
    forward = inspect.unwrap(type(backbone).forward)
    hidden: Tensor = forward(backbone, inputs_embeds=x, position_ids=positions, use_cache=False)[0]
    return hidden
