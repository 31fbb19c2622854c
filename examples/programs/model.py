"""A small transformer that says the value of every token: one block, looped.

The raw residual stream is fed back from iteration to iteration; the final norm belongs to the head, outside the loop.
Models without a loop are of the same parts: several layers or a wider one, and one iteration.
"""

import math
from typing import NamedTuple, final

import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

from .task import Sizes

HEADS = 4


class Shape(NamedTuple):
    """The most iterations of the loop, the width, and the distinct layers of its block."""

    steps: int = 6
    dim: int = 64
    layers: int = 1


@final
class Layer(nn.Module):
    """A pre-norm transformer layer that attends through the view."""

    takes_view = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        """`(rows, length, dim)` to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(view.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@final
class Layers(nn.Module):
    """Distinct layers, one after the other."""

    takes_view = True

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dim) for _ in range(layers))

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        """`(rows, length, dim)` to the same."""
        for layer in self.layers:
            x = layer(x, view)
        return x


class Prediction(NamedTuple):
    """`logits (rows, length, answers)`, of every iteration `(…, steps, answers)` where asked for, and the trace."""

    logits: Tensor
    trace: ad.Trace


@final
class Interpreter(nn.Module):
    """Embedding, looped block, head. It starts without exits: `looped.gate` and `looped.rule` are None."""

    def __init__(self, sizes: Sizes, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or Shape()
        self.tokens, self.positions = nn.Embedding(sizes.vocabulary, shape.dim), nn.Embedding(sizes.length, shape.dim)
        block = Layer(shape.dim) if shape.layers == 1 else Layers(shape.dim, shape.layers)
        self.looped = ad.RecurrentWrapper(block, shape.steps)
        self.head = nn.Sequential(nn.LayerNorm(shape.dim), nn.Linear(shape.dim, sizes.answers))
        self._start()

    def forward(self, ids: Tensor, *, depth: int | Tensor | None = None, every: bool = False) -> Prediction:
        """Predict the value of each token of `ids (rows, length)`.

        Arguments: `depth`, at which all tokens, or each, must exit, whatever gate and rule say; `every` asks for the
        logits of every iteration.
        """
        out = self.looped(self.embed(ids), min_depth=depth, max_depth=depth, states=every)
        return Prediction(self.head(out.states if every else out.hidden), out.trace)

    def embed(self, ids: Tensor) -> Tensor:
        """The input of the loop, `(rows, length, dim)`."""
        return self.tokens(ids) + self.positions.weight[: ids.shape[1]]

    def _start(self) -> None:
        """Small weights, smaller where all iterations write into one stream; embeddings that weigh in it."""
        writers = 2 * self.shape.steps * self.shape.layers
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(writers) if writes else 0.02)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.3)
