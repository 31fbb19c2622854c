"""A block that carries the keys and values of its first iteration in its state: the layout "single" is exact for it."""

import torch
import toy
from narrow import the
from torch import Tensor, nn

import adadepth as ad
from adadepth.cache.kv_reuse import LayoutName


class SharedKeys(nn.Module):
    """Carries keys and values of the first iteration in the state."""

    takes_view = True

    def __init__(self) -> None:
        super().__init__()
        self.block = toy.Block()

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        h, carried = x.split([toy.DIM, 2 * toy.DIM], -1)
        q, k, v = self.block.qkv(self.block.norms[0](h)).chunk(3, -1)
        first = (view.iteration == 0).unsqueeze(-1)
        carried = torch.where(first, torch.cat([k, v], -1), carried)
        parts = q, *carried.chunk(2, -1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in parts)
        attended = view.attend(q, k, v).transpose(1, 2).flatten(2)
        h = h + self.block.out(attended)
        h = h + self.block.mlp(self.block.norms[1](h))
        return torch.cat([h, carried], -1)


class Sharing(nn.Module):
    """A token has as many iterations as it is given; its cache has one entry, which is exact."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.embed, self.head = toy.Embed(), toy.make_head()
        self.looped = ad.RecurrentWrapper(SharedKeys(), steps)

    def forward(self, ids: Tensor, depth: Tensor) -> Tensor:
        x = nn.functional.pad(self.embed(ids), (0, 2 * toy.DIM))
        out = self.looped(x, min_depth=depth, max_depth=depth)
        return self.head(out.hidden[..., : toy.DIM])


def sharing_by_hand(model: Sharing, ids: Tensor, depth: Tensor) -> Tensor:
    """Row by row, token by token: each sees the keys and values of its row's first iteration, up to its own."""
    block, h = the(SharedKeys, model.looped.block).block, model.embed(ids)
    _, k, v = (t.unflatten(-1, (2, -1)) for t in block.qkv(block.norms[0](h)).chunk(3, -1))
    for row, depths in enumerate(depth.tolist()):
        for t, times in enumerate(depths):
            x = h[row, t]
            for _ in range(times):
                q = block.qkv(block.norms[0](x))[: toy.DIM].unflatten(-1, (2, -1))
                scores = torch.einsum("hd,shd->hs", q, k[row, : t + 1]) / q.shape[-1] ** 0.5
                x = x + block.out(torch.einsum("hs,shd->hd", scores.softmax(-1), v[row, : t + 1]).flatten())
                x = x + block.mlp(block.norms[1](x))
            h = h.index_put((torch.tensor(row), torch.tensor(t)), x)
    return model.head(h)


def depths_of(ids: Tensor) -> Tensor:
    return ids % 3 + 1


def test_sharing_is_a_loop_whose_keys_stay_those_of_the_first_iteration() -> None:
    torch.manual_seed(0)
    model, (ids, labels) = Sharing(steps=3).double(), toy.batch(0, rows=3)
    depth = depths_of(ids)
    got, want = model(ids, depth), sharing_by_hand(model, ids, depth)
    toy.assert_close("logits", got, want)
    toy.assert_same_gradients(model, toy.losses(got, labels).mean(), toy.losses(want, labels).mean())
    model.looped.skip = False
    toy.assert_close("dense", model(ids, depth), want)


@torch.no_grad()
def test_sharing_is_exact_with_one_entry_for_each_token() -> None:
    torch.manual_seed(0)
    model, ids = Sharing(steps=3).double(), toy.batch(0, rows=3)[0]
    depth, grids = depths_of(ids), dict[str, int]()
    want = sharing_by_hand(model, ids, depth)
    x = nn.functional.pad(model.embed(ids), (0, 2 * toy.DIM))
    layouts: tuple[LayoutName, ...] = ("filled", "single")
    for layout in layouts:
        cache = ad.KVReuseCache(layout, capacity=toy.LENGTH)
        for first, last in [(0, 7), *((t, t + 1) for t in range(7, toy.LENGTH))]:
            given = depth[:, first:last]
            out = model.looped(x[:, first:last], min_depth=given, max_depth=given, cache=cache)
            toy.assert_close(layout, model.head(out.hidden[..., : toy.DIM]), want[:, first:last])
        grids[layout] = cache.nbytes - cache.depth.nbytes
    assert grids["filled"] == 3 * grids["single"]
