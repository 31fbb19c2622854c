"""A cache whose rows are reordered, cropped, copied and moved, and what it weighs."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from blocks_zoo import DEEP, DIM, Kind, heads_of, looped, mixed
from cached import EXACT, LAYOUTS, assert_equal_outputs, assert_holds, layouts, rows
from cases import RULES, Case, assert_same, by_definition, cases, examples, in_turn, of_its_own, setting
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import adadepth as ad
from adadepth.cache.kv_reuse import LayoutName

every = pytest.mark.parametrize("kind", DEEP)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


class History:
    """What a cache was told, a row of tokens for each of its rows; the oracle starts from it afresh every time.

    A token is its x, its start, the least and the most depth it was given, and the depth it ran to, in one vector.
    """

    def __init__(self, kind: Kind, case: Case, cache: ad.KVReuseCache) -> None:
        self.kind, self.case, self.cache = kind, case, cache
        self.s = setting(kind, case, torch.float64)
        self.loop = ad.RecurrentWrapper(**self.s.pieces)
        self.rows = [rows(1, 0, 2 * DIM + 3)[0]] * case.batch

    def lengths(self) -> Tensor:
        return torch.tensor([len(row) for row in self.rows])

    def answers(self) -> oracle.Result:
        """By definition, for every token, each row at the left."""
        x, start, depths = pad_sequence(self.rows, batch_first=True).split([DIM, DIM, 3], -1)
        mask = torch.arange(x.shape[1]) < self.lengths().unsqueeze(1)
        least, most, _ = depths.long().unbind(-1)
        arguments = {"mask": mask, "start": start, "min_depth": least, "max_depth": most}
        return by_definition(self.kind, self.case, self.s._replace(x=x, arguments=arguments))

    def feed(self, columns: int) -> None:
        batch, steps = len(self.rows), self.case.steps
        x, start, mask = rows(batch, columns), rows(batch, columns), torch.rand(batch, columns) > 0.3
        least, most = torch.randint(0, 3, (batch, columns)), torch.randint(1, 2 * steps, (batch, columns))
        bound: int | Tensor = most
        if torch.rand(()) < 0.3:
            bound = int(torch.randint(1, steps + 1, ()))
            most = most.new_full((), bound).expand_as(least)
        arguments = {"mask": mask, "start": start, "min_depth": least, "max_depth": bound}
        got = self.s._replace(x=x, arguments=arguments).run(self.loop, cache=self.cache)
        new = torch.cat([x, start, torch.stack([least, most, got.live.sum(-1)], -1)], -1)
        before = self.lengths().unsqueeze(1)
        self.rows = [torch.cat([old, row[real]]) for old, row, real in zip(self.rows, new, mask, strict=True)]
        want = self.answers()
        place = torch.arange(want.live.shape[1])
        is_new = (place >= before) & (place < self.lengths().unsqueeze(1))
        run = got.live.shape[-1]  # an int max_depth shortens the loop
        ends = (None, run, run, run - 1, run)
        picked = (t[is_new] if end is None else t[is_new][:, :end] for t, end in zip(want, ends, strict=True))
        assert_same({k: t[mask] for k, t in got._asdict().items()}, oracle.Result(*picked)._asdict(), 1e-10, 1e-13)

    def stop(self) -> None:
        """A pass full of NaN that ends in the middle."""
        steps = self.case.steps
        at = stop_at(self.loop, int(torch.randint(0, steps, ())))
        x = rows(len(self.rows), 2).fill_(torch.nan)
        with at, pytest.raises(Stop):
            self.loop(x, cache=self.cache, min_depth=steps)

    def reorder(self) -> None:
        batch = len(self.rows)
        chosen = torch.randint(0, batch, (int(torch.randint(1, 5, ())),))
        if torch.rand(()) < 0.5:
            chosen = torch.randperm(batch)
        self.cache.reorder(chosen)
        self.rows = [self.rows[i] for i in chosen.tolist()]

    def crop(self) -> None:
        length = int(torch.randint(0, int(self.lengths().max()) + 2, ()))
        self.cache.crop(length)
        self.rows = [row[:length] for row in self.rows]

    def crop_each(self) -> None:
        lengths = torch.randint(0, int(self.lengths().max()) + 2, (len(self.rows),))
        self.cache.crop(lengths)
        self.rows = [row[:length] for row, length in zip(self.rows, lengths.tolist(), strict=True)]

    def reset(self) -> None:
        self.cache.reset()
        assert self.cache.lengths.shape == (0,)
        self.rows = [self.rows[0][:0]] * int(torch.randint(1, 4, ()))

    def copy(self) -> None:
        self.leave(copy.deepcopy(self.cache))

    def pickle(self) -> None:
        self.leave(pickle.loads(pickle.dumps(self.cache)))

    def leave(self, twin: ad.KVReuseCache) -> None:
        """Go on with the twin, which must not see what becomes of the one it was copied from."""
        self.loop(rows(len(self.rows), 2), cache=self.cache)
        self.cache.reset()
        self.cache = twin


class Stop(Exception):
    """What a block raises in the middle of a pass."""


def stop_at(loop: ad.RecurrentWrapper, iteration: int) -> Any:
    def hook(*_: object) -> None:
        if int(ad.iteration().max()) == iteration:
            raise Stop

    return loop.block.register_forward_hook(hook)


MOVES: list[Callable[[History], object]] = [
    History.stop,
    History.reorder,
    History.crop,
    History.crop_each,
    History.reset,
    History.copy,
    History.pickle,
    lambda history: history.cache.to("cpu"),
]


@examples(4, 20)
@every
def test_after_any_history_a_cache_answers_as_the_rows_it_holds(kind: str, examples: int) -> None:
    @of_its_own(kind, examples)
    @given(
        case=cases([rule for rule in RULES if "per row" not in rule], causal=[True]),
        layout=st.sampled_from(EXACT),
        fits=st.booleans(),
    )
    def check(case: Case, layout: LayoutName, fits: bool) -> None:
        history = History(DEEP[kind], case, ad.KVReuseCache(layout=layout, capacity=16 if fits else None))
        history.feed(2)
        for n in torch.randperm(len(MOVES))[:4].tolist():
            MOVES[n](history)
            if MOVES[n] is not History.reset:
                assert_holds(history.cache, pad_sequence(history.rows, batch_first=True)[..., -1].long())
            history.feed(int(torch.randint(0, 3, ())))
        history.feed(1)

    check()


@pytest.mark.parametrize(
    ("kind", "order", "layout"),
    in_turn([*((kind, [2, 0, 0, 3, 2]) for kind in DEEP), ("attention", [3, 1, 0, 2])], LAYOUTS),
)
def test_reorder_and_crop_give_what_feeding_so_would_have_given(
    kind: str, layout: LayoutName, order: list[int]
) -> None:
    loop, x = looped(kind, zoo=DEEP), rows(4, 8)
    mask = torch.rand(4, 8) > 0.25
    chosen, keep = torch.tensor(order), torch.tensor([3, 1, 4, 9, 0][: len(order)])
    cache, direct = ad.KVReuseCache(layout=layout), ad.KVReuseCache(layout=layout)
    kept = mask[chosen] & (mask[chosen].cumsum(1) <= keep.unsqueeze(1))
    for part in (slice(0, 3), slice(3, 8)):
        loop(x[:, part], mask=mask[:, part], cache=cache)
        loop(x[chosen, part], mask=kept[:, part], cache=direct)
    cache.reorder(chosen)
    cache.crop(keep)
    assert torch.equal(cache.lengths, direct.lengths) and torch.equal(cache.depth, direct.depth)
    for new in rows(len(order), 4).split([1, 2, 1], 1):
        assert_equal_outputs(loop(new, cache=cache), loop(new, cache=direct))
    assert mixed(cache.depth)


@layouts
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integers_choose_rows_and_lengths(layout: LayoutName, dtype: torch.dtype) -> None:
    loop, cache = looped("attention", zoo=DEEP), ad.KVReuseCache(layout=layout)
    loop(rows(3, 4), cache=cache)
    depth = cache.depth
    cache.crop(torch.tensor([3, 0, 2]).to(dtype))
    cache.reorder(torch.tensor([2, 0]).to(dtype))
    assert cache.lengths.tolist() == [2, 3]
    assert torch.equal(cache.depth, torch.stack([depth[2, :3].masked_fill(torch.arange(3) >= 2, 0), depth[0, :3]]))


@layouts
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_modes_may_change_between_passes(
    layout: LayoutName, moved: bool, modes: tuple[Callable[[], Any], Callable[[], Any]]
) -> None:
    loop, x = looped("attention", zoo=DEEP), rows(3, 6)
    results = []
    for first, second in (modes, (torch.no_grad, torch.no_grad)):
        cache = ad.KVReuseCache(layout=layout, capacity=6)
        with first():
            loop(x[:, :3], cache=cache)
            if moved:
                cache.crop(torch.tensor([3, 1, 2]))
                cache.reorder(torch.tensor([1, 0, 0]))
        with second():
            loop(x[:, 3:4], cache=cache)
            if moved:
                cache.crop(3)
            results.append(loop(x[:, 4:], cache=cache))
    assert_equal_outputs(*results)


class Wide(nn.Module):
    """Two layers, whose entry is 2 · 2 · 512 numbers."""

    takes_view = True

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        for _ in range(2):
            h = heads_of(x.repeat(1, 1, 64), 8)
            x = x + view.attend(h, h, h).transpose(1, 2).flatten(2)[..., :DIM]
        return x


ENTRY = 2 * 2 * 64 * DIM * 4  # bytes, in float32


def bytes_of(layout: LayoutName, capacity: int | None) -> tuple[ad.KVReuseCache, int]:
    """A cache of 3 rows after a prompt and some tokens of 4 iterations, and the sum of depths."""
    loop, cache = ad.RecurrentWrapper(Wide(), 4), ad.KVReuseCache(layout=layout, capacity=capacity)
    for columns in (200, *[1] * 30):
        loop(rows(3, columns).float(), cache=cache, max_depth=torch.randint(1, 5, (3, columns)))
    return cache, int(cache.depth.sum())


@pytest.mark.parametrize("capacity", [None, 230])
def test_compact_holds_the_sum_of_depths(capacity: int | None) -> None:
    cache, depths = bytes_of("compact", capacity)
    assert depths * ENTRY <= cache.nbytes <= 1.02 * depths * ENTRY
    cache.reorder(torch.tensor([0, 0, 2, 2]))  # which shares what is the same
    assert cache.nbytes <= 1.02 * int(cache.depth[[0, 2]].sum()) * ENTRY
    cache.crop(100)
    depths = int(cache.depth[[0, 2]].sum())
    assert depths * ENTRY <= cache.nbytes <= 1.02 * depths * ENTRY + 4 * 230 * 1.5 * (4 * 4 + 8)  # and the table


@pytest.mark.parametrize(("layout", "iterations"), [("filled", 4), ("single", 1)])
def test_grids_hold_what_there_is_room_for(layout: LayoutName, iterations: int) -> None:
    cache, _ = bytes_of(layout, 256)
    room = 3 * 256 * iterations * ENTRY
    assert room <= cache.nbytes <= 1.01 * room
    cache, _ = bytes_of(layout, None)
    room = 3 * 230 * iterations * ENTRY
    assert room <= cache.nbytes <= 1.51 * room


@layouts
def test_moving_returns_the_cache(layout: LayoutName) -> None:
    loop, cache = looped("attention", zoo=DEEP), ad.KVReuseCache(layout=layout)
    loop(rows(2, 50), cache=cache)
    size = cache.nbytes
    assert cache.to("cpu") is cache
    assert cache.to("meta").lengths.device.type == cache.depth.device.type == "meta"
    assert cache.nbytes == size
    assert len(pickle.dumps(cache)) < size / 3  # no data
    with pytest.raises(ValueError, match=r"^The cache is on meta, got x on cpu\. Move it: cache\.to\(device\)\.$"):
        loop(rows(2, 1), cache=cache)


@layouts
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cache_goes_where_its_loop_goes(layout: LayoutName) -> None:
    loop, cache, x = looped("encoder", zoo=DEEP), ad.KVReuseCache(layout=layout), rows(3, 6)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    loop(x[:, :4], mask=mask, cache=cache)
    twin = copy.deepcopy(cache).to("cuda")
    want = loop(x[:, 4:], cache=cache)
    got = loop.to("cuda")(x[:, 4:].to("cuda"), cache=twin)
    twin.crop(torch.tensor([2, 1, 9], device="cuda"))
    twin.reorder(torch.tensor([2, 0], device="cuda"))
    assert twin.to("cpu").lengths.tolist() == [2, 2]
    torch.testing.assert_close(got.hidden.cpu(), want.hidden, rtol=1e-10, atol=1e-12)
    assert torch.equal(got.trace.live.cpu(), want.trace.live)


COPIES: dict[str, Callable[[ad.KVReuseCache], ad.KVReuseCache]] = {
    "copied": copy.deepcopy,
    "pickled": lambda cache: pickle.loads(pickle.dumps(cache)),
    "moved": lambda cache: copy.deepcopy(cache).to("cpu"),
}


@layouts
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_that_was_made_in_inference_mode_serves_outside_it(layout: LayoutName, how: str) -> None:
    loop, x, cache = looped("attention").eval(), rows(2, 5), ad.KVReuseCache(layout, capacity=8)
    with torch.inference_mode():
        loop(x[:, :4], cache=cache)
        other = COPIES[how](cache)
    assert_equal_outputs(loop(x[:, 4:], cache=other), loop(x[:, 4:], cache=cache))
