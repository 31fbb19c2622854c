"""The parts of a model before its layers and after them, computed by the model's own forward."""

import inspect
import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from .._references import referring
from .anatomy import Anatomy, anatomy_of
from .stack import run
from .stand_ins import Answer, Answering, Instead, same, with_part


def around(
    base: Any,
    anatomy: Anatomy,
    x: Tensor,
    positions: Tensor,
    layers: Callable[[Tensor], Tensor],
    tuples: Callable[[], bool],
) -> Tensor:
    """The backbone's last state for embeddings `x (batch, seq, dim)` at `positions`, with `layers` in place of its own.

    The backbone's own forward scales embeddings, adds learned positions, and applies dropout and the final norm.
    """
    backbone = anatomy.of(base)
    own = list(getattr(backbone, anatomy.layers))
    first = Instead(own[0], layers, tuples)
    others = [Instead(layer, same, tuples) for layer in own[1:]]
    return run(with_part(backbone, anatomy.layers, [first, *others]), x, positions)


@final
class _Reached(Exception):
    """Raised in place of the first layer, with the `state` that it would run on."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state


def before(base: Any, anatomy: Anatomy, x: Tensor, positions: Tensor) -> Tensor:
    """The state that the backbone gives its first layer, for embeddings `x (batch, seq, dim)` at `positions`.

    For the part after the layers, call `around` with layers that return a known state.
    """

    def stop(state: Tensor) -> Tensor:
        raise _Reached(state)

    try:
        around(base, anatomy, x, positions, stop, bool)
    except _Reached as reached:
        return reached.state
    raise ValueError(
        f"{type(base).__name__} never called its layers, so they cannot be replaced by a loop. Loop its layers by "
        "hand: adadepth.RecurrentWrapper(layers, steps)."
    )


def head(base: Any, anatomy: Anatomy, hidden: Tensor, **options: Any) -> Any:
    """The model's output for a last state `(batch, seq, dim)`; the model's own forward scales or bounds the logits.

    Arguments: `options`, those of the model's forward, such as labels; `router_logits` stand for the backbone's.
    """
    answer = Answer(hidden, options.pop("router_logits", None))
    part = with_part(base, anatomy.backbone, Answering(anatomy.of(base), answer))
    return inspect.unwrap(type(base).forward)(part, inputs_embeds=hidden, **options)


@final
class Head(nn.Module):
    """The head of a causal language model, for pieces that read predictions.

    It scales and caps logits as the model's own forward does; the linear map alone does not.

    Shapes: `(n, dim)`, states after the final norm, to logits `(n, vocabulary)`.
    Arguments: `base`, the model, adapted or not. It is referred to, not registered as a submodule.
    """

    base: Any
    __setattr__ = referring("base")

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.anatomy = base, anatomy_of(base)

    def forward(self, h: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = head(self.base, self.anatomy, h.unsqueeze(0)).logits
        return logits.squeeze(0)


def scale_of_embedding(base: Any) -> float | None:
    """The factor by which the model's embedding multiplies its rows; None if it does something else with them.

    It is measured with known rows: the model's own may be zero, quantised, or not in memory.
    """
    own, large = base.get_input_embeddings(), 2.0**20
    with torch.device("cpu"):
        row, ids = torch.linspace(1, 2, own.weight.shape[1], dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    try:
        embedding = _with_buffers(own, base)
        small, big = (_embedded(embedding, known, ids) for known in (row, large * row))
    except Exception:  # its rows are no plain tensor
        return None
    scale = float(small[0] / row[0])
    linear = all(map(torch.allclose, (small, big), (scale * row, scale * large * row)))
    return scale if linear else None


def _embedded(embedding: Any, row: Tensor, ids: Tensor) -> Tensor:
    """What an embedding returns for one token `ids (1,)` if all its rows are `row (dim,)`."""
    known = with_part(embedding, "weight", row.expand(embedding.weight.shape))
    embedded: Tensor = inspect.unwrap(type(embedding).forward)(known, ids)[0]
    return embedded


def _with_buffers(embedding: Any, base: Any) -> Any:
    """The embedding; if it is on meta, a copy whose buffers have the values that the model gives them at the start."""
    if not embedding.weight.is_meta:
        return embedding
    for name, buffer in embedding.named_buffers():
        embedding = with_part(embedding, name, torch.empty_like(buffer, device="cpu"))
    base._init_weights(embedding)
    return embedding


def shape_of_logits(base: Any, anatomy: Anatomy) -> tuple[float, float | None] | None:
    """The factor by which the model's forward scales its head's logits, and the bound (or None) that it puts on them.

    None if it does something else. It is measured: the head is replaced by one that returns known logits.
    """
    own = base.get_output_embeddings()
    path = next((name for name, part in base.named_modules() if part is own), None)
    small, one, large = 2.0**-20, 1.0, 2.0**20
    with torch.device("cpu"):
        stub = _Known(own, torch.tensor([small, one, large], dtype=torch.float64))
        state = torch.ones(1, 1, own.weight.shape[1], dtype=torch.float64)
    try:
        out = head(with_part(base, path or "", stub), anatomy, state).logits[0, 0, :3].tolist()
        (seen,) = stub.seen.unique().tolist()
    except Exception:  # the forward does more with the logits than scale or bound them
        return None
    low, middle, high = out
    scale = low / small
    cap = None if math.isclose(high, scale * large, rel_tol=1e-3) else high
    expected = scale if cap is None else cap * math.tanh(scale / cap)
    return (scale * seen, cap) if math.isclose(middle, expected, rel_tol=1e-3) else None


@final
class _Known(nn.Module):
    """Replaces a head: returns `logits` as its first ones, and remembers the state that it got."""

    def __init__(self, own: Any, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.words = logits, own.weight.shape[0]
        self.weight, self.bias = own.weight, getattr(own, "bias", None)
        self.seen = logits

    def forward(self, h: Tensor) -> Tensor:
        """The known logits, for any state."""
        self.seen = h
        return nn.functional.pad(self.logits, (0, self.words - len(self.logits))).expand(*h.shape[:-1], -1)
