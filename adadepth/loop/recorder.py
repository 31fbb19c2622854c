"""The `Recorder`, which collects the results of a pass and makes its output."""

from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from .._types import HiddenRows, MaskRows, ScoreHistoryRows, StateRows, WeightRows
from ..attention.tokens import TokenSet
from .reads import Reads
from .trace import Output, Trace


@final
class Recorder:
    """The results so far; one recorder for each forward pass.

    `x` are the rows that the loop starts from. `scored` says whether there is a gate; without one, every score is 1.
    `states` says whether to keep the state of every iteration.
    """

    def __init__(self, x: HiddenRows, tokens: TokenSet, steps: int, *, scored: bool, states: bool) -> None:
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self._x, self._steps, self._has_scores = x, steps, scored
        self._one = x.new_ones(())
        self.reads = Reads()
        self._live: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._exits: list[Tensor | None] = []
        self._hidden: Tensor | None = None
        self._states: list[Tensor] | None = [] if states else None

    def ran(self, tokens: TokenSet, h: Tensor) -> None:
        """Record that an iteration ran for `tokens` and gave the state `h`."""
        self._live.append(tokens.live)
        self._exits.append(None)
        if self._states is not None:
            before = self._states[-1] if self._states else torch.zeros_like(self._x)
            self._states.append(tokens.over(before, h))

    def scored(self, rows: WeightRows) -> None:
        """Record the gate's scores of the tokens that ran; 0 elsewhere."""
        self._scores.append(rows.to(self.dtype))

    def exited(self, tokens: TokenSet, weight: WeightRows, h: Tensor) -> None:
        """Record that `weight` of each token exited with the state `h` after the newest iteration."""
        self._exits[-1] = weight
        if self._hidden is None and len(self._live) == self._steps:
            self._hidden = tokens.rows(h)  # all weight of all tokens
        else:
            rows = torch.zeros_like(self._x, dtype=self.dtype) if self._hidden is None else self._hidden
            self._hidden = tokens.add(rows, weight, h.to(self.dtype))

    @property
    def history(self) -> ScoreHistoryRows:
        """All scores so far, `(batch, seq, iterations)`, the newest last; 0 for tokens that were not active."""
        return torch.stack(self._scores if self._has_scores else [live.to(self.dtype) for live in self._live], -1)

    def scores(self, tokens: TokenSet, x: Tensor) -> Tensor:
        """The scores so far of the tokens `x (rows, length, dim)`, `(rows, length, iterations)`; 1 without a gate."""
        if self._has_scores:
            return tokens.take(self.history).to(x.dtype)
        return self._one.expand(*x.shape[:2], len(self._live))

    @property
    def hidden(self) -> HiddenRows:
        """The sum of the states so far, weighted by exit weights; it is complete for exited tokens."""
        return torch.zeros_like(self._x) if self._hidden is None else self._hidden.to(self._x.dtype)

    @property
    def depth(self) -> Int[Tensor, "batch seq"]:
        """The iterations that each token has run so far."""
        return torch.stack(self._live).sum(0)

    def output(self) -> Output:
        """The output; iterations that no token ran are filled with zeros, or with the last state.

        Raises: what a waiting check raises.
        """
        self.reads.rest()
        none = self._x.new_zeros(self._x.shape[:2], dtype=self.dtype)
        live = _stack(self._live, self._steps, none.bool())
        scores = _stack(self._scores, self._steps - 1, none) if self._has_scores else live[..., :-1].to(self.dtype)
        exits = _stack([none if weight is None else weight for weight in self._exits], self._steps, none)
        return Output(self.hidden, Trace(live, scores, exits), self._every_state())

    def _every_state(self) -> StateRows | None:
        if self._states is None:
            return None
        last = self._states[-1] if self._states else torch.zeros_like(self._x)
        return torch.stack([*self._states, *[last] * (self._steps - len(self._states))], 2)


def _stack(parts: list[Tensor], length: int, filler: MaskRows | WeightRows) -> Tensor:
    parts = parts + [filler] * (length - len(parts))
    return torch.stack(parts, -1) if parts else filler.new_zeros(*filler.shape, 0)
