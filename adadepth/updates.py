"""Updates make the next iteration's input of the tokens that go on.

An update reads the last input x, the state h that the block made of it, the loop's start and all
scores so far, newest last. It runs only between iterations: what must also hold at the first or the
last belongs in the block. s below is the newest score.
"""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import nn

from ._called import Called
from ._given import unfit
from ._types import Hidden, ScoreHistory
from ._vocabulary import expected_embedding, referring


class Update(Called, nn.Module, ABC):
    """The next input of a token.

    `scales` says whether a score multiplies something in it: an update that scales trains a gate by itself, and
    takes no exit criterion for a gate. `reads_step` is False for updates that read neither `step` nor how many scores
    there are, and give the same with scores of 1 before the others: `adadepth.serving` then asks them once for tokens
    of several iterations.
    """

    scales: bool = False
    reads_step: bool = True

    @abstractmethod
    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """The next input.

        Arguments:
            x: `(..., dim)`, the input of iteration `step`.
            h: `(..., dim)`, the state after it.
            start: `(..., dim)`, the loop's `start=`, or its first input.
            scores: `(..., step + 1)`, all scores so far, newest last, in the dtype of `x`; 1 without
                a gate.
            step: an int from 0 to steps - 2: nothing follows the last iteration.

        Returns: `(..., dim)`.
        """


@final
class Replace(Update):
    """The state itself: `h`. The score only cuts; a gate learns from a loss on `trace.scores`.

    Shapes: `(..., dim)` to the same.
    Source: Universal Transformers, Dehghani et al. 2018, arXiv 1807.03819, section 2.1.
    """

    reads_step = False

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """`h`."""
        del x, start, scores, step
        return h


@final
class Residual(Update):
    """The state added to the input, scaled by the newest score: `x + s·h`. Trains a gate by itself.

    Shapes: `(..., dim)` to the same.
    """

    scales = True
    reads_step = False

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """`x + s·h`."""
        del start, step
        return torch.addcmul(x, scores[..., -1:], h)


@final
class Interpolate(Update):
    """From the input to the state by the newest score: `x + s·(h - x)`. Trains a gate by itself.

    Shapes: `(..., dim)` to the same. At s = 1 it is `h` exactly.
    """

    scales = True
    reads_step = False

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

    reads_step = False

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """`start + h`."""
        del x, scores, step
        return start + h


@final
class Ponder(Update):
    """The input, and by the newest score the embedding of what is predicted: `x + scale·s·softmax(h Wᵀ + b) E`.

    It never holds a (tokens × vocabulary) matrix. Trains a gate by itself.

    Shapes: `(..., dim)` to the same.
    Arguments: `embedding`, of E `(vocabulary, dim)`, and `head`, of W and b; tied weights are as good.
    They are the model's: referred to, not registered, and to be reassigned here when the model's are
    replaced. `scale`: some models multiply E by √dim. `logit_scale` and `softcap`: some multiply their logits, or
    bound them, `softcap · tanh(logit_scale · logit / softcap)`.
    Raises: `ValueError` if they are not an `nn.Embedding` and an `nn.Linear` with weights of one shape.
    Source: PonderLM, Zeng et al. 2025, arXiv 2505.20674; scaled by s: AdaPonderLM, arXiv 2603.01914.
    """

    scales = True
    reads_step = False
    embedding: nn.Embedding
    head: nn.Linear
    __setattr__ = referring("embedding", "head")

    def __init__(
        self,
        embedding: nn.Embedding,
        head: nn.Linear,
        scale: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.embedding, self.head, self.scale = embedding, head, scale
        self.logit_scale, self.softcap = logit_scale, softcap
        self._check()

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """`x + scale·s·softmax(head(h)) E`."""
        del start, step
        self._check()
        mixed = expected_embedding(h, self.head, self.embedding, self.logit_scale, self.softcap).to(x.dtype)
        return torch.addcmul(x, scores[..., -1:], mixed, value=self.scale)

    def _check(self) -> None:
        """At every call: both may have been reassigned."""
        embedding, head = self.embedding, self.head
        if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
            raise ValueError(
                f"Ponder expected an nn.Embedding and an nn.Linear, whose weights it reads, got "
                f"embedding={type(embedding).__name__} and head={type(head).__name__}. Give it the linear map itself; "
                "a norm before it belongs in the block."
            )
        if embedding.weight.shape != head.weight.shape:
            raise ValueError(
                f"Ponder expected embedding.weight and head.weight of one shape (vocabulary, dim), got "
                f"{tuple(embedding.weight.shape)} and {tuple(head.weight.shape)}. Resize both and reassign "
                "ponder.embedding and ponder.head."
            )


@final
class SurvivalScaled(Update):
    """Another update, given the product of all scores so far as the newest score.

    Every earlier gate then gets the gradient of all later iterations: a token whose update is
    worth little now, because it waits for others, is not taught to leave.

    Shapes: those of `update`.
    Raises: `ValueError` if `update` is no `Update`.
    """

    def __init__(self, update: Update) -> None:
        _check_update("SurvivalScaled", update)
        super().__init__()
        self.update, self.scales, self.reads_step = update, update.scales, update.reads_step

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """`update` with the running product in place of the scores."""
        return self.update(x, h, start, scores.cumprod(-1), step)


@final
class Ungated(Update):
    """Another update, given 1 for every score: for exit criteria and regressed scores, which must not scale.

    Shapes: those of `update`.
    Raises: `ValueError` if `update` is no `Update`.
    """

    def __init__(self, update: Update) -> None:
        _check_update("Ungated", update)
        super().__init__()
        self.update, self.reads_step = update, update.reads_step

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """`update` at full scale."""
        return self.update(x, h, start, torch.ones_like(scores), step)


@final
class ReZero(Update):
    """Another update behind a learned scale that is 0 at first: `x + alpha·(update(...) - x)`.

    A fresh loop then gives every iteration the same input, and so what its block gives once: a retrofit
    begins as the model that it is made from. alpha has a gradient from the first step on, what is behind
    it (the gate too) as soon as alpha is not 0.

    Shapes: those of `update`. alpha has shape `(1,)`: wrappers that shard parameters refuse scalars.
    Raises: `ValueError` if `update` is no `Update`.
    Source: Bachlechner et al. 2020, arXiv 2003.04887, equation 1.
    """

    def __init__(self, update: Update) -> None:
        _check_update("ReZero", update)
        super().__init__()
        self.update, self.scales, self.reads_step = update, update.scales, update.reads_step
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """From `x` to what `update` says by alpha."""
        new = self.update(x, h, start, scores, step).to(x.dtype)
        return torch.lerp(x, new, self.alpha.to(x.dtype))


def _check_update(owner: str, update: object) -> None:
    """An update inside another one."""
    if not isinstance(update, Update):
        raise unfit(f"{owner} expected update to be an adadepth.Update", update, f"Wrap one: {owner}(Interpolate()).")
