"""Blocks to measure with: as a user would write them, without a thought of adadepth."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """A pre-norm transformer layer, causal."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        return qkv.transpose(1, 3).unbind(2)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def stack(layers: int, dim: int, heads: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(dim, heads) for _ in range(layers)))
