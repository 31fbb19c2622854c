"""Attention of a layer that is compiled by itself: what a graph asks of the view that is active when it runs.

Under `torch.no_grad()` that is an operator, `adadepth::attend`, so that a layer is one graph. With gradients the graph
breaks at the call, which runs in eager: keys and values that a token keeps from an earlier iteration have a graph of
their own, which no operator hands on.
"""

import sys
from collections.abc import Callable
from inspect import signature
from typing import Any, NoReturn

import torch
from torch import Tensor

from .context import active

_WHY = (
    "A layer that is compiled by itself attends in a loop that runs in eager. With gradients its graph breaks there: "
    "compile it without fullgraph=True, or run it under torch.no_grad(), where it is one graph."
)
_disabled: list[Callable[..., Tensor]] = []  # made once Dynamo is there: it imports it


def asked_in_graph(view: Any, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """`view.attend(q, k, v, **how)`, asked by a layer that is traced; the view was made outside of the graph."""
    if not torch.is_grad_enabled():
        q, k, v = _autocast(q, k, v)
        answer: Tensor = torch.ops.adadepth.attend(q, k, v, *how.values())
        return answer
    return _disabled[0](view, q, k, v, **how)


def expect_graphs() -> None:
    """To be called in eager before a layer may be traced: what breaks its graph cannot be made inside of it."""
    if not _disabled and "torch._dynamo" in sys.modules:
        more = {"reason": _WHY} if "reason" in signature(torch.compiler.disable).parameters else {}
        _disabled.append(torch.compiler.disable(_in_eager, **more))


def _in_eager(view: Any, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    answer: Tensor = view.attend(q, k, v, **how)
    return answer


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """What autocast makes of the inputs of attention; a graph runs without it."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(kind)) if t.dtype == torch.float32 else t for t in tensors]


@torch.library.custom_op("adadepth::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`attend` of the view that is active in this thread, without gradients; the arguments are those of it.

    Shapes: `q (rows, heads, length, head_dim)` to `(rows, heads, length, value_dim)`, in memory token by token.
    Raises: `RuntimeError` outside a looped block, `ValueError` under a loop that runs with gradients.
    """
    view = active.view
    if view is None:
        raise RuntimeError("no view")
    out = view.attend(
        q, k, v, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa, window=window, softcap=softcap, sinks=sinks
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@attend.register_fake
def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
    rows, heads, length, _ = q.shape
    return q.new_empty(rows, length, heads, v.shape[-1]).transpose(1, 2)
