"""Loops with depths from outside as one writes them by hand over `_blocks.Layer`, and their definition.

At iteration i a token reads each earlier token's keys and values of iteration i, or of that token's last iteration if
it exited before. All take the layers, `x (batch, seq, dim)` and depths `(batch, seq)` of at least 1.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from ._blocks import Layer

Kept = defaultdict[tuple[int, int], list[tuple[Tensor, Tensor]]]


def definition(layers: list[Layer], x: Tensor, depth: Tensor) -> Tensor:
    """Token by token, each with the keys and values that it reads put together one by one."""
    return torch.stack([_row(layers, row, deep) for row, deep in zip(x, depth.tolist(), strict=True)])


def _row(layers: list[Layer], row: Tensor, depth: list[int]) -> Tensor:
    kept: Kept = defaultdict(list)  # of each token and layer, by iteration
    states = []
    for token, h in enumerate(row):
        state = h[None, None]
        for i in range(depth[token]):
            for number, layer in enumerate(layers):
                q, *own = layer.split(state)
                kept[token, number].append((own[0], own[1]))
                seen = [kept[past, number][min(i, depth[past] - 1)] for past in range(token + 1)]
                k, v = (torch.cat(parts, 2) for parts in zip(*seen, strict=True))
                state = layer.finish(state, F.scaled_dot_product_attention(q, k, v))
        states.append(state[0, 0])
    return torch.stack(states)


def by_where(layers: list[Layer], x: Tensor, depth: Tensor) -> Tensor:
    """Every token runs every iteration; exited ones keep their state, and their keys and values in each layer."""
    kept: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
    for i in range(int(depth.max())):
        live = (depth > i)[..., None]
        h = x
        for number, layer in enumerate(layers):
            q, k, v = layer.split(h)
            if (old := kept[number]) is not None:
                k, v = (torch.where(live[:, None], new, last) for new, last in zip((k, v), old, strict=True))
            kept[number] = k, v
            h = layer.finish(h, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = torch.where(live, h, x)
    return x


def by_gather(layers: list[Layer], x: Tensor, depth: Tensor) -> Tensor:
    """The tokens that go on are selected in each iteration; attention takes them by rows, padded."""
    shape, flat = x.shape, x.flatten(0, 1)
    kept: list[tuple[Tensor, Tensor]] = []
    for i in range(int(depth.max())):
        live = depth > i
        rows, columns = live.nonzero(as_tuple=True)
        place = (live.cumsum(1) - 1)[rows, columns]
        width = int(live.sum(1).max())
        mask = torch.zeros(shape[0], width, shape[1], dtype=torch.bool, device=x.device)
        mask[..., 0] = True  # padded queries read something
        mask[rows, place] = torch.arange(shape[1], device=x.device) <= columns[:, None]
        index = rows * shape[1] + columns
        h = flat.index_select(0, index)[None]
        for number, layer in enumerate(layers):
            q, k, v = (part[0].transpose(0, 1) for part in layer.split(h))  # (tokens, heads, head_dim)
            if i == 0:
                empty = k.new_zeros(*shape[:2], *k.shape[1:])
                kept.append((empty, empty))
            grids = [grid.index_put((rows, columns), new) for grid, new in zip(kept[number], (k, v), strict=True)]
            kept[number] = grids[0], grids[1]
            padded = q.new_zeros(shape[0], width, *q.shape[1:]).index_put((rows, place), q)
            q, k, v = (part.transpose(1, 2) for part in (padded, *grids))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
            h = layer.finish(h, attended.transpose(1, 2)[rows, place].transpose(0, 1)[None])
        flat = flat.index_copy(0, index, h[0])
    return flat.view(shape)


class Decoder:
    """Decodes one token per row; every row runs until the deepest is done."""

    def __init__(self, layers: list[Layer], steps: int, batch: int, length: int, x: Tensor) -> None:
        self.layers, self.steps, self.at = layers, steps, 0
        heads = layers[0].heads
        self.grid = x.new_zeros(steps, len(layers), 2, batch, heads, length, x.shape[-1] // heads)

    def __call__(self, x: Tensor, depth: Tensor) -> Tensor:
        """States of the next tokens `x (batch, new, dim)`, of depths `(batch, new)`; `new` is 1 behind a prompt."""
        span = slice(self.at, self.at + x.shape[1])
        for i in range(int(depth.max())):
            live = (depth > i)[..., None]
            h = x
            for number, layer in enumerate(self.layers):
                h = self.layer(layer, number, i, h, live)
            x = torch.where(live, h, x)
        self.grid[int(depth.max()) :, ..., span, :] = self.grid[int(depth.max()) - 1, ..., span, :]
        self.at = span.stop
        return x

    def layer(self, layer: Layer, number: int, i: int, h: Tensor, live: Tensor) -> Tensor:
        """One layer at iteration i; a row that has exited keeps the keys and values of its last iteration."""
        q, *new = layer.split(h)
        span = slice(self.at, self.at + h.shape[1])
        for which, part in enumerate(new):
            old = self.grid[max(i - 1, 0), number, which, :, :, span]
            self.grid[i, number, which, :, :, span] = torch.where(live[:, None], part, old)
        k, v = self.grid[i, number, :, :, :, : span.stop]
        return layer.finish(h, F.scaled_dot_product_attention(q, k, v, is_causal=h.shape[1] > 1))
