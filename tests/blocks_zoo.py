"""One block of each kind that can be looped, and beside each its formula for the oracle.

A block's formula is given the tokens `x (m, dim)` that run and reads the block's parameters; of the loop
it knows only `oracle.Tokens`. `BLOCKS` is the table. Dropout is 0.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from oracle import Layers, Tokens
from torch import Tensor, nn

import adadepth as ad

DIM = 8


class Kind(NamedTuple):
    """`make(dim, causal)` gives a block."""

    make: Callable[[int, bool], nn.Module]
    layers: Layers


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(..., length, dim) to (..., heads, length, dim / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def merged(x: Tensor) -> Tensor:
    return x.transpose(-2, -3).flatten(-2)


def split(x: Tensor, heads: int) -> Tensor:
    """(m, dim) to (m, heads, dim / heads)."""
    return x.unflatten(-1, (heads, -1))


class PreNorm(nn.Module):
    """The usual transformer layer, as people write it."""

    def __init__(self, dim: int, causal: bool, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(t, self.heads) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(merged(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)))
        return x + self.mlp(self.norm2(x))


def pre_norm(block: PreNorm, x: Tensor, tokens: Tokens, call: int = 0) -> Tensor:
    q, k, v = (split(t, block.heads) for t in block.qkv(block.norm1(x)).chunk(3, -1))
    x = x + block.out(tokens.attend(q, k, v, call).flatten(1))
    return x + block.mlp(block.norm2(x))


def stack(block: Iterable[PreNorm], x: Tensor, tokens: Tokens) -> Tensor:
    for call, layer in enumerate(block):
        x = pre_norm(layer, x, tokens, call)
    return x


class Grouped(nn.Module):
    """Four query heads to two of keys and values."""

    def __init__(self, dim: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm, self.q, self.out = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        k, v = (heads_of(t, 2) for t in self.kv(y).chunk(2, -1))
        q = heads_of(self.q(y), 4)
        return x + self.out(merged(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)))


def grouped(block: Grouped, x: Tensor, tokens: Tokens) -> Tensor:
    y = block.norm(x)
    k, v = (split(t, 2) for t in block.kv(y).chunk(2, -1))
    return x + block.out(tokens.attend(split(block.q(y), 4), k, v).flatten(1))


class Multihead(nn.Module):
    """A user of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm, self.attention = nn.LayerNorm(dim), nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1]).to(y) if self.causal else None
        return x + self.attention(y, y, y, need_weights=False, attn_mask=mask, is_causal=self.causal)[0]


def attention(module: nn.MultiheadAttention, x: Tensor, tokens: Tokens, call: int = 0) -> Tensor:
    q, k, v = (split(t, module.num_heads) for t in (x @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, -1))
    return module.out_proj(tokens.attend(q, k, v, call).flatten(1))


def multihead(block: Multihead, x: Tensor, tokens: Tokens) -> Tensor:
    return x + attention(block.attention, block.norm(x), tokens)


def encoder(dim: int, causal: bool, norm_first: bool = False, layers: int = 0) -> nn.Module:
    """An `nn.TransformerEncoderLayer`, or a stack of `layers` of them."""
    layer = nn.TransformerEncoderLayer(dim, 2, 2 * dim, 0.0, batch_first=True, norm_first=norm_first)
    block = nn.TransformerEncoder(layer, layers) if layers else layer
    if layers:
        for p in block.parameters():  # else all layers are copies
            p.data.add_(torch.randn_like(p), alpha=0.1)
    return ad.CausalEncoder(block) if causal else block


