"""Updates make the next iteration's input of the tokens that continue.

An update reads the last input x, the state h that the block made from it, the loop's start, and all scores so far,
the newest last. It runs only between iterations: what must also happen before the first or after the last belongs in
the block. Below, s is the newest score.
"""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import nn

from ._called import Called
from ._given import unfit
from ._references import referring
from ._types import Hidden, ScoreHistory
from ._vocabulary import expected_embedding


class Update(Called, nn.Module, ABC):
    """Makes the next input of a token.

    `scales` is True if the update multiplies by a score. Such an update trains a gate through the task's loss, and
    cannot be combined with an exit criterion. `reads_step` is False if the update reads neither `step` nor the number
    of scores, and if additional scores of 1 before the others do not change its result: `adadepth.serving` then
    calls it once for tokens at several iterations.
    """

    scales: bool = False
    reads_step: bool = True

    @abstractmethod
    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """The next input.

        Arguments:
            x: `(..., dim)`, the input of iteration `step`.
            h: `(..., dim)`, the state after it.
            start: `(..., dim)`, the argument `start=` of the call, or else the loop's first input.
            scores: `(..., step + 1)`, all scores so far, the newest last, in the dtype of `x`; 1 without
                a gate.
            step: an int from 0 to steps - 2; there is no update after the last iteration.

        Returns: `(..., dim)`.
        """


@final
class Replace(Update):
    """The next input is the state: `h`. The score only decides exits; a gate learns from a loss on `trace.scores`.

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
    """Adds the state, scaled by the newest score: `x + s·h`. The task's loss trains the gate.

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
    """Interpolates from the input to the state by the newest score: `x + s·(h - x)`. The task's loss trains the gate.

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
    """Adds the loop's start to the state: `start + h`, so that every iteration reads the input.

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
    """Adds the embedding of the prediction, scaled by the newest score: `x + scale·s·softmax(h Wᵀ + b) E`.

    It never holds a (tokens × vocabulary) matrix. The task's loss trains the gate.

    Shapes: `(..., dim)` to the same.
    Arguments: `embedding`, with the weight E `(vocabulary, dim)`; `head`, with W and b. Tied weights are allowed.
    Both belong to the model: they are referred to, not registered. If the model's are replaced, assign the new
    ones here. `scale`: for models that multiply E by √dim. `logit_scale` and `softcap`: for models that multiply
    their logits or bound them, `softcap · tanh(logit_scale · logit / softcap)`.
    Raises: `ValueError` if they are not an `nn.Embedding` and an `nn.Linear` with weights of the same shape, or if `h`
    has another width.
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
        if h.shape[-1] != (dim := self.embedding.weight.shape[1]):
            raise ValueError(
                f"Ponder expected h of shape (..., {dim}), the width of its embedding, got {tuple(h.shape)}. The "
                "block's state must have the width of the embedding."
            )
        mixed = expected_embedding(h, self.head, self.embedding, self.logit_scale, self.softcap).to(x.dtype)
        return torch.addcmul(x, scores[..., -1:], mixed, value=self.scale)

    def _check(self) -> None:
        """Runs at every call, because both may have been reassigned."""
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
    """Calls `update` with running products of the scores: its newest score is the product of all scores so far.

    So each score also gets the gradient of all later iterations. A token whose update has little effect now, because
    it waits for other tokens, is then not trained to exit.

    Shapes: those of `update`.
    Raises: `ValueError` if `update` is not an `Update`.
    """

    def __init__(self, update: Update) -> None:
        _check_update("SurvivalScaled", update)
        super().__init__()
        self.update, self.scales, self.reads_step = update, update.scales, update.reads_step

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """`update` with the running products in place of the scores."""
        return self.update(x, h, start, scores.cumprod(-1), step)


@final
class Ungated(Update):
    """Calls `update` with 1 for every score: for exit criteria and regressed scores, which must not scale.

    Shapes: those of `update`.
    Raises: `ValueError` if `update` is not an `Update`.
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
    """Multiplies the change of `update` by a learned scale that starts at 0: `x + alpha·(update(...) - x)`.

    At the start, every iteration of the loop gets the same input, so the loop gives the result of one pass through
    its block. In this way a retrofit starts with the outputs of its base model. alpha has a gradient from the first
    training step on. `update` and the gate have one as soon as alpha is not 0.

    Shapes: those of `update`. alpha has shape `(1,)`, because wrappers that shard parameters refuse scalars.
    Raises: `ValueError` if `update` is not an `Update`.
    Source: Bachlechner et al. 2020, arXiv 2003.04887, equation 1.
    """

    def __init__(self, update: Update) -> None:
        _check_update("ReZero", update)
        super().__init__()
        self.update, self.scales, self.reads_step = update, update.scales, update.reads_step
        self.alpha = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set alpha to 0, also after the meta device."""
        nn.init.zeros_(self.alpha)

    def forward(self, x: Hidden, h: Hidden, start: Hidden, scores: ScoreHistory, step: int) -> Hidden:
        """Interpolates by alpha from `x` to the result of `update`."""
        new = self.update(x, h, start, scores, step).to(x.dtype)
        return torch.lerp(x, new, self.alpha.to(x.dtype))


def _check_update(owner: str, update: object) -> None:
    """Check an update that another one wraps."""
    if not isinstance(update, Update):
        raise unfit(f"{owner} expected update to be an adadepth.Update", update, f"Wrap one: {owner}(Interpolate()).")
