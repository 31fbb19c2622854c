"""Updates make the next iteration's input of the tokens that go on.

An update reads the last input x, the state h that the block made of it, the loop's start and all
scores so far, newest last. It runs only between iterations: what must also hold at the first or the
last belongs in the block. s below is the newest score.
"""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import nn

from ._types import Hidden, ScoreHistory


class Update(nn.Module, ABC):
    """The next input of a token."""

    @abstractmethod
    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """The next input.

        Arguments:
            x: `(..., dim)`, the input of iteration `step`.
            h: `(..., dim)`, the state after it.
            start: `(..., dim)`, the loop's `start=`, or its first input.
            scores: `(..., step + 1)`, all scores so far, newest last, in the dtype of `x`; 1 without
                a gate.
            step: an int from 0.

        Returns: `(..., dim)`.
        """


@final
class Replace(Update):
    """The state itself: `h`. The score only cuts; a gate learns from a loss on `trace.scores`.

    Shapes: `(..., dim)` to the same.
    Source: Universal Transformers, Dehghani et al. 2018, arXiv 1807.03819, section 2.1.
    """

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """`h`."""
        del x, start, scores, step
        return h


@final
class Residual(Update):
    """The state added to the input, scaled by the newest score: `x + s·h`. Trains a gate by itself.

    Shapes: `(..., dim)` to the same.
    """

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """`x + s·h`."""
        del start, step
        return torch.addcmul(x, scores[..., -1:], h)


@final
class Interpolate(Update):
    """From the input to the state by the newest score: `x + s·(h - x)`. Trains a gate by itself.

    Shapes: `(..., dim)` to the same. At s = 1 it is `h` exactly.
    """

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """`lerp(x, h, s)`."""
        del start, step
        return torch.lerp(x, h, scores[..., -1:])


@final
class InputInjection(Update):
    """The loop's start added to the state: `start + h`, so that no iteration forgets the input.

    Shapes: `(..., dim)` to the same.
    Source: Yang et al. 2023, arXiv 2311.12424 (looped transformers), section 4.
    """

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """`start + h`."""
        del x, scores, step
        return start + h


@final
class SurvivalScaled(Update):
    """Another update, given the product of all scores so far as the newest score.

    Every earlier gate then gets the gradient of all later iterations: a token whose update is
    worth little now, because it waits for others, is not taught to leave.

    Shapes: those of `update`.
    """

    def __init__(self, update: Update) -> None:
        super().__init__()
        self.update = update

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """`update` with the running product in place of the scores."""
        return self.update(x, h, start, scores.cumprod(-1), step)  # type: ignore[no-any-return]


@final
class Ungated(Update):
    """Another update, given 1 for every score: for exit criteria and regressed scores, which must not scale.

    Shapes: those of `update`.
    """

    def __init__(self, update: Update) -> None:
        super().__init__()
        self.update = update

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """`update` at full scale."""
        return self.update(x, h, start, torch.ones_like(scores), step)  # type: ignore[no-any-return]