def encoder_layers(block: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
    block = getattr(block, "encoder", block)
    for call, layer in enumerate(getattr(block, "layers", [block])):
        if layer.norm_first:
            x = x + attention(layer.self_attn, layer.norm1(x), tokens, call)
            x = x + layer.linear2(layer.linear1(layer.norm2(x)).relu())
        else:
            x = layer.norm1(x + attention(layer.self_attn, x, tokens, call))
            x = layer.norm2(x + layer.linear2(layer.linear1(x).relu()))
    return x


def pointwise(dim: int, causal: bool) -> nn.Module:
    del causal
    return ad.Pointwise(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)))


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary embedding of pairs (x_i, x_{i + d/2}) along the last axis; `position` broadcasts to the others."""
    half = x.shape[-1] // 2
    angle = position.unsqueeze(-1) * 0.5 ** torch.arange(half, device=x.device)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).to(x.dtype)


class Rotary(nn.Module):
    """Written for adadepth: takes the view, rotates by its positions, has a scale and a value width of its own."""

    takes_view = True

    def __init__(self, dim: int, causal: bool, window: int | None = None) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"scale": 0.7, "window": window if causal else None}
        self.norm, self.qk = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim)
        self.v, self.out = nn.Linear(dim, dim // 2), nn.Linear(dim // 2, dim)

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        y = self.norm(x)
        q, k = (rotate(heads_of(t, 2), view.positions.unsqueeze(1)) for t in self.qk(y).chunk(2, -1))
        return x + self.out(merged(view.attend(q, k, heads_of(self.v(y), 2), **self.options)))


def rotary(block: Rotary, x: Tensor, tokens: Tokens) -> Tensor:
    y, place = block.norm(x), tokens.place[tokens.runs].unsqueeze(1)
    q, k = (rotate(split(t, 2), place) for t in block.qk(y).chunk(2, -1))
    return x + block.out(tokens.attend(q, k, split(block.v(y), 2), **block.options).flatten(1))


class Capped(nn.Module):
    """Scores that are bounded, a sink of each head, a window, and keys and values that heads share."""

    takes_view = True

    def __init__(self, dim: int, causal: bool) -> None:
        super().__init__()
        self.norm, self.q, self.kv = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, dim // 2)
        self.out, self.sinks = nn.Linear(dim, dim), nn.Parameter(torch.randn(4))
        self.options: dict[str, Any] = {"softcap": 0.6, "window": 4 if causal else None, "scale": 2.0}

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        y = self.norm(x)
        k, v = self.kv(y).chunk(2, -1)
        out = view.attend(
            heads_of(self.q(y), 4), heads_of(k, 1), heads_of(v, 1), enable_gqa=True, sinks=self.sinks, **self.options
        )
        return x + self.out(merged(out))


def capped(block: Capped, x: Tensor, tokens: Tokens) -> Tensor:
    y = block.norm(x)
    k, v = block.kv(y).chunk(2, -1)
    out = tokens.attend(split(block.q(y), 4), split(k, 1), split(v, 1), sinks=block.sinks, **block.options)
    return x + block.out(out.flatten(1))


class Quantised(nn.Linear):
    """A linear layer with integer weights, as of bitsandbytes on a CPU: its first pass in evaluation mode packs them.

    Packed weights compute in half precision and give no gradient.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, bias=False)
        self.weight = nn.Parameter(torch.randint(-8, 8, (dim, dim), dtype=torch.int8), requires_grad=False)

    @property
    def packed(self) -> bool:
        return hasattr(self.weight, "packed")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.weight.packed = True  # type: ignore[attr-defined]
        y = F.linear(x.detach() if self.packed else x, self.weight.to(x.dtype) / 50)
        return y.bfloat16().to(y.dtype) if self.packed else y


class Stepped(PreNorm):
    """Knows its iteration and its tokens' positions, through functions that need no view."""

    def __init__(self, dim: int, causal: bool) -> None:
        super().__init__(dim, causal)
        self.step, self.place = nn.Embedding(8, dim), nn.Embedding(16, dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.step(ad.iteration()) + self.place(ad.positions()))


def stepped(block: Stepped, x: Tensor, tokens: Tokens) -> Tensor:
    return pre_norm(block, x + block.step.weight[tokens.step] + block.place(tokens.place[tokens.runs]), tokens)


class Deep(nn.Module):
    """A block of each kind, one on the other."""

    def __init__(self, kinds: tuple[Kind, ...], dim: int, causal: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind.make(dim, causal) for kind in kinds)
        self.takes_view = getattr(self.blocks[0], "takes_view", False)

    def forward(self, x: Tensor, *view: ad.TokenView) -> Tensor:
        for block in self.blocks:
            x = block(x, *view)
        return x


def deep(*kinds: Kind) -> Kind:
    def layers(block: Deep, x: Tensor, tokens: Tokens) -> Tensor:
        for n, (kind, inner) in enumerate(zip(kinds, block.blocks, strict=True)):
            x = kind.layers(inner, x, tokens._replace(part=(*tokens.part, n)))
        return x

    return Kind(lambda dim, causal: Deep(kinds, dim, causal), layers)


BLOCKS = {
    "attention": Kind(PreNorm, pre_norm),
    "grouped-query": Kind(Grouped, grouped),
    "multihead": Kind(Multihead, multihead),
    "encoder layer": Kind(encoder, encoder_layers),
    "encoder layer, norm first": Kind(lambda dim, causal: encoder(dim, causal, norm_first=True), encoder_layers),
    "encoder": Kind(lambda dim, causal: encoder(dim, causal, layers=2), encoder_layers),
    "stack": Kind(lambda dim, causal: nn.Sequential(PreNorm(dim, causal), PreNorm(dim, causal)), stack),
    "pointwise": Kind(pointwise, lambda block, x, tokens: block.block(x)),
    "view": Kind(Rotary, rotary),
    "window": deep(Kind(lambda dim, causal: Rotary(dim, causal, window=3), rotary), Kind(Rotary, rotary)),
    "softcap and sinks": Kind(Capped, capped),
    "iteration": Kind(Stepped, stepped),
}
# Each with several layers.
DEEP = {name: deep(kind, kind) for name, kind in BLOCKS.items()}


def looped(kind: str, causal: bool = True, zoo: dict[str, Kind] = BLOCKS, **options: Any) -> ad.RecurrentWrapper:
    """A loop of four iterations in float64, seeded, whose tokens leave all over it."""
    torch.manual_seed(1)
    gate = spread(ad.PerIterationMLPGate(DIM, 4))
    block = zoo[kind].make(DIM, causal)
    return ad.RecurrentWrapper(block, 4, gate, ad.Threshold(0.5), ad.Interpolate(), causal=causal, **options).double()


def spread(gate: ad.Gate) -> ad.Gate:
    """Scores on both sides of a rule's edge, and not saturated: 1 - s would have few digits."""
    for p in gate.parameters():
        drawn = torch.randn_like(p)
        p.data = drawn - drawn.mean()
    return gate


def mixed(live: Tensor) -> bool:
    """Whether real tokens have different depths."""
    depth = live.sum(-1)
    return depth[depth > 0].unique().numel() > 1
