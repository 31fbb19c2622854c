"""What a looped block did: which tokens ran, their scores, and where each token exited."""

from typing import Any, NamedTuple, NoReturn, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._types import HiddenRows, StateRows

# With more iterations than this, the text gives the first ones and the last.
SHOWN = 8


class _Rows(NamedTuple):
    live: Bool[Tensor, "batch seq steps"]
    scores: Float[Tensor, "batch seq gated"]
    exit_probs: Float[Tensor, "batch seq steps"]


@final
class Trace(_Rows):
    """The record of one forward pass. All its tensors are 0 (or False) at padding.

    Shapes:
        live: `(batch, seq, steps)` bool, whether the token ran iteration i. Once False along `steps`, it never
            becomes True again. `live[..., 0]` is the mask.
        scores: `(batch, seq, steps - 1)`, the gate's score of every active token, also of one that exits there; 0
            elsewhere. The last iteration has no score, because nothing follows it.
        exit_probs: `(batch, seq, steps)`, the weight that exited after each iteration; sums to 1 over
            `steps` for a real token.
    """

    __slots__ = ()

    def __new__(cls, live: Any, *others: Any) -> "Trace":
        """Takes the three tensors, or one iterable of them: tools that rebuild tuples pass an iterable."""
        return super().__new__(cls, *((live, *others) if others else live))

    def __repr__(self) -> str:
        """The depths of the tokens; without numbers if the tensors hold no data, as on the meta device."""
        if not isinstance(self.live, Tensor):
            return f"Trace{tuple(self)}"  # a tree of something else, as torch's pytrees make
        *rows, steps = self.live.shape
        tokens, depths = _depths(self.live)
        return f"Trace({tokens} in {tuple(rows)}, {steps} steps{depths})"

    @property
    def depth(self) -> Int[Tensor, "batch seq"]:
        """The number of iterations run, `(batch, seq)` int64: from 1 to steps for a real token, 0 at padding."""
        return self.live.sum(-1)

    @property
    def gates(self) -> Float[Tensor, "batch seq gated"]:
        """The scores of the tokens that continue, else 0: the effective gate values m·s."""
        return torch.where(self.live[..., 1:], self.scores, 0.0)

    @property
    def survival(self) -> Float[Tensor, "batch seq gated"]:
        """The running product of the scores of the tokens that continue, else 0."""
        return self.gates.cumprod(-1)


@final
class Output(NamedTuple):
    """What a looped block returns.

    Shapes:
        hidden: `(batch, seq, dim)`, the sum of the states, each weighted by its exit weight. For hard exits, this
            is the state at the exit. 0 at padding.
        trace: the record of the pass.
        states: `(batch, seq, steps, dim)` if requested, else None: the state of every iteration. For an exited
            token, later entries repeat its last state. 0 at padding.
    """

    hidden: HiddenRows
    trace: Trace
    states: StateRows | None = None

    def __repr__(self) -> str:
        """Shapes, and the depths of the tokens."""
        states = "" if self.states is None else f", states={_shape(self.states)}"
        return f"Output(hidden={_shape(self.hidden)}, trace={self.trace!r}{states})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """Raises an error that helps: torch calls this if an output is passed to a function for tensors."""
        del types, args, kwargs
        raise ValueError(
            f"{func.__name__} expected a tensor, got the Output of a looped block. Pass its state: looped(x).hidden."
        )


def _shape(tensor: object) -> str:
    """Shape and dtype, and the device if that is not the CPU."""
    if not isinstance(tensor, Tensor):
        return repr(tensor)
    device = "" if tensor.device.type == "cpu" else f" on {tensor.device}"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{device}"


def _depths(live: Tensor) -> tuple[str, str]:
    """The number of tokens, their mean depth, and the share of them that ran each iteration."""
    try:
        ran = live.flatten(0, -2).sum(0).tolist()
    except RuntimeError:
        return "tokens", ""  # no data: on the meta device, in fake tensors, under vmap
    if not (tokens := ran[0]):
        return "0 tokens", ""
    shares = [f"{count / tokens:.2f}" for count in ran]
    if len(shares) > SHOWN:
        shares[SHOWN - 2 : -1] = ["..."]
    return f"{tokens} tokens", f", mean depth {sum(ran) / tokens:.2f}, live {', '.join(shares)}"
