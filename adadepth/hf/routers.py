"""What the routers of a mixture of experts said in a pass, for the model's own auxiliary loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..attention.context import active, checking
from ..attention.tokens import DenseTokens
from .anatomy import text_config


def wants_routers(config: Any) -> bool:
    """Whether a configuration asks for what routers say, and so for the auxiliary loss."""
    return bool(getattr(text_config(config), "output_router_logits", False))


@contextmanager
def routed(backbone: Any, wanted: bool) -> Iterator[list[Tensor] | None]:
    """A list that fills with each router's logits, `(tokens, experts)`, of the tokens that run; None: not wanted.

    Raises: `ValueError` if the model does not say where its routers are.
    """
    if not wanted:
        yield None
        return
    found: Any = (getattr(backbone, "_can_record_outputs", None) or {}).get("router_logits")
    kind: Any
    kind, index = getattr(found, "target_class", found), getattr(found, "index", 0)
    routers: list[Any] = [m for m in backbone.modules() if isinstance(kind, type) and isinstance(m, kind)]
    if not routers:
        raise ValueError(
            f"output_router_logits was asked for, but {type(backbone).__name__} does not say where its routers are. "
            "Set config.text_config.output_router_logits to False: the loss is then without the auxiliary one."
        )
    seen: list[Tensor] = []

    def see(_router: nn.Module, _args: Any, out: Any) -> None:
        if checking():
            return
        logits: Tensor = out[index] if isinstance(out, tuple | list) else out
        logits = logits.reshape(-1, logits.shape[-1])
        here = active.here
        if here is not None and isinstance(here.tokens, DenseTokens):
            logits = logits[here.tokens.live.flatten()]
        seen.append(logits)

    handles = [router.register_forward_hook(see) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
