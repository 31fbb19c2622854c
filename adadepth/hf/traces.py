"""The traces of passes whose outputs a trainer does not return."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..loop.trace import Trace
from .model import AdaptiveForCausalLM


@contextmanager
def traces(model: nn.Module) -> Iterator[list[Trace]]:
    """A list that collects the trace of each pass of the adapted model in `model`, which may be wrapped.

    Use it for losses on the trace with trainers that do not return the model's output:

        with adadepth.hf.traces(model) as seen:
            loss = super().compute_loss(model, inputs)
        return loss + 0.01 * adadepth.ponder_cost(seen[-1])

    Raises: `ValueError` if `model` contains no adapted model.
    """
    adapted = [part for part in model.modules() if isinstance(part, AdaptiveForCausalLM)]
    if not adapted:
        raise ValueError(f"traces expected an adapted model, or one that is wrapped, got {type(model).__name__}.")
    seen: list[Trace] = []
    handle = adapted[0].backbone.register_forward_hook(lambda _part, _args, out: seen.append(out.trace))
    try:
        yield seen
    finally:
        handle.remove()
