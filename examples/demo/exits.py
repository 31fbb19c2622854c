"""Who decides how deep a byte goes: three policies, each begun after the first stage of training.

"survival" and "paper" are gates that learn while the model does. "router" fixes depths by the input: where a byte
stands in its word. It looks once where iterations pay, and stays as it is while the model learns to live with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor, nn

import adadepth as ad

from .model import AdaptiveLM

POLICIES = ("router", "survival", "paper")


class Probed(NamedTuple):
    """Bytes of the training text `(rows, window)`, and what each loses after each iteration, `(…, steps)` in nats."""

    ids: Tensor
    losses: Tensor


class Policy(Protocol):
    """How exits begin, and what going on costs."""

    def begin(self, model: AdaptiveLM, probe: Callable[[], Probed]) -> list[nn.Parameter]:
        """Let bytes leave; returns parameters that are to train slowly."""
        ...

    def cost(self, trace: ad.Trace, thousandth: int) -> Tensor:
        """What is added to the loss, `thousandth` of the second stage into it."""
        ...


def policy(name: str) -> Policy:
    """One of `POLICIES`."""
    return Routed() if name == "router" else Gated(survival=name == "survival")


PENALTY = ad.BottomKPenalty(0.5, warmup=(100, 600))  # over thousandths of the second stage


@final
@dataclass(frozen=True)
class Gated:
    """A gate for each iteration; a byte leaves below `tau`.

    The paper's gates scale the update by their newest score, leave by it and are punished for it; survival gates do
    all three by the product of all scores so far, so that every gate learns what all later iterations are worth.

    Gates that move from the start close before they know anything, and a token that left gives no gradient that could
    bring it back. So they come late, open (`bias`), slow and small, and the penalty grows from nothing.
    """

    survival: bool
    tau: float = 0.3
    weight: float = 0.3
    penalty: ad.BottomKPenalty = PENALTY
    hidden: int = 16
    bias: float = 4.0

    def begin(self, model: AdaptiveLM, probe: Callable[[], Probed]) -> list[nn.Parameter]:
        del probe
        looped, shape = model.looped, model.shape
        looped.gate = ad.PerIterationMLPGate(shape.dim, shape.steps, self.hidden, self.bias)
        looped.rule = ad.SurvivalThreshold(self.tau) if self.survival else ad.Threshold(self.tau)
        looped.update = ad.SurvivalScaled(model.plain_update()) if self.survival else model.plain_update()
        return list(looped.gate.parameters())

    def cost(self, trace: ad.Trace, thousandth: int) -> Tensor:
        values = trace.survival if self.survival else trace.gates
        return self.weight * self.penalty(values, trace.live, thousandth)


@final
@dataclass(frozen=True)
class Routed:
    """Depths by a table of nine, made of measured gains: see `WordRouter`."""

    def begin(self, model: AdaptiveLM, probe: Callable[[], Probed]) -> list[nn.Parameter]:
        model.router = WordRouter.fit(*probe())
        return []

    def cost(self, trace: ad.Trace, thousandth: int) -> Tensor:
        del thousandth
        return trace.scores.new_zeros(())


WORD = torch.tensor([chr(byte).isalnum() or byte == ord("_") or byte > 127 for byte in range(256)])
LONG = 8  # letters; what stands deeper in a word is taken together
CUTS = (0.45, 0.7)  # shares of the bytes that go no deeper than two and three iterations


@final
class WordRouter(nn.Module):
    """The depth of a byte by how many letters of its word have been seen, with it: 0 for what is no letter.

    `depths (9,)` int64. It costs no FLOPs and nothing is learned in it once it is made.
    """

    depths: Tensor

    def __init__(self, depths: Tensor) -> None:
        super().__init__()
        self.register_buffer("depths", depths)

    @classmethod
    def fit(cls, ids: Tensor, losses: Tensor) -> "WordRouter":
        """Depths 2 to 4 by what the last iteration gains over the second; never shallower further into a word."""
        gains = torch.zeros(LONG + 1, dtype=torch.float64)
        shares = torch.zeros_like(gains)
        for place, share, gain in ad.diagnostics.group_means(losses[..., 1] - losses[..., -1], letters_seen(ids)):
            gains[int(place)], shares[int(place)] = gain, share
        order = gains.cummax(0).values.argsort(stable=True)
        middle = torch.empty_like(shares).index_copy_(0, order, shares[order].cumsum(0) - shares[order] / 2)
        return cls(2 + torch.stack([middle > cut for cut in CUTS]).sum(0))

    def forward(self, ids: Tensor) -> Tensor:
        """`ids (batch, seq)` to depths of the same shape."""
        return self.depths[letters_seen(ids)]


def letters_seen(ids: Tensor) -> Tensor:
    """Of the word that each byte stands in, up to it and at most eight: `(batch, seq)` int64."""
    places = torch.arange(ids.shape[1], device=ids.device)
    gap = torch.where(WORD.to(ids.device)[ids], -1, places).cummax(1).values
    return (places - gap).clamp_max(LONG)
