"""A block of one's own, looped as it is: grouped-query attention, rotary positions, a SwiGLU MLP.

All that it knows of adadepth is where a token stands, `ad.positions()`: in a loop it sees only the tokens that run.
`python -m examples.wrap_a_block` checks it, wraps it, runs a padded batch and shows where each token left; that
skipping equals computing all and selecting; that decoding with a cache equals the whole; and what is refused.
"""

import textwrap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Queries or keys `(rows, heads, length, size)`, turned by their positions `(rows, length)`."""
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None] * 10_000 ** (-torch.arange(half, device=x.device) / half)
    first, second = x.split(half, -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.size = dim // heads
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * kv_heads * self.size)
        self.out = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q(y), *self.kv(y).chunk(2, -1))
        )
        q, k = rotate(q, ad.positions()), rotate(k, ad.positions())
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, value = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class Convolved(nn.Module):
    """The same behind a short causal convolution along the sequence: the tokens next to it may have left."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv, self.block = nn.Conv1d(dim, dim, 3), Block(dim, heads=8, kv_heads=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2))


def compare(parts: list[ad.Output], whole: ad.Output) -> str:
    hidden = torch.cat([part.hidden for part in parts], 1)
    depth = torch.cat([part.trace.depth for part in parts], 1)
    same = torch.allclose(hidden, whole.hidden, atol=1e-5) and torch.equal(depth, whole.trace.depth)
    return "the same" if same else "differs"


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(13)
    dim, steps = 64, 4
    block = Block(dim, heads=8, kv_heads=2)
    ad.check_block(block, dim)
    print("check_block: nothing to say")

    gate = ad.PerIterationMLPGate(dim, steps, hidden=16, bias=0.0)
    looped = ad.RecurrentWrapper(block, steps, gate, ad.Threshold(0.5), ad.Interpolate()).eval()
    x = torch.randn(2, 8, dim)
    mask = torch.tensor([[True] * 8, [False] * 3 + [True] * 5])  # the second row is shorter
    packed = looped(x, mask=mask)
    print(f"iterations of each token:\n{packed.trace.depth}")
    print(f"work done: {ad.live_share(packed.trace.live):.0%} of {steps} iterations for all")

    looped.skip = False
    print("all computed and selected:", compare([looped(x, mask=mask)], packed))
    looped.skip = True

    cache = ad.KVReuseCache()
    parts = [looped(x[:, :5], mask=mask[:, :5], cache=cache)]  # the prompts, then token by token
    parts += [looped(x[:, t : t + 1], cache=cache) for t in range(5, 8)]
    print("decoded with a cache:", compare(parts, packed))

    try:
        ad.check_block(Convolved(dim), dim)
    except ValueError as error:
        print("refused:", *textwrap.wrap(str(error), 100), sep="\n  ")


if __name__ == "__main__":
    main()
