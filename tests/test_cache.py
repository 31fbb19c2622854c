"""Prefill and decode with a cache against their definition: one full forward, however it is cut."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from blocks_zoo import DEEP, DIM, Kind, looped, mixed
from cached import EXACT, LAYOUTS, assert_equal_outputs, assert_holds, exact, layouts, rows
from cases import Case, Setting, assert_same, by_definition, cases, examples, in_turn, of_its_own, setting
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import adadepth as ad
from adadepth.cache.kv_reuse import LayoutName

every = pytest.mark.parametrize("kind", DEEP)
each = pytest.mark.parametrize(("kind", "layout"), in_turn([(kind,) for kind in DEEP], LAYOUTS))


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def joined(parts: list[oracle.Result]) -> oracle.Result:
    return oracle.Result(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


class Cut(NamedTuple):
    """How the columns come: a piece ends at each of `ends`, and what is left is the last."""

    ends: list[int]
    layout: LayoutName
    fits: bool  # whether the cache is told how much will come
    skip: bool

    def cache(self, seq: int) -> ad.KVReuseCache:
        return ad.KVReuseCache(layout=self.layout, capacity=seq if self.fits else None)

    def pieces(self, s: Setting) -> list[Setting]:
        seq = s.x.shape[1]
        edges = [0, *sorted(min(end, seq) for end in self.ends), seq]
        return [s.piece(first, last) for first, last in itertools.pairwise(edges)]


def cuts(*names: str) -> st.SearchStrategy[Cut]:
    """Pieces of 0, 1 and more columns; or one column at a time."""
    ends = st.one_of(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.just(list(range(1, 6))))
    return st.builds(Cut, ends=ends, layout=st.sampled_from(names), fits=st.booleans(), skip=st.booleans())


def cached(s: Setting, cut: Cut) -> tuple[oracle.Result, ad.KVReuseCache]:
    loop, cache = ad.RecurrentWrapper(**s.pieces, skip=cut.skip).eval(), cut.cache(s.x.shape[1])
    return joined([piece.run(loop, cache=cache) for piece in cut.pieces(s)]), cache


@every
@pytest.mark.parametrize(
    ("only_mixed", "examples"), [(True, 4), (False, 3), pytest.param(True, 30, marks=pytest.mark.every)]
)
def test_prefill_in_every_split_and_decode_is_one_full_forward(kind: str, only_mixed: bool, examples: int) -> None:
    @of_its_own(kind, examples)
    @given(case=cases(causal=[True]), cut=cuts(*EXACT))
    def check(case: Case, cut: Cut) -> None:
        s = setting(DEEP[kind], case, torch.float64)
        want = by_definition(DEEP[kind], case, s)
        assume(mixed(want.live) or not only_mixed)
        got, cache = cached(s, cut)
        assert_same(got._asdict(), want._asdict(), 1e-10, 1e-13)
        assert_holds(cache, want.live.sum(-1))

    check()


@examples(4, 20)
@pytest.mark.parametrize("kind", ["attention", "grouped-query", "encoder", "view", "window"])
def test_the_same_in_float32(kind: str, examples: int) -> None:
    @of_its_own(kind, examples)
    @given(
        case=cases(["threshold", "threshold per row", "lookahead threshold"], causal=[True]), cut=cuts(*EXACT, "single")
    )
    def check(case: Case, cut: Cut) -> None:
        s = setting(DEEP[kind], case, torch.float32)
        want = piecewise(DEEP[kind], case, s, cut)
        # Rounding differs between the two, so a score within rounding of tau may flip.
        assume(bool(((want.scores - torch.as_tensor(s.tau).reshape(-1, 1, 1)).abs() > 1e-4).all()))
        assert_same(cached(s, cut)[0]._asdict(), want._asdict(), 1e-5, 1e-6)

    check()


def piecewise(kind: Kind, case: Case, s: Setting, cut: Cut) -> oracle.Result:
    """By definition: only the layout "single" knows where the pieces end."""
    if cut.layout != "single":
        return by_definition(kind, case, s)
    past = oracle.Past()
    return joined([by_definition(kind, case, piece, past) for piece in cut.pieces(s)])


@examples(4, 20)
@every
def test_single_shows_each_earlier_token_s_newest_iteration(kind: str, examples: int) -> None:
    lossy = 0

    @of_its_own(kind, examples)
    @given(case=cases(causal=[True]), cut=cuts("single"))
    def check(case: Case, cut: Cut) -> None:
        nonlocal lossy
        s = setting(DEEP[kind], case, torch.float64)
        want = piecewise(DEEP[kind], case, s, cut)
        assume(mixed(want.live))
        got, cache = cached(s, cut)
        assert_same(got._asdict(), want._asdict(), 1e-10, 1e-13)
        assert_holds(cache, want.live.sum(-1))
        lossy += not torch.allclose(want.hidden, by_definition(DEEP[kind], case, s).hidden)

    check()
    assert lossy >= 2 or kind == "pointwise"


@every
@pytest.mark.parametrize("steps", [1, 4])
def test_single_is_exact_where_every_token_runs_once(kind: str, steps: int) -> None:
    block = DEEP[kind].make(DIM, True).double()
    loop, x = ad.RecurrentWrapper(block, steps, rule=ad.Threshold(1.1)), rows(3, 6)
    cache = ad.KVReuseCache(layout="single")
    got = torch.cat([loop(part, cache=cache).hidden for part in x.split([3, 1, 2], 1)], 1)
    torch.testing.assert_close(got, loop(x).hidden, rtol=1e-10, atol=1e-12)


@each
def test_a_row_alone_is_the_row_in_any_batch(kind: str, layout: LayoutName) -> None:
    loop, x, mask = looped(kind, zoo=DEEP), 2 * rows(4, 9), torch.rand(4, 9) > 0.3
    mask[3] = False
    parts = [slice(0, 4), slice(4, 5), slice(5, 7), slice(7, 8), slice(8, 9)]

    def run(which: Tensor) -> ad.Output:
        cache = ad.KVReuseCache(layout=layout)
        outs = [loop(x[which, part], mask=mask[which, part], cache=cache) for part in parts]
        trace = ad.Trace(*(torch.cat(t, 1) for t in zip(*(out.trace for out in outs), strict=True)))
        return ad.Output(torch.cat([out.hidden for out in outs], 1), trace)

    together = run(torch.arange(4))
    assert mixed(together.trace.live)
    for which in ([1], [3], [2, 3, 0, 0]):
        want = ad.Trace(*(t[which] for t in together.trace))
        assert_equal_outputs(run(torch.tensor(which)), ad.Output(together.hidden[which], want))


@each
def test_future_tokens_change_nothing(kind: str, layout: LayoutName) -> None:
    loop, x, y = looped(kind, zoo=DEEP), rows(3, 8), rows(3, 8)
    y[:, :5] = x[:, :5]
    caches = ad.KVReuseCache(layout=layout), ad.KVReuseCache(layout=layout)
    for cache in caches:
        loop(x[:, :3], cache=cache)
    got, want = (loop(t[:, 3:], cache=cache) for t, cache in zip((x, y), caches, strict=True))
    assert torch.equal(got.trace.live[:, :2], want.trace.live[:, :2])
    torch.testing.assert_close(got.hidden[:, :2], want.hidden[:, :2], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(got.hidden[:, 2:], want.hidden[:, 2:])
    for cache in caches:
        cache.crop(5)
    new = rows(3, 1)
    assert_equal_outputs(loop(new, cache=caches[0]), loop(new, cache=caches[1]))


@pytest.mark.parametrize(
    ("kind", "skip", "layout"), in_turn([*((kind, True) for kind in DEEP), ("attention", False)], LAYOUTS)
)
def test_the_block_is_given_the_tokens_that_run_and_no_others(kind: str, layout: LayoutName, skip: bool) -> None:
    loop, cache = looped(kind, zoo=DEEP, skip=skip), ad.KVReuseCache(layout=layout)
    seen: list[tuple[list[int], list[int]]] = []
    loop.block.register_forward_pre_hook(
        lambda block, args: seen.append((ad.iteration().flatten().tolist(), ad.positions().flatten().tolist()))
    )
    held = torch.zeros(4, 1, dtype=torch.int64)
    for columns in (5, 1, 3, 1, 1):
        mask = torch.rand(4, columns) > 0.4
        live = loop(rows(4, columns), mask=mask, cache=cache).trace.live
        places = held + mask.cumsum(1) - 1
        want = [([step] * int(runs.sum()), places[runs].tolist()) for step, runs in enumerate(live.unbind(-1))]
        assert [call for call in seen if call[0]] == [call for call in want if call[0]]
        seen.clear()
        held += mask.sum(1, keepdim=True)
    loop(rows(4, 2), mask=torch.zeros(4, 2, dtype=torch.bool), cache=cache)
    assert not any(iterations for iterations, _ in seen)


@exact
def test_the_loop_s_steps_are_kept_where_a_first_pass_is_shorter(layout: LayoutName) -> None:
    loop, cache, x = looped("attention", zoo=DEEP), ad.KVReuseCache(layout=layout), rows(2, 6)
    loop(x[:, :3], cache=cache, max_depth=1)
    assert (cache.steps, cache.layers) == (4, 2)
    got = loop(x[:, 3:], cache=cache)
    want = loop(x, max_depth=torch.tensor([[1, 1, 1, 4, 4, 4]]))
    assert mixed(got.trace.live)
    torch.testing.assert_close(got.hidden, want.hidden[:, 3:], rtol=1e-10, atol=1e-12)


@layouts
def test_a_new_cache_holds_nothing(layout: LayoutName) -> None:
    cache = ad.KVReuseCache(layout=layout)
    assert cache.lengths.shape == (0,) and cache.lengths.dtype == torch.int64
    assert (cache.steps, cache.layers) == (None, 0)
    assert cache.nbytes == 0


class Counting(torch.nn.Module):
    """Cannot run on no tokens, as a block cannot that lets torch infer an axis."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        q = x.view(*x.shape[:-1], -1, 2).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


