"""Gates score how much a token should continue.

A gate reads the state after an iteration, the state before it and the number of the iteration. It gives one score
for each token, from this token alone. Learned gates end in a sigmoid and start with high scores, because an exited
token gives no gradient that could raise its score again. Their last linear map and the sigmoid are computed in
float32 or wider, also under autocast: in bfloat16 a sigmoid is exactly 1 from a logit of 6.3 on, without gradient.

Gates have no access to masks and caches. Each keeps its arguments under their own names; `adadepth.hf` reads them
there to save it.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._called import Called
from ._modes import without_autocast
from ._types import Hidden, Score


class Gate(Called, nn.Module, ABC):
    """Gives one score for each token: how much it should continue.

    `measures` is True for exit criteria. Their score is a measurement, so no update may multiply by it. `reads_step`
    is False for gates that do not read `step`: `adadepth.serving` then calls them once for tokens at several
    iterations.
    """

    measures: ClassVar[bool] = False
    reads_step: ClassVar[bool] = True

    @abstractmethod
    def forward(self, h: Hidden, previous: Hidden, step: int) -> Score:
        """The score.

        Arguments:
            h: `(..., dim)`, the state after iteration `step`.
            previous: `(..., dim)`, the state before it; at step 0 the loop's first input.
            step: an int from 0.

        Returns: `(...)`, any real number; for learned gates, the chance in (0, 1) that the token continues.
        """


@final
class Logit(nn.Linear):
    """The last linear map of a gate, in float32 or wider, whatever the dtype of its parameters and of autocast.

    Its bias starts at `open_at`, also where weights are made by `reset_parameters`, as after the meta device.
    """

    def __init__(self, dim: int, open_at: float) -> None:
        self.open_at = open_at
        super().__init__(dim, 1)

    def reset_parameters(self) -> None:
        """Initialise the weights anew."""
        super().reset_parameters()
        nn.init.constant_(self.bias, self.open_at)

    def forward(self, input: Tensor) -> Tensor:
        """The logits."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        with without_autocast(input.device.type):
            if input.dtype == self.weight.dtype == dtype:
                return F.linear(input, self.weight, self.bias)
            return F.linear(input.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


@final
class LinearGate(Gate):
    """One linear map for all iterations: `score = sigmoid(w . h + b)`.

    Shapes: `h (..., dim)` to `score (...)`, float32 or wider; any leading shape, each token by itself.
    Unit: the chance, in (0, 1), that a token continues. The halting probability of ACT is `1 - score`.
    Arguments: `dim`, the width of the block's state; `bias`, the initial value of `b` (with 3.0, a
    state of zeros gets a score of 0.95).
    Raises: `ValueError` if `dim < 1` or the last axis of `h` is not `dim`.
    Source: Graves 2016, arXiv 1603.08983, section 2, equation 5.
    """

    reads_step = False

    def __init__(self, dim: int, bias: float = 3.0) -> None:
        super().__init__()
        _at_least_one("LinearGate", dim=dim)
        self.dim, self.bias = dim, bias
        self.proj = Logit(dim, bias)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"dim={self.dim}, bias={self.bias}"

    def forward(self, h: Hidden, previous: Hidden, step: int) -> Score:
        """The score; the same map at every iteration."""
        del previous, step
        _check_width("LinearGate", self.dim, h)
        return _chance(self.proj, h)


@final
class SharedMLPGate(Gate):
    """One two-layer MLP for all iterations: `score = sigmoid(W2 gelu(W1 h + b1) + b2)`.

    Shapes: `h (..., dim)` to `score (...)`, float32 or wider; any leading shape, each token by itself.
    Arguments: `dim`, the width of the block's state; `hidden`, the width of the hidden layer, None for 4·dim;
    `bias`, the initial value of `b2`.
    Raises: `ValueError` if `dim` or `hidden` is below 1 or the last axis of `h` is not `dim`.
    Source: the "shared gate" ablation of AdaPonderLM, arXiv 2603.01914.
    """

    reads_step = False

    def __init__(self, dim: int, hidden: int | None = None, bias: float = 3.0) -> None:
        super().__init__()
        self.dim, self.hidden, self.bias = dim, hidden, bias
        self.mlp = _mlp("SharedMLPGate", dim, hidden, bias)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"dim={self.dim}, hidden={self.hidden}, bias={self.bias}"

    def forward(self, h: Hidden, previous: Hidden, step: int) -> Score:
        """The score; the same MLP at every iteration."""
        del previous, step
        return _apply("SharedMLPGate", self.mlp, h)


@final
class PerIterationMLPGate(Gate):
    """A separate two-layer MLP for each iteration but the last, which is not scored.

    Shapes: `h (..., dim)` to `score (...)`, float32 or wider; any leading shape, each token by itself.
    Arguments: `dim`, the width of the block's state; `steps`, the steps of the loop (the gate holds
    `steps - 1` MLPs); `hidden`, the width of the hidden layer, None for the paper's 4·dim, which costs a third of
    a one-layer block (16 was as good in small models); `bias`, the initial bias of the last layer.
    Raises: `ValueError` if a size is below 1, the last axis of `h` is not `dim`, or `step` is not
    one of the first `steps - 1`.
    Source: AdaPonderLM, arXiv 2603.01914: s^i = sigmoid(MLP_i(h^i)).
    """

    def __init__(self, dim: int, steps: int, hidden: int | None = None, bias: float = 3.0) -> None:
        super().__init__()
        _at_least_one("PerIterationMLPGate", dim=dim, steps=steps)
        self.dim, self.steps, self.hidden, self.bias = dim, steps, hidden, bias
        self.mlps = nn.ModuleList(_mlp("PerIterationMLPGate", dim, hidden, bias) for _ in range(steps - 1))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"dim={self.dim}, steps={self.steps}, hidden={self.hidden}, bias={self.bias}"

    def forward(self, h: Hidden, previous: Hidden, step: int) -> Score:
        """The score by the MLP of iteration `step`."""
        del previous
        if not 0 <= step < len(self.mlps):
            raise ValueError(
                f"PerIterationMLPGate(steps={len(self.mlps) + 1}) expected a step from 0 to {len(self.mlps) - 1}, got "
                f"{step}. Give the gate the steps of its RecurrentWrapper."
            )
        return _apply("PerIterationMLPGate", self.mlps[step], h)


def _mlp(owner: str, dim: int, hidden: int | None, bias: float) -> nn.Sequential:
    hidden = 4 * dim if hidden is None else hidden
    _at_least_one(owner, dim=dim, hidden=hidden)
    last = Logit(hidden, bias)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), last)


def _apply(owner: str, mlp: nn.Module, h: Tensor) -> Tensor:
    _check_width(owner, mlp[0].in_features, h)  # type: ignore[index]
    return _chance(mlp, h)


def _chance(logit: nn.Module, h: Tensor) -> Tensor:
    return logit(h).sigmoid().squeeze(-1)


def _at_least_one(owner: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{owner} needs {name} >= 1, got {name}={size}.")


def _check_width(owner: str, dim: int, h: Tensor) -> None:
    if h.shape[-1] != dim:
        raise ValueError(
            f"{owner}(dim={dim}) expected h of shape (..., {dim}), got {tuple(h.shape)}. dim must be the width of the "
            "block's state."
        )
