"""The attention of Hugging Face layers, handed to the view of the running iteration.

Registered with transformers' AttentionInterface as "adadepth": layers call it with keys and values
unrepeated and with their window. No mask is registered, so they build none.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from torch import Tensor, nn
from transformers import AttentionInterface

from ..attention.context import active
from ..attention.view import TokenView

NAME = "adadepth"
# What layers pass along that does not concern attention, or is known here in a better way.
_IGNORED = {"position_ids", "use_cache", "cache_position", "is_causal"}


@final
class _Seen(threading.local):
    """What this thread's attention calls were, where somebody asks."""

    def __init__(self) -> None:
        self.windows: list[int | None] | None = None


_seen = _Seen()


@contextmanager
def windows() -> Iterator[list[int | None]]:
    """A list that fills with the window of each attention call."""
    seen: list[int | None] = []
    before, _seen.windows = _seen.windows, seen
    try:
        yield seen
    finally:
        _seen.windows = before


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a layer of an adapted model attends with.

    Shapes: `query (rows, heads, length, head_dim)`, `key` and `value` with as many or fewer heads; the
    answers `(rows, length, heads, head_dim)`, and no weights.
    Raises: `RuntimeError` outside an adapted model, `ValueError` for a mask or for what is not known here.
    """
    if active.view is None:
        raise RuntimeError(
            f"{type(module).__name__} expected to run in an adapted model, got a call of the model that was adapted "
            "(model.base). Call the model that adapt returned."
        )
    view: TokenView = active.view
    if attention_mask is not None or others.get("is_causal") is False:
        raise ValueError(
            f"{type(module).__name__} passes "
            + ("is_causal=False" if attention_mask is None else "an attention mask of its own")
            + ". In an adapted model, a token attends only to itself and to earlier tokens, and the loop masks "
            "padding. Pass padding as attention_mask to the model, and set config.is_causal to True or None."
        )
    if unknown := [n for n, given in others.items() if not (n in _IGNORED or given is None or given is False)]:
        raise ValueError(
            f"{type(module).__name__} attends with {', '.join(unknown)}, which an adapted model does not support. It "
            "supports scaling, dropout, sliding_window, softcap and s_aux (sinks)."
        )
    if _seen.windows is not None:
        _seen.windows.append(sliding_window)
    out = view.attend(
        query,
        key,
        value,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