@layouts
def test_a_pass_in_which_nothing_runs_costs_nothing(layout: LayoutName) -> None:
    loop, x = ad.RecurrentWrapper(Counting(), 2), rows(2, 6)
    mask = torch.tensor([[False, False, True, True, False, True]] * 2)
    cache = ad.KVReuseCache(layout=layout)
    parts = [
        loop(x[:, cut], mask=mask[:, cut], cache=cache) for cut in (slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 6))
    ]
    assert loop.block.calls == 4  # two passes of two iterations
    assert cache.lengths.tolist() == [3, 3]
    assert not parts[0].hidden.any() and not parts[2].trace.live.any()
    if layout != "single":
        want = loop(x, mask=mask)
        torch.testing.assert_close(torch.cat([part.hidden for part in parts], 1), want.hidden, rtol=1e-10, atol=1e-12)


def test_a_cache_keeps_nothing_in_the_loop_beside_itself() -> None:
    held = []

    class Watching(torch.nn.Module):
        takes_view = True

        def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
            q = x.unflatten(-1, (2, -1)).transpose(1, 2)
            out = view.attend(q, q, q).transpose(1, 2).flatten(2)
            held.append((view.past, view.present))
            return out

    loop = ad.RecurrentWrapper(Watching(), 3, rule=ad.Threshold(0.5))
    loop(rows(2, 4), cache=ad.KVReuseCache())
    assert held == [(None, [])] * 3


