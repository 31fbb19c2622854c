"""A small transformer that reads a program and says the value of every line: one block, looped.

The raw residual stream is fed back from iteration to iteration; the final norm belongs to the head, outside the loop.
"""

import math
from typing import NamedTuple, final

import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

from .task import LINES, MODULUS, VOCABULARY

DIM = 64
HEADS = 4
STEPS = 6


@final
class Block(nn.Module):
    """A pre-norm transformer layer that attends through the view."""

    takes_view = True

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        """`(rows, length, dim)` to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(view.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Prediction(NamedTuple):
    """`logits (programs, 24, 5)`, of every iteration `(programs, 24, steps, 5)` where asked for, and the trace."""

    logits: Tensor
    trace: ad.Trace


@final
class Interpreter(nn.Module):
    """Embedding, looped block, head. It starts without exits: `looped.gate` and `looped.rule` are None.

    Arguments: ids there are, the longest row, answers there are; those of the task.
    """

    def __init__(self, vocabulary: int = VOCABULARY, length: int = LINES, answers: int = MODULUS) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, DIM), nn.Embedding(length, DIM)
        self.looped = ad.RecurrentWrapper(Block(), STEPS)
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, answers))
        self._start()

    def forward(self, ids: Tensor, *, depth: int | Tensor | None = None, every: bool = False) -> Prediction:
        """Predict the value of each line of `ids (programs, 24)`.

        Arguments: `depth`, at which all tokens, or each, must leave, whatever gate and rule say; `every` asks for the
        logits of every iteration.
        """
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        out = self.looped(x, min_depth=depth, max_depth=depth, states=every)
        return Prediction(self.head(out.states if every else out.hidden), out.trace)

    def _start(self) -> None:
        """Small weights, smaller where all iterations write into one stream; embeddings that weigh in it."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * STEPS) if writes else 0.02)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.3)
