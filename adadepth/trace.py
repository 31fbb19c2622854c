"""What a looped block did: who ran, what the gate said, and where each token left."""

from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ._types import HiddenRows, MaskRows, ScoreHistoryRows, StateRows, WeightRows
from .tokens import TokenSet


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


@final
class Recorder:
    """What the loop has seen so far; one for each forward pass.

    `x` are the rows that the loop starts from; `scored` says whether a gate scores them (without
    one every score is 1), `states` whether to keep every iteration's state.
    """

    def __init__(self, x: HiddenRows, tokens: TokenSet, steps: int, *, scored: bool, states: bool) -> None:
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.one = x.new_ones(())
        self._x, self._steps, self._has_scores = x, steps, scored
        self._live: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._exits: list[Tensor | None] = []
        self._hidden: Tensor | None = None
        self._states: list[Tensor] | None = [] if states else None

    def ran(self, tokens: TokenSet, h: Tensor) -> None:
        """An iteration ran for `tokens` and gave the state `h`."""
        self._live.append(tokens.live)
        self._exits.append(None)
        if self._states is not None:
            before = self._states[-1] if self._states else torch.zeros_like(self._x)
            self._states.append(tokens.over(before, h))

    def scored(self, rows: WeightRows) -> None:
        """A gate scored the tokens that ran; 0 elsewhere."""
        self._scores.append(rows.to(self.dtype))

    def left(self, tokens: TokenSet, weight: WeightRows, h: Tensor) -> None:
        """`weight` of each token left with the state `h` after the newest iteration."""
        self._exits[-1] = weight
        if self._hidden is None and len(self._live) == self._steps:
            self._hidden = tokens.rows(h)  # all of everyone
        else:
            rows = torch.zeros_like(self._x) if self._hidden is None else self._hidden
            self._hidden = tokens.add(rows, weight.to(h.dtype), h)

    @property
    def history(self) -> ScoreHistoryRows:
        """All scores so far, `(batch, seq, iterations)`, newest last; 0 where not live."""
        return torch.stack(self._scores if self._has_scores else [live.to(self.dtype) for live in self._live], -1)

    def output(self) -> Output:
        """The result; iterations that nobody ran are filled in."""
        none = self._x.new_zeros(self._x.shape[:2], dtype=self.dtype)
        live = _stack(self._live, self._steps, none.bool())
        scores = _stack(self._scores, self._steps - 1, none) if self._has_scores else live[..., :-1].to(self.dtype)
        exits = _stack([none if weight is None else weight for weight in self._exits], self._steps, none)
        hidden = torch.zeros_like(self._x) if self._hidden is None else self._hidden
        return Output(hidden, Trace(live, scores, exits), self._every_state())

    def _every_state(self) -> StateRows | None:
        if self._states is None:
            return None
        last = self._states[-1] if self._states else torch.zeros_like(self._x)
        return torch.stack([*self._states, *[last] * (self._steps - len(self._states))], 2)


def _stack(parts: list[Tensor], length: int, filler: MaskRows | WeightRows) -> Tensor:
    parts = parts + [filler] * (length - len(parts))
    return torch.stack(parts, -1) if parts else filler.new_zeros(*filler.shape, 0)