@layouts
def test_two_caches_of_one_loop_are_two(layout: LayoutName) -> None:
    loop, x = looped("attention", zoo=DEEP), [rows(2, 6), rows(2, 6)]
    apart = []
    for t in x:
        cache = ad.KVReuseCache(layout=layout)
        apart.append([loop(part, cache=cache) for part in t.split([3, 1, 2], 1)])
    caches = ad.KVReuseCache(layout=layout), ad.KVReuseCache(layout=layout)
    for n, columns in enumerate((slice(0, 3), slice(3, 4), slice(4, 6))):
        for t, cache, want in zip(x, caches, apart, strict=True):
            assert_equal_outputs(loop(t[:, columns], cache=cache), want[n])


@layouts
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_frozen_loop_needs_no_mode(layout: LayoutName, mode: Callable[[], Any]) -> None:
    loop, x = looped("encoder", zoo=DEEP).requires_grad_(False), rows(2, 6)
    results = []
    for context in (torch.no_grad, mode):
        cache = ad.KVReuseCache(layout=layout)
        with context():
            results.append([loop(part, cache=cache) for part in x.split([3, 1, 2], 1)])
    for got, want in zip(*results, strict=True):
        assert_equal_outputs(got, want)


@layouts
def test_keys_of_a_lower_precision_than_the_state_are_kept_as_they_are(layout: LayoutName) -> None:
    loop, x = looped("attention", zoo=DEEP).float(), rows(2, 6).float()
    loop.rule = None
    cache = ad.KVReuseCache(layout=layout)
    with torch.autocast("cpu", torch.bfloat16):
        want = loop(x).hidden
        got = torch.cat([loop(part, cache=cache).hidden for part in x.split([3, 1, 2], 1)], 1)
    assert got.dtype == torch.float32
    if layout != "single":
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.05)


class ViewsHeads(torch.nn.Module):
    """Takes the answers for a token's heads for one axis without a copy, which their memory must allow."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + out.transpose(1, 2).view(x.shape)


@layouts
def test_answers_lie_in_memory_token_by_token(layout: LayoutName) -> None:
    loop = ad.RecurrentWrapper(ViewsHeads().double(), 3).eval()
    x, mask, depth = rows(4, 9), torch.rand(4, 9) > 0.3, torch.randint(1, 4, (4, 9))
    cache = ad.KVReuseCache(layout)
    for columns in (slice(0, 3), slice(3, 4), slice(4, 7), slice(7, 9)):
        loop(x[:, columns], mask=mask[:, columns], max_depth=depth[:, columns], cache=cache)
    loop(x[:, :1], cache=cache)
