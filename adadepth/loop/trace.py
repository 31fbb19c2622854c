"""What a looped block did: who ran, what the gate said, and where each token left."""

from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._types import HiddenRows, StateRows


@final
class Trace(NamedTuple):
    """The record of one forward pass. Every row tensor is 0 (or False) at padding.

    Shapes:
        live: `(batch, seq, steps)` bool, iteration i ran for the token; never rises along `steps`,
            and `live[..., 0]` is the mask.
        scores: `(batch, seq, steps - 1)`, what the gate said of every live token, also of one that
            leaves there; 0 where not live. The last iteration has no score: nothing follows it.
        exit_probs: `(batch, seq, steps)`, the weight that left after each iteration; sums to 1 over
            `steps` for a real token.
    """

    live: Bool[Tensor, "batch seq steps"]
    scores: Float[Tensor, "batch seq gated"]
    exit_probs: Float[Tensor, "batch seq steps"]

    @property
    def depth(self) -> Int[Tensor, "batch seq"]:
        """Iterations run, `(batch, seq)` int64: from 1 to steps for a real token, 0 at padding."""
        return self.live.sum(-1)

    @property
    def gates(self) -> Float[Tensor, "batch seq gated"]:
        """The scores of the tokens that go on, else 0: the effective gate values m·s."""
        return torch.where(self.live[..., 1:], self.scores, 0.0)

    @property
    def survival(self) -> Float[Tensor, "batch seq gated"]:
        """The running product of the scores of the tokens that go on, else 0."""
        return self.gates.cumprod(-1)


@final
class Output(NamedTuple):
    """What a looped block returns.

    Shapes:
        hidden: `(batch, seq, dim)`, the exit-weighted sum of the states; for hard exits the state
            at exit; 0 for padding.
        trace: the record of the pass.
        states: `(batch, seq, steps, dim)` on request, else None: every iteration's state. A token
            that left keeps its last; 0 for padding.
    """

    hidden: HiddenRows
    trace: Trace
    states: StateRows | None = None
