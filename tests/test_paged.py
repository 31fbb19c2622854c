"""A cache in pages, asked in one call a layer: the same as by definition, and as with a call for each group of rows."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks_zoo import DEEP, looped
from cached import assert_equal_outputs, rows
from cases import Case, assert_same, by_definition, cases, examples, of_its_own, setting
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from served import How as Served
from served import serve
from test_cache import Cut, cached, cuts, piecewise
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import adadepth as ad
from adadepth.attention import varlen
from adadepth.attention.how import How
from adadepth.attention.varlen import Sequences
from adadepth.cache import paged
from adadepth.cache.kv_reuse import LayoutName
from adadepth.cache.pages import Pages

UNSERVED = ["pointwise", "softcap and sinks"]  # they attend nowhere, or as the call does not
BATCHES = [1, 3, 8]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Sequences]:
    """The sequences of each call; wrappers ask in one, and pages are so small that rows have several."""
    made, attend = list[Sequences](), varlen.attend

    def counted(q: Tensor, k: Tensor, v: Tensor, of: Sequences, how: How) -> Tensor:
        made.append(of)
        if q.device.type == "cpu":
            assert int(of.starts.diff().max()) <= of.longest  # the kernel would leave queries out
        return attend(q, k, v, of, how)

    monkeypatch.setattr(varlen, "attend", counted)
    monkeypatch.setattr(ad.RecurrentWrapper, "one_call", True)
    monkeypatch.setattr(Pages, "page", 4)
    return made


def in_rows(loop: ad.RecurrentWrapper, x: Tensor) -> Tensor:
    """What comes without a cache, and without flex attention."""
    before, loop.one_call = loop.one_call, False
    hidden = loop(x).hidden
    loop.one_call = before
    return hidden


@examples(4, 20)
@pytest.mark.parametrize("kind", DEEP)
def test_prefill_in_every_split_and_decode_are_the_definition(kind: str, calls: list[Sequences], examples: int) -> None:
    @of_its_own(kind, examples)
    @given(case=cases(causal=[True]), cut=cuts("filled", "single"))
    def check(case: Case, cut: Cut) -> None:
        s = setting(DEEP[kind], case, torch.float64)
        want = piecewise(DEEP[kind], case, s, cut)
        assume(len(want.live.sum(-1)[want.live[..., 0]].unique()) > 1)
        assert_same(cached(s, cut)[0]._asdict(), want._asdict(), 1e-10, 1e-13)

    check()
    assert bool(calls) == (kind not in UNSERVED)


@examples(4, 20)
@pytest.mark.parametrize("kind", ["attention", "grouped-query", "window", "softcap and sinks"])
def test_each_request_is_one_full_forward_over_it(kind: str, calls: list[Sequences], examples: int) -> None:
    """Tokens of several iterations in one call, some of them drafts that are dropped."""
    hows = st.builds(
        Served,
        seed=st.integers(0, 2**31),
        layout=st.just("filled"),
        rows=st.sampled_from([3, 2]),
        width=st.sampled_from([8, 4]),
        times=st.just(2),
        draft=st.sampled_from([1, 2]),
        waits=st.booleans(),
        spoiled=st.booleans(),
    )

    @of_its_own(kind, examples)
    @given(case=cases(causal=[True]), how=hows)
    def check(case: Case, how: Served) -> None:
        s = setting(DEEP[kind], case, torch.float64)
        want = by_definition(DEEP[kind], case, s)
        requests, mixed = serve(ad.RecurrentWrapper(**s.pieces).eval(), s, how)
        assume(mixed)
        for request in requests:
            if request.columns:
                hidden = torch.stack([request.hidden[i] for i in range(len(request.columns))])
                live = torch.tensor([request.depth[i] for i in range(len(request.columns))])
                here = {"live": want.live[request.row].sum(-1)[request.columns]}
                here["hidden"] = want.hidden[request.row, request.columns]
                assert_same({"live": live, "hidden": hidden}, here, 1e-10, 1e-13)

    check()
    assert bool(calls) == (kind not in UNSERVED)


@pytest.mark.parametrize("seed", range(4))
def test_requests_over_a_single_grid_get_what_groups_of_rows_give(seed: int, calls: list[Sequences]) -> None:
    """There, tokens of a row that are in different iterations are neighbours."""
    case = Case(seed, 3, 6, 4, True, "per iteration", "threshold", "interpolate", "right", "none", "none", False)
    s, found = setting(DEEP["attention"], case, torch.float64), []
    loop = ad.RecurrentWrapper(**s.pieces).eval()
    for loop.one_call in (False, True):
        torch.manual_seed(0)
        requests, _ = serve(loop, s, Served(seed, "single", 3, 8, 2, 1, waits=False, spoiled=False))
        found.append([(request.hidden, request.depth) for request in requests])
    assert calls
    for (a, depth), (b, same) in zip(*found, strict=True):
        assert depth == same and a.keys() == b.keys()
        for position, hidden in a.items():
            torch.testing.assert_close(b[position], hidden, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", ["filled", "single", "compact"])
@pytest.mark.parametrize("batch", BATCHES)
def test_it_is_what_a_call_for_each_group_gives(layout: LayoutName, batch: int, calls: list[Sequences]) -> None:
    """Prompts, tokens one and several at a time, cropped and reordered rows, room that grows."""
    loop, x, mask = looped("grouped-query", zoo=DEEP), 2 * rows(batch, 14), torch.rand(batch, 14) > 0.3
    results = []
    for loop.one_call in (False, True):
        cache = ad.KVReuseCache(layout)
        outs = [loop(x[:, :5], mask=mask[:, :5], cache=cache)]
        outs += [loop(x[:, i : i + 1], cache=cache) for i in (5, 6)]
        cache.crop(4)
        cache.reorder(torch.arange(batch).flip(0))
        outs += [loop(x[:, a:b], mask=mask[:, a:b], cache=cache) for a, b in ((7, 10), (10, 11), (11, 14))]
        results.append((outs, cache.lengths, cache.depth))
    (want, *held), (got, *same) = results
    for a, b in zip(got, want, strict=True):
        assert_equal_outputs(a, b)
    assert all(torch.equal(a, b) for a, b in zip(held, same, strict=True))
    assert bool(calls) == (layout != "compact")


@pytest.mark.parametrize("kind", ["attention", "window"])
@pytest.mark.parametrize("first", [False, True])
def test_a_cache_is_read_either_way_whichever_way_it_was_begun(kind: str, first: bool) -> None:
    loop, x = looped(kind, zoo=DEEP), rows(3, 8)
    want, cache = in_rows(loop, x), ad.KVReuseCache()
    loop.one_call = first
    loop(x[:, :5], cache=cache)
    loop.one_call = not first
    got = torch.cat([loop(x[:, i : i + 1], cache=cache).hidden for i in (5, 6, 7)], 1)
    assert isinstance(cache._entries, Pages) == first
    torch.testing.assert_close(got, want[:, 5:], rtol=1e-10, atol=1e-12)


def test_what_is_not_held_is_not_read() -> None:
    loop, x, cache = looped("attention", zoo=DEEP), rows(3, 6), ad.KVReuseCache(capacity=8)
    want = in_rows(loop, x)
    loop(x[:, :4], cache=cache)
    assert isinstance(cache._entries, Pages)
    for grid in cache._entries.tensors():
        grid[:, :, :, 6:] = torch.nan
    torch.testing.assert_close(loop(x[:, 4:], cache=cache).hidden, want[:, 4:], rtol=1e-10, atol=1e-12)


def test_shapes_at_decoding_are_those_of_the_number_of_tokens(calls: list[Sequences]) -> None:
    loop, cache = looped("attention", zoo=DEEP), ad.KVReuseCache(capacity=16)
    loop(rows(8, 9), mask=torch.arange(9) >= torch.arange(8).unsqueeze(1), cache=cache)
    calls.clear()
    for _ in range(7):
        loop(rows(8, 1), cache=cache)
    assert calls
    for of in calls:
        n = len(of.used)
        assert (of.starts.shape, of.pages.shape, of.longest) == ((n + 1,), (n, 4), 1)


def runs(live: list[list[bool]], before: list[int]) -> list[tuple[int, int, int]]:
    """Row, first and last position of each run of neighbours that are live."""
    found = list[tuple[int, int, int]]()
    for row, each in enumerate(live):
        for position, here in enumerate(each, before[row]):
            if here and found and found[-1][0] == row and found[-1][2] == position - 1:
                found[-1] = (row, found[-1][1], position)
            elif here:
                found.append((row, position, position))
    return found


@settings(max_examples=60)
@given(data=st.data(), batch=st.integers(1, 4), new=st.integers(1, 7), pages=st.integers(2, 3))
def test_sequences_are_the_runs_of_neighbours(data: st.DataObject, batch: int, new: int, pages: int) -> None:
    capacity = 4 * pages
    before = data.draw(st.lists(st.integers(0, capacity - new), min_size=batch, max_size=batch))
    live = data.draw(st.lists(st.lists(st.booleans(), min_size=new, max_size=new), min_size=batch, max_size=batch))
    want = runs(live, before)
    assume(want)
    entries = Pages(1, batch, capacity)
    places = torch.tensor([row * capacity + p for row, first, last in want for p in range(first, last + 1)])
    number = len(want) + data.draw(st.integers(0, 2))
    longest = 1 if len(want) == number == len(places) else max(last - first + 1 for _, first, last in want) + 1
    of = paged.sequences(places, number, longest, entries)
    assert {part.dtype for part in of[:3]} == {torch.int32}
    assert len(of.used) == len(of.pages) == len(of.starts) - 1 == number
    lengths = [last - first + 1 for _, first, last in want]
    assert of.starts.diff().tolist() == lengths + [0] * (number - len(want))
    assert of.used[: len(want)].tolist() == [last + 1 for *_, last in want]
    assert of.pages[: len(want)].tolist() == [[row * pages + page for page in range(pages)] for row, *_ in want]


def asked(generator: torch.Generator, dtype: torch.dtype, single: bool) -> tuple[Tensor, Tensor, Tensor, Sequences]:
    """Five sequences, one of them empty, over pages of 256 slots in any order."""
    lengths = torch.tensor([1, 1, 1, 1, 1] if single else [3, 1, 70, 0, 5])
    total, pages = int(lengths.sum()), torch.randperm(10, generator=generator).view(5, 2)
    q = torch.randn(total, 4, 16, generator=generator, dtype=torch.float64).to(dtype)
    k, v = (torch.randn(10, 256, 2, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    used = torch.tensor([300, 1, 257, 9, 512])
    of = Sequences(starts.int(), used.int(), pages.int(), int(lengths.max()))
    return q, k, v, of


HOWS = [How(0.0, scale, True, window, None, None) for scale in (None, 0.3) for window in (None, 1, 60)]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("single", [False, True])
def test_what_is_written_out_is_attention_query_by_query(how: How, single: bool) -> None:
    q, k, v, of = asked(torch.Generator().manual_seed(0), torch.float64, single)
    want = torch.zeros_like(q)
    for i, (first, end) in enumerate(zip(of.starts[:-1].tolist(), of.starts[1:].tolist(), strict=True)):
        keys, values = (t[of.pages[i].long()].reshape(-1, 2, 16) for t in (k, v))
        for t in range(first, end):
            last = int(of.used[i]) - (end - t)  # the slot of this query
            sees = slice(0 if how.window is None else max(0, last - how.window + 1), last + 1)
            for head in range(4):
                scores = keys[sees, head // 2] @ q[t, head] * (0.25 if how.scale is None else how.scale)
                want[t, head] = scores.softmax(0) @ values[sees, head // 2]
    torch.testing.assert_close(varlen.written_out(q, k, v, of, how), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("single", [False, True])
def test_the_kernel_is_asked_as_pytorch_declares_it(how: How, single: bool) -> None:
    """No GPU is needed: tensors that hold nothing say that they are on one."""
    with FakeTensorMode():
        q, k, v = (torch.empty(n, dtype=torch.bfloat16, device="cuda") for n in ((5, 4, 16), *[(10, 256, 2, 16)] * 2))
        starts, used, pages = (torch.empty(n, dtype=torch.int32, device="cuda") for n in ((6,), (5,), (5, 2)))
        out = varlen.attend(q, k, v, Sequences(starts, used, pages, 1 if single else 4), how)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is for GPUs")
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("single", [False, True])
def test_the_kernel_computes_what_is_written_out(how: How, single: bool) -> None:
    q, k, v, of = asked(torch.Generator().manual_seed(0), torch.bfloat16, single)
    exact = varlen.written_out(q.double(), k.double(), v.double(), of, how)
    on_gpu = Sequences(of.starts.cuda(), of.used.cuda(), of.pages.cuda(), of.longest)
    got = varlen.attend(q.cuda(), k.cuda(), v.cuda(), on_gpu, how)
    torch.testing.assert_close(got.cpu().double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is for GPUs")
@pytest.mark.parametrize("layout", ["filled", "single"])
def test_on_a_gpu_in_bf16_it_is_the_same_within_rounding(
    layout: LayoutName, calls: list[Sequences], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pages, "page", 256)
    block = torch.nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True)
    loop = ad.RecurrentWrapper(ad.CausalEncoder(block), 3).eval()
    x, mask = torch.randn(3, 300, 64), torch.rand(3, 300) > 0.3
    depth: dict[str, Any] = {"max_depth": torch.randint(1, 4, (3, 300))}
    outs = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        loop, cache = loop.to(device, dtype), ad.KVReuseCache(layout)
        parts = []
        for piece in (slice(0, 290), slice(290, 298), slice(298, 299), slice(299, 300)):
            more = {"mask": mask[:, piece].to(device), "max_depth": depth["max_depth"][:, piece].to(device)}
            parts.append(loop(x[:, piece].to(device, dtype), cache=cache, **more).hidden)
        outs.append(torch.cat(parts, 1).cpu().double())
    assert calls
    torch.testing.assert_close(outs[1], outs[0], rtol=5e-2, atol=5e-2)


PLAIN = How(0.0, None, True, None, None, None)


def test_what_the_call_has_not_is_left_to_groups_of_rows() -> None:
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    assert varlen.serves(q, k, v, PLAIN)
    others: list[dict[str, Any]] = [
        {"dropout_p": 0.1},
        {"softcap": 1.0},
        {"sinks": torch.zeros(4)},
        {"enable_gqa": False},
    ]
    assert not any(varlen.serves(q, k, v, PLAIN._replace(**other)) for other in others)
    assert not varlen.serves(q.requires_grad_(), k, v, PLAIN)
