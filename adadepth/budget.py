"""`DepthBudget`: a loss that holds the mean depth while a gate is trained."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .loop.trace import Trace
from .losses import expected_depth

# No more than so many iterations count for the multiplier: it would wind up while a deep start comes down.
_FAR = 0.5


@final
class DepthBudget(nn.Module):
    """A loss that holds the mean depth at `mean_depth`, from above and from below: `loss = task + budget(out.trace)`.

    The loss is `price · over`, where `over` is `depth - mean_depth`. `depth` is the expected depth of soft exits, or
    the mean depth of hard ones. The price adapts: `price = multiplier + damping · over`, and every call in training
    mode adds `gain · over` to the buffer `multiplier`, with `over` limited to half an iteration. A negative price
    makes tokens run deeper.

    With soft exits, the gradient is that of the expected depth. Hard exits have no gradient. The loss then takes, for
    each token, the sum of the running products of its scores, up to and including the score at its exit.

    It holds the mean over the batch, not the depth of each token. It has no effect on a rule that does not read the
    score, and cannot reach a depth that `min_depth`, `max_depth` or such a rule excludes. If hard exits depend on
    scores near 0 (`Threshold(1e-4)`), its gradient is nearly 0: use a threshold from 0.05 up. With gradient
    accumulation, every call counts as a step: divide `gain`, and the loss, by the number of
    micro-batches. A depth that is not a number, as after an overflow, does not change the multiplier.

    On many ranks, each has its own price, unless you gather the trace: `budget(Trace(*map(ranks.gather, trace)))`.
    Inside a module that `DistributedDataParallel` wraps, gather it: DDP copies the buffers of rank 0 to the others
    before each pass, so the price would follow the rows of rank 0 alone.

    Shapes: the loss is `()`; 0 where no token is real.
    Unit: depth in iterations; price, `multiplier` and `limit` in nats per iteration, or the unit of your loss.
    Arguments: `mean_depth`, in iterations, from 1; `gain`, per step of training; `damping`, the share of the
    price that follows the depth at once, against swings; `limit`, the largest price, positive or negative.
    Raises: `ValueError` if `mean_depth < 1` or is more than the iterations of the trace, `damping < 0`, `gain` or
    `limit` is not positive, or the scores have no gradient in training.
    Source: a Lagrange multiplier with integral and proportional terms: Stooke et al. 2020, arXiv 2007.03964; the
    expected depth: PonderNet, Banino et al. 2021, arXiv 2107.05407.
    """

    multiplier: Tensor

    def __init__(self, mean_depth: float, gain: float = 0.01, damping: float = 0.3, limit: float = 5.0) -> None:
        super().__init__()
        if not mean_depth >= 1:
            raise ValueError(f"DepthBudget expected mean_depth of at least 1 iteration, got {mean_depth}.")
        if not (gain > 0 and damping >= 0 and limit > 0):
            raise ValueError(
                f"DepthBudget expected gain > 0, damping >= 0 and limit > 0, got gain={gain}, damping={damping}, "
                f"limit={limit}."
            )
        self.mean_depth, self.gain, self.damping, self.limit = mean_depth, gain, damping, limit
        self.register_buffer("multiplier", torch.zeros(()))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"mean_depth={self.mean_depth}, gain={self.gain}, damping={self.damping}, limit={self.limit}"

    def forward(self, trace: Trace) -> Float[Tensor, ""]:
        """The loss; in training mode with gradients it also adapts the multiplier."""
        learns = self.training and torch.is_grad_enabled()
        depth = expected_depth(trace)
        acted_on = depth if depth.requires_grad else _score_depth(trace)
        self._check(trace, learns and not acted_on.requires_grad)
        over = torch.where(trace.live.any(), depth.detach() - self.mean_depth, 0)
        if learns:  # a buffer that was cast with the model, to bfloat16 say, is float32 again from here on
            grown = self.multiplier.to(over) + self.gain * over.nan_to_num(0.0).clamp(-_FAR, _FAR)
            self.multiplier = grown.clamp(-self.limit, self.limit)
        price = (self.multiplier.to(over) + self.damping * over).clamp(-self.limit, self.limit)
        return price * (acted_on - acted_on.detach() + over)

    def _check(self, trace: Trace, fixed: bool) -> None:
        steps = trace.live.shape[-1]
        if self.mean_depth > steps:
            raise ValueError(
                f"DepthBudget(mean_depth={self.mean_depth}) expected a loop of at least as many iterations, got a "
                f"trace of {steps}. Choose a smaller mean_depth, or do not call the budget in passes with a lower "
                "max_depth."
            )
        if fixed and trace.scores.numel():
            raise ValueError(
                "DepthBudget expected scores with a gradient, got none. Give the loop a learned gate and train it; an "
                "exit criterion needs calibrate instead."
            )


def _score_depth(trace: Trace) -> Tensor:
    """The mean of each token's running products of scores: the expected depth, less one, of the iterations that ran."""
    scored = trace.live[..., :-1]
    products = torch.where(scored, trace.scores, 0).cumprod(-1)
    return products.sum() / trace.live[..., 0].sum().clamp_min(1)
