"""Tiny recursive models (HRM, Wang et al. 2025, arXiv 2506.21734; TRM, Jolicoeur-Martineau 2025, arXiv 2510.04871).

One small network refines a latent state and an answer; each puzzle halts as a whole. Training runs one segment a call.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toy
from narrow import the
from torch import Tensor, nn

import adadepth as ad


class Segment(nn.Module):
    """The state is answer y and latent z, side by side. Gradients pass through the last recursion."""

    def __init__(self, net: nn.Module, recursions: int, updates: int) -> None:
        super().__init__()
        self.net, self.recursions, self.updates = net, recursions, updates

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        y, z = state.chunk(2, -1)
        for left in reversed(range(self.recursions)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and left == 0):
                for _ in range(self.updates):
                    z = self.net(x + y + z)
                y = self.net(y + z)
        return torch.cat([y, z], -1)


def first_token_decides(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    """A rule: the whole row goes on while the score of its first token is at least 1/2."""
    first = scores[..., -1].masked_fill(positions > 0, 0).sum(1, keepdim=True)
    return torch.where(first >= 0.5, remaining, 0)


class TinyRecursiveModel(nn.Module):
    def __init__(self, segments: int) -> None:
        super().__init__()
        self.embed, self.head = toy.Embed(), toy.make_head()
        self.initial = nn.Buffer(torch.randn(2 * toy.DIM))
        net = nn.TransformerEncoderLayer(toy.DIM, 2, 4 * toy.DIM, 0.0, batch_first=True)
        block, gate = Segment(net, recursions=2, updates=2), ad.LinearGate(2 * toy.DIM)
        self.looped = ad.RecurrentWrapper(block, segments, gate, first_token_decides, causal=False)

    def forward(self, ids: Tensor, state: Tensor, **call: Any) -> ad.Output:
        return self.looped(state, block_kwargs={"x": self.embed(ids)}, **call)

    def logits(self, out: ad.Output) -> Tensor:
        return self.head(out.hidden[..., : toy.DIM])


def segment_loss(logits: Tensor, out: ad.Output, labels: Tensor) -> Tensor:
    """Of the answers after one segment, and of the score, which is the chance that not all of them are right."""
    wrong = ((logits.argmax(-1) != labels) & (labels >= 0)).any(1)
    halting = F.binary_cross_entropy(out.trace.scores[:, 0, 0], wrong.to(logits))
    return toy.losses(logits, labels).mean() + halting


def carried(model: TinyRecursiveModel, out: ad.Output, done: Tensor) -> Tensor:
    """The next call's state; a new puzzle stands where one is done."""
    return torch.where(done[:, None, None], model.initial, out.hidden.detach())
