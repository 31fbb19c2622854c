"""Exit criteria: gates without parameters. They measure how far a token still is from its answer.

As for every gate, a higher score means that the token should continue. With `Threshold(tau)`, a token continues
while its measure is at least `tau`. A criterion gives no gradient, and its score must not scale an update: give the
loop an update that does not use the score, `Replace()` or `Ungated(...)`.

A criterion that reads predictions takes the model's head: any module that maps `(n, dim)` to logits
`(n, vocabulary)`. This is an `nn.Linear`, or `nn.Sequential(norm, lm_head)` if the norm is outside the loop. The
criterion refers to the head without registering it, so only the model saves, moves and trains the head. If the
model's head is replaced, assign the new one to `gate.head`. Logits are never held for all tokens at once.
"""

from typing import final

import torch
from torch import Tensor, nn

from ._references import referring
from ._types import Hidden, Score
from ._vocabulary import described, score_predictions
from .gates import Gate


@final
class ConvergenceGate(Gate):
    """How much the last iteration changed the state: `‖h - previous‖ / ‖previous‖`.

    Shapes: `h (..., dim)` to `score (...)`, float32 or wider, without gradient.
    Unit: a relative change, from 0. If the norm of `previous` is below the dtype's epsilon, epsilon is used.
    Source: the latent difference of Geiping et al. 2025, arXiv 2502.05171; hidden-state saturation in
    Schuster et al. 2022 (CALM), arXiv 2207.07061, is the cosine instead.
    """

    measures = True
    reads_step = False

    @torch.no_grad()
    def forward(self, h: Hidden, previous: Hidden, step: int) -> Score:
        """The relative change."""
        del step
        dtype = torch.promote_types(h.dtype, torch.float32)
        h, previous = h.to(dtype), previous.to(dtype)
        before = torch.linalg.vector_norm(previous, dim=-1).clamp_min(torch.finfo(dtype).eps)
        return torch.linalg.vector_norm(h - previous, dim=-1) / before


class _ReadsPredictions(Gate):
    """A gate that reads predictions, by a head to which it refers."""

    measures = True
    reads_step = False
    head: nn.Module
    __setattr__ = referring("head")

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def extra_repr(self) -> str:
        """The head, which is not registered."""
        return f"head={described(self.head)}"


@final
class KLGate(_ReadsPredictions):
    """How much the last iteration changed the prediction: `KL(p_previous ‖ p)`.

    Shapes: `h (..., dim)` to `score (...)`, float32 or wider, without gradient.
    Unit: nats, from 0. At step 0 the previous prediction is that of the loop's input.
    Arguments: `head`, referred to, not registered.
    Raises: `ValueError` if `head` does not map `(n, dim)` to `(n, vocabulary)`.
    Source: Geiping et al. 2025, arXiv 2502.05171, zero-shot adaptive compute.
    """

    def forward(self, h: Hidden, previous: Hidden, step: int) -> Score:
        """The divergence of the new prediction from the one before."""
        del step
        return score_predictions("KLGate", _divergence, self.head, previous, h)


@final
class MaxProbGate(_ReadsPredictions):
    """How uncertain the prediction is: `1 - p1`, where p1 is the highest probability.

    Shapes: `h (..., dim)` to `score (...)`, float32 or wider, without gradient.
    Unit: a probability, in [0, 1).
    Arguments: `head`, referred to, not registered.
    Raises: `ValueError` if `head` does not map `(n, dim)` to `(n, vocabulary)`.
    Source: Schwartz et al. 2020, arXiv 2004.07453 (confidence as the largest softmax probability).
    """

    def forward(self, h: Hidden, previous: Hidden, step: int) -> Score:
        """1 minus the highest probability."""
        del previous, step
        return score_predictions("MaxProbGate", _doubt, self.head, h)


@final
class MarginGate(_ReadsPredictions):
    """How close the two highest probabilities are: `1 - (p1 - p2)`.

    Shapes: `h (..., dim)` to `score (...)`, float32 or wider, without gradient.
    Unit: from 0 (certain) to 1 (a tie).
    Arguments: `head`, for a vocabulary of at least 2; referred to, not registered.
    Raises: `ValueError` if `head` does not map `(n, dim)` to `(n, vocabulary)`.
    Source: the softmax response of Schuster et al. 2022 (CALM), arXiv 2207.07061.
    """

    def forward(self, h: Hidden, previous: Hidden, step: int) -> Score:
        """1 minus the margin."""
        del previous, step
        return score_predictions("MarginGate", _closeness, self.head, h)


@final
class EntropyGate(_ReadsPredictions):
    """The entropy of the prediction: `-Σ p log p`.

    Shapes: `h (..., dim)` to `score (...)`, float32 or wider, without gradient.
    Unit: nats, from 0 to log(vocabulary).
    Arguments: `head`, referred to, not registered.
    Raises: `ValueError` if `head` does not map `(n, dim)` to `(n, vocabulary)`.
    Source: Teerapittayanon et al. 2016 (BranchyNet), arXiv 1709.01686.
    """

    def forward(self, h: Hidden, previous: Hidden, step: int) -> Score:
        """The entropy."""
        del previous, step
        return score_predictions("EntropyGate", _entropy, self.head, h)


# Each takes log-probabilities (n, vocabulary). A word with a logit of -inf is impossible and adds nothing.


def _divergence(before: Tensor, now: Tensor) -> Tensor:
    p = before.exp()
    # If the prediction did not change, rounding can make the sum negative.
    return torch.where(p > 0, p * (before - now), 0).sum(-1).clamp_min(0)


def _doubt(now: Tensor) -> Tensor:
    return 1 - now.amax(-1).exp()


def _closeness(now: Tensor) -> Tensor:
    first, second = now.topk(2, dim=-1).values.exp().unbind(-1)
    return 1 - (first - second)


def _entropy(now: Tensor) -> Tensor:
    return torch.special.entr(now.exp()).sum(-1)
