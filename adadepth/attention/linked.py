"""Gradients of the keys and values that a compiled layer keeps for the next iteration, passed around its graph.

A graph has gradients of its inputs and outputs only, and these keys and values are neither. `leave`, at the block's
output, receives their gradients before any layer of this iteration runs backward. `enter`, at the block's input,
passes on the gradients of what the iteration before had kept, after all layers of this iteration have run backward.
This works if each layer reads from the block's input and adds to its output; otherwise the backward pass raises.
"""

import itertools
import sys
import weakref
from collections.abc import Sequence
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from .._references import referred

Gradients = Sequence[Tensor | None]


@final
class Call:
    """One attention call: its `inputs`, the `kept` keys and values of the iteration before, and the `answers`.

    The answers are the attended values and, if the next iteration may need them, all tokens' keys and values. A
    separate autograd graph connects the answers with the inputs and with what was kept.
    """

    def __init__(self, inputs: Sequence[Tensor], kept: Sequence[Tensor], answers: Sequence[Tensor]) -> None:
        self.inputs, self.kept, self.answers = inputs, kept, answers
        self.due: Gradients = ()  # gradients of what was kept for the next iteration
        self.ran = -1  # the backward pass in which this call ran backward

    def backward(self, grad: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs and of what was kept, from the gradient of the attended values."""
        self.ran = torch._C._current_graph_task_id()
        given, self.due = [grad, *self.due], ()
        pairs = [(a, g) for a, g in zip(self.answers, given, strict=False) if g is not None and a.requires_grad]
        sources = [*self.inputs, *self.kept]
        found = iter(
            torch.autograd.grad(
                [answer for answer, _ in pairs],
                [source for source in sources if source.requires_grad],
                [gradient for _, gradient in pairs],
                retain_graph=torch._C._autograd._get_current_graph_task_keep_graph(),
                allow_unused=True,
            )
        )
        return [next(found) if source.requires_grad else None for source in sources]


@final
class Ledger:
    """The attention calls of the compiled layers of one iteration, by number, and the gradients to pass back.

    `entered`: whether the block's input went through `enter`, which passes the gradients back. The autograd graph of
    the iteration's output keeps the ledger in memory.
    """

    def __init__(self, entered: bool) -> None:
        self.number, self.entered = next(_numbers), entered
        self.calls: dict[int, Call] = {}
        self.back: dict[int, Gradients] = {}
        self.closed = -1  # the backward pass in which the gradients were passed back
        _ledgers[self.number] = self

    def backward(self, call: int, grad: Tensor) -> Gradients:
        """The gradients of a call's inputs; those of what was kept before are stored until `enter` runs backward."""
        if self.closed == torch._C._current_graph_task_id():
            _refuse()
        recorded = self.calls[call]
        gradients = recorded.backward(grad)
        if any(gradient is not None for gradient in gradients[len(recorded.inputs) :]):
            self.back[call] = gradients[len(recorded.inputs) :]
            self._check_later()
        return gradients[: len(recorded.inputs)]

    def deliver(self, call: int, due: Gradients) -> None:
        """Store the gradients of the keys and values that a call kept."""
        recorded = self.calls[call]
        if recorded.ran == torch._C._current_graph_task_id():
            _refuse()
        recorded.due = due
        self._check_later()

    def give_back(self, calls: int) -> list[Tensor | None]:
        """The gradients of what was kept, for the first `calls` calls."""
        self.closed = torch._C._current_graph_task_id()
        return [gradient for call in range(calls) for gradient in self.back.pop(call, (None, None))]

    def _check_later(self) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(self._check)

    def _check(self) -> None:
        """At the end of a backward pass, check that no stored gradient is left over."""
        waiting = bool(self.back) or any(recorded.due for recorded in self.calls.values())
        self.back = {}
        for recorded in self.calls.values():
            recorded.due = ()
        if waiting:
            _refuse()


_numbers = itertools.count(1)
_ledgers: weakref.WeakValueDictionary[int, Ledger] = weakref.WeakValueDictionary()


def ledger(number: int) -> Ledger:
    """The ledger of this number.

    Raises: `ValueError` if the output of its iteration was freed.
    """
    found = _ledgers.get(number)
    if found is None:
        raise ValueError(
            "The backward pass reached a compiled layer of a loop whose output was freed. Keep the loop's output until "
            "the backward pass is done, or run the layers without torch.compile."
        )
    return found


def _refuse() -> NoReturn:
    raise ValueError(
        "A compiled layer keeps keys and values for the next iteration. For their gradients it must read the block's "
        "input and add to its output, and the backward pass must go through all of it; got a layer that is cut off. "
        "Call loss.backward(), or pass the weights of all layers to torch.autograd.grad; do not detach the layer's "
        "input or output. Or run that layer without torch.compile."
    )


def enter(view: Any, block: nn.Module, x: Tensor) -> Tensor:
    """The block's input `x (rows, length, dim)`; its backward pass also reaches what the iteration before had kept.

    If no part of the block is compiled, this is `x` itself.
    """
    if not (view.links and view.past and "torch._dynamo" in sys.modules):
        return x
    past = [tensor for kv in view.past for tensor in kv]
    if not (any(tensor.requires_grad for tensor in past) and _holds_compiled(block)):
        return x
    view.ledger = Ledger(entered=True)
    entered: Tensor = _Enter.apply(view.ledger, x, *past)  # type: ignore[no-untyped-call]
    return entered


def leave(view: Any, h: Tensor) -> Tensor:
    """The block's output `h (rows, length, dim)`; it also gives gradients to what compiled layers kept in
    `view.present`.
    """
    book: Ledger = view.ledger
    calls = [call for call, recorded in book.calls.items() if len(recorded.answers) > 1]
    if not book.calls:
        return h
    if not h.requires_grad:
        _refuse()
    kept = [tensor for call in calls for tensor in view.present[call]]
    left, *linked = _Leave.apply(book, calls, h, *kept)  # type: ignore[no-untyped-call]
    for i, call in enumerate(calls):
        view.present[call] = (linked[2 * i], linked[2 * i + 1])
    return left


def _holds_compiled(block: nn.Module) -> bool:
    """Whether a part of a block is compiled, or of what it refers to: an adapted model's block refers to the base."""
    return any(is_compiled(part) for module in (block, *referred(block)) for part in module.modules())


def is_compiled(part: nn.Module) -> bool:
    """Whether a module was compiled by itself, in place or as a wrapper."""
    return part._compiled_call_impl is not None or type(part).__name__ == "OptimizedModule"


@final
class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, book: Ledger, x: Tensor, *past: Tensor) -> Tensor:
        ctx.book, ctx.calls = book, len(past) // 2
        return x.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad, *ctx.book.give_back(ctx.calls)


@final
class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, book: Ledger, calls: list[int], h: Tensor, *kept: Tensor) -> Any:
        ctx.book, ctx.calls, ctx.zeros = book, calls, h.new_zeros(()).expand(h.shape)
        ctx.set_materialize_grads(False)
        return h.detach(), *(tensor.detach() for tensor in kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *due: Tensor | None) -> Any:
        for i, call in enumerate(ctx.calls):
            pair = due[2 * i : 2 * i + 2]
            if any(gradient is not None for gradient in pair):
                ctx.book.deliver(call, pair)
        # The layers must run backward even if only what they kept was read.
        return None, None, ctx.zeros if grad is None else grad, *([None] * len(due))
