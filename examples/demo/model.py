"""A byte-level language model around a looped stack, of adadepth's public pieces.

With the update "interpolate" the raw residual stream is fed back from iteration to iteration, and the final norm
belongs to the head, outside the loop. With "ponder", the paper's, what is fed back is the embedding that the state
predicts; the final norm is then the end of the block.
"""

import math
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

VOCABULARY = 256


class Shape(NamedTuple):
    """How large the model is: `layers` of width `dim` are applied up to `steps` times, with the `update` between."""

    dim: int = 128
    heads: int = 4
    layers: int = 1
    steps: int = 4
    update: Literal["interpolate", "ponder"] = "interpolate"


class Layer(nn.Module):
    """A pre-norm transformer layer that attends through the view."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, view: ad.TokenView, turn: Tensor) -> Tensor:
        """`(rows, length, dim)` to the same; `turn` is what `rotate` takes."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, turn), rotate(k, turn), v))
        x = x + self.out(view.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@final
class Stack(nn.Module):
    """Layers with rotary positions, which are the view's: a token keeps its place when others have left."""

    takes_view = True
    speed: Tensor  # of rotation, in radians per position

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(shape.dim, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.dim) if shape.update == "ponder" else nn.Identity()
        half = shape.dim // shape.heads // 2
        self.register_buffer("speed", 10000.0 ** -(torch.arange(half) / half), persistent=False)

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        """One iteration: `(rows, length, dim)` to the same."""
        angle = (view.positions.unsqueeze(-1) * self.speed).unsqueeze(2)
        turn = torch.polar(torch.ones_like(angle), angle)
        for layer in self.layers:
            x = layer(x, view, turn)
        return self.norm(x)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary positions: pairs in `x (rows, length, heads, head_dim)` are complex numbers, turned by a unit one each.

    `turn (rows, length, 1, head_dim / 2)`. Source: Su et al. 2021, arXiv 2104.09864, section 3.2.
    """
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


class Prediction(NamedTuple):
    """`logits (batch, seq, 256)`, of every iteration `(batch, seq, steps, 256)` where asked for, and the trace."""

    logits: Tensor
    trace: ad.Trace


@final
class AdaptiveLM(nn.Module):
    """Embedding, looped stack, norm and head. It starts without exits, at full depth for every byte.

    `router`, if there is one, maps ids to depths `(batch, seq)`; otherwise `looped.gate` and `looped.rule` decide.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(VOCABULARY, shape.dim)
        self.looped = ad.RecurrentWrapper(Stack(shape), shape.steps)
        self.norm = nn.Identity() if shape.update == "ponder" else nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, VOCABULARY, bias=False)
        self.looped.update = self.plain_update()
        self.router: nn.Module | None = None
        self._start(shape)

    def plain_update(self) -> ad.Update:
        """The update by name, before any policy scales it."""
        return ad.Interpolate() if self.shape.update == "interpolate" else ad.Ponder(self.embedding, self.head)

    def answer(self, h: Tensor) -> Tensor:
        """Logits `(..., 256)` of states `(..., dim)`."""
        return self.head(self.norm(h))

    def forward(
        self, ids: Tensor, *, min_depth: int | Tensor = 2, max_depth: int | Tensor | None = None, every: bool = False
    ) -> Prediction:
        """Predict the byte after each of `ids (batch, seq)`; `every` asks for the logits of every iteration.

        A token that left after one iteration would show others the keys of its bare embedding, hence `min_depth`.
        """
        if self.router is not None and max_depth is None:
            min_depth = max_depth = self.router(ids)
        out = self.looped(self.embedding(ids), min_depth=min_depth, max_depth=max_depth, states=every)
        return Prediction(self.answer(out.hidden if out.states is None else out.states), out.trace)

    def _start(self, shape: Shape) -> None:
        """Small weights, smaller where layers × steps of them write into one stream; embeddings that weigh in it."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.layers * shape.steps) if writes else 0.02)
        nn.init.normal_(self.embedding.weight, std=0.3)
