"""Attention of a layer that is compiled by itself: its graph calls the view that is active when the graph runs.

Compilers do not look into `adadepth::attend`, so a layer is one graph for every view, number of tokens and iteration.
The order of the calls tells which layer a call belongs to, but a compiler may reorder independent calls. So each call
takes a small tensor that the call before it returned, its `turn`. In the backward pass, `turn` tells which call a
gradient belongs to.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .context import active
from .linked import Call, Ledger, ledger


def attend_in_graph(q: Tensor, k: Tensor, v: Tensor, how: dict[str, Any]) -> Tensor:
    """What a traced layer calls in its graph instead of `view.attend(q, k, v, **how)`."""
    q, k, v = _autocast(q, k, v)
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    answer: Tensor
    answer, active.turn = torch.ops.adadepth.attend(q, k, v, active.turn, grad, **how)
    return answer


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """The inputs of attention, cast as autocast would; a graph runs without autocast."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(kind)) if t.dtype == torch.float32 else t for t in tensors]


@torch.library.custom_op("adadepth::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turn: Tensor,
    grad: bool,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend` of the view that is active in this thread, and the turn of the next call.

    Shapes: those of `view.attend`; the result is in memory token by token. `turn (2,)` int64, on the CPU.
    Arguments: `grad`, whether the result needs a gradient; the others are those of `view.attend`.
    Raises: what `view.attend` raises; `RuntimeError` outside a looped block; `ValueError` in a loop with
    `checkpoint=True`, and if a gradient would be cut.
    """
    view: Any = active.view
    if view is None:
        raise RuntimeError(
            "A graph that was compiled inside a looped block was called outside of it. Call it only through the "
            "RecurrentWrapper that runs the block."
        )
    how = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa, "window": window, "softcap": softcap}
    _check(view, grad)
    if grad:
        out, turn = _with_gradients(view, [q, k, v] if sinks is None else [q, k, v, sinks], how)
    else:
        out, turn = _without_gradients(view, q, k, v, sinks, how), torch.zeros_like(turn)
    return out, turn


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, turn: Tensor, *_how: Any, **_more: Any) -> tuple[Tensor, Tensor]:
    rows, heads, length, _ = q.shape
    return q.new_empty(rows, length, heads, v.shape[-1]).transpose(1, 2), torch.empty_like(turn)


def _check(view: Any, grad: bool) -> None:
    """Check that no gradient is cut."""
    if view.checkpointed:
        raise ValueError(
            "A compiled layer attends in a loop with checkpoint=True; expected checkpoint=False, because the backward "
            "pass would run the iterations again. Set it, or compile only submodules without attention."
        )
    kept = view.past[view.calls] if view.past and view.calls < len(view.past) else ()
    if any(t.requires_grad for t in kept) and not (grad and view.ledger is not None and view.ledger.entered):
        raise ValueError(
            "A compiled layer attends without gradients in a loop with gradients: those of earlier iterations' keys "
            "and values would be cut. Put torch.no_grad() around the whole loop, compile the layer as a module, "
            "layer.compile(), or run it without torch.compile."
        )


def _without_gradients(view: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: dict[str, Any]) -> Tensor:
    number = view.calls
    out: Tensor = view.attend(q, k, v, sinks=sinks, **how)
    if view.keep and not view.bare:
        given = _storages(k, v)
        view.present[number] = tuple(t.clone() if _storages(t) & given else t for t in view.present[number])
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _storages(*tensors: Tensor) -> set[int]:
    """The memory of tensors. A graph may overwrite the inputs and the outputs of an operator."""
    return {t.untyped_storage().data_ptr() for t in tensors}


def _with_gradients(view: Any, inputs: Sequence[Tensor], how: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The result; the view's ledger holds the autograd graph from it to the inputs."""
    view.ledger = Ledger(entered=False) if view.ledger is None else view.ledger
    inputs, number, past = [t.detach().clone().requires_grad_() for t in inputs], view.calls, view.past
    kept: list[Tensor] = []
    if past and number < len(past):
        kept = [t.detach().requires_grad_(t.requires_grad) for t in past[number]]
        view.past = [*past[:number], tuple(kept), *past[number + 1 :]]
    try:
        with _autograd(), torch.enable_grad():
            out = view.attend(*inputs[:3], sinks=inputs[3] if len(inputs) > 3 else None, **how)
    finally:
        view.past = past
    present = [] if view.bare or not view.keep else view.present[number]
    if present:
        view.present[number] = tuple(t.detach() for t in present)
    call = len(view.ledger.calls) if view.bare else number
    view.ledger.calls[call] = Call(inputs, kept, [out, *present])
    answer = out.detach().transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return answer, torch.tensor([view.ledger.number, call])


def _autograd() -> AbstractContextManager[Any]:
    """A context in which operators have gradients, also inside an operator with a gradient of its own."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        key: Any = torch._C._parse_dispatch_key(name)
        exclude = exclude.remove(key)
    guard: AbstractContextManager[Any] = torch._C._ForceDispatchKeyGuard(include, exclude)
    return guard


@torch.library.custom_op("adadepth::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor, turn: Tensor, q: Sequence[int], k: Sequence[int], v: Sequence[int], sinks: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of a call's queries, keys, values and sinks, of these shapes, given that of the answers."""
    number, call = turn.tolist()
    found = [*ledger(number).backward(call, grad), None][:4]
    made = [
        grad.new_zeros(shape) if gradient is None else gradient.clone(memory_format=torch.contiguous_format)
        for gradient, shape in zip(found, (q, k, v, sinks), strict=True)
    ]
    return made[0], made[1], made[2], made[3]


@attend_backward.register_fake
def _(grad: Tensor, _turn: Tensor, *shapes: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(grad.new_empty(shape) for shape in shapes)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    sinks, ctx.grad = inputs[-1], inputs[4]
    ctx.learned = sinks is not None
    ctx.shapes = [*(t.shape for t in inputs[:3]), sinks.shape if ctx.learned else (0,)]
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor, _turn: None) -> tuple[Tensor | None, ...]:
    if not ctx.grad:
        raise ValueError("adadepth::attend was called with grad=False, but its gradient is needed. Pass grad=True.")
    q, k, v, sinks = torch.ops.adadepth.attend_backward(grad, *ctx.saved_tensors, *ctx.shapes)
    return q, k, v, *([None] * 7), sinks if ctx.learned else None


attend.register_autograd(_backward, setup_context=_setup)
