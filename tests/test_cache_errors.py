"""What a cache refuses, message by message; and that neither an error nor a NaN leaves a mark in it."""
# Messages stand whole.
# ruff: noqa: E501

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from blocks_zoo import DIM, PreNorm, heads_of, looped, merged
from cached import EXACT, LAYOUTS, layouts, rows
from cases import in_turn
from narrow import the
from torch import Tensor, nn

import adadepth as ad
from adadepth.cache.kv_reuse import LayoutName

LENGTHS = [3, 4, 2]  # what the rows of `filled_cache` hold


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def deep_loop(layers: int = 2, **options: Any) -> ad.RecurrentWrapper:
    """Four iterations, whose tokens leave all over them."""
    loop = looped("attention")
    loop.block = nn.Sequential(*(PreNorm(DIM, True) for _ in range(layers)))
    for name, value in options.items():
        setattr(loop, name, value)
    return loop.double().eval()


LOOP = deep_loop()


def filled_cache(layout: LayoutName, capacity: int | None = 6) -> ad.KVReuseCache:
    cache = ad.KVReuseCache(layout=layout, capacity=capacity)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 0]]).bool()
    LOOP(torch.linspace(-1, 1, 3 * 4 * DIM, dtype=torch.float64).sin().view(3, 4, DIM), mask=mask, cache=cache)
    assert cache.lengths.tolist() == LENGTHS
    return stored(cache)


def stored(cache: ad.KVReuseCache) -> ad.KVReuseCache:
    """As read from a file: it no longer knows which wrapper filled it."""
    return pickle.loads(pickle.dumps(cache))


def assert_equal_caches(got: ad.KVReuseCache, want: ad.KVReuseCache) -> None:
    """In their own account, and in what follows."""
    assert torch.equal(got.lengths, want.lengths) and torch.equal(got.depth, want.depth)
    assert (got.steps, got.layers) == (want.steps, want.layers)
    got, want = copy.deepcopy(got), copy.deepcopy(want)
    for new in rows(len(want.lengths), 2).split(1, 1):
        a, b = LOOP(new, cache=got), LOOP(new, cache=want)
        assert torch.equal(a.trace.live, b.trace.live) and torch.equal(a.hidden, b.hidden)


class Narrow(nn.Module):
    """As many layers as `LOOP`, with other heads."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width, self.weight = heads, width, nn.Parameter(torch.ones(DIM, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            h = heads_of((x * self.weight)[..., : self.heads * self.width], self.heads)
            out = merged(F.scaled_dot_product_attention(h, h, h, is_causal=True))
            x = x + F.pad(out, (0, DIM - out.shape[-1]))
        return x


X = torch.randn(3, 1, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def with_gradients(cache: ad.KVReuseCache) -> None:
    with torch.enable_grad():
        LOOP(X, cache=cache)


# What is refused by a cache that holds rows of 3, 4 and 2 tokens, of at most 6
ERRORS: dict[str, tuple[Callable[[ad.KVReuseCache], object], str]] = {
    "batch": (
        lambda cache: LOOP(X[:2], cache=cache),
        "The cache holds 3 rows, got a batch of 2. Begin with a new cache or cache.reset(), or choose rows with cache.reorder(rows).",
    ),
    "steps": (
        lambda cache: deep_loop(steps=3)(X, cache=cache),
        "The cache was filled by a loop of 4 steps, got one of 3. Each RecurrentWrapper needs a cache of its own.",
    ),
    "fewer layers": (
        lambda cache: deep_loop(layers=1)(X, cache=cache),
        "Iteration 0 made 1 instead of the 2 attention calls that the cache holds (a cache belongs to one wrapper). A "
        "looped block must call attention equally often every time, because the order of the calls tells which layer "
        "each belongs to.",
    ),
    "more layers": (
        lambda cache: deep_loop(layers=3)(X, cache=cache),
        "Iteration 0 made more than the 2 attention calls that the cache holds (a cache belongs to one wrapper). A "
        "looped block must call attention equally often every time, because the order of the calls tells which layer "
        "each belongs to.",
    ),
    "dtype": (
        lambda cache: deep_loop().float()(X.float(), cache=cache),
        "The cache holds keys of dtype torch.float64 in attention call 0, got torch.float32. A cache belongs to one "
        "wrapper, which must not change in between: cast and move it first, then begin with a new cache or "
        "cache.reset().",
    ),
    "heads": (
        lambda cache: deep_loop(block=Narrow(4, 2))(X, cache=cache),
        "The cache holds keys of (kv_heads, head_dim) (2, 4) in attention call 0, got (4, 2). A cache belongs to one "
        "wrapper, which must not change in between: cast and move it first, then begin with a new cache or "
        "cache.reset().",
    ),
    "head_dim": (
        lambda cache: deep_loop(block=Narrow(2, 2))(X, cache=cache),
        "The cache holds keys of (kv_heads, head_dim) (2, 4) in attention call 0, got (2, 2). A cache belongs to one "
        "wrapper, which must not change in between: cast and move it first, then begin with a new cache or "
        "cache.reset().",
    ),
    "capacity": (
        lambda cache: LOOP(X.expand(3, 3, DIM), cache=cache),
        "KVReuseCache(capacity=6) is too small: with the new tokens its longest row would hold 7. Give it the capacity of prompt and new tokens together, or None.",
    ),
    "causal": (
        lambda cache: ad.RecurrentWrapper(PreNorm(DIM, False).double(), 4, causal=False)(X, cache=cache),
        "A KVReuseCache expected RecurrentWrapper(causal=True), got causal=False: the tokens that it holds would have "
        "to attend to the new ones. Run without a cache.",
    ),
    "gradients": (
        with_gradients,
        "A KVReuseCache is for inference, but the keys and values require gradients, which it would lose. Run the pass under torch.no_grad() or torch.inference_mode(), or without a cache.",
    ),
    "crop negative": (lambda cache: cache.crop(-1), "crop expected lengths of 0 or more, got -1."),
    "crop negative row": (
        lambda cache: cache.crop(torch.tensor([1, -1, 2])),
        "crop expected lengths of 0 or more, got tensor([ 1, -1,  2]).",
    ),
    "crop rows": (
        lambda cache: cache.crop(torch.tensor([1, 2])),
        "crop expected an int, or integers of shape (batch,) = (3,), got (2,) torch.int64.",
    ),
    "crop axes": (
        lambda cache: cache.crop(torch.tensor([[1], [2], [3]])),
        "crop expected an int, or integers of shape (batch,) = (3,), got (3, 1) torch.int64.",
    ),
    "crop fractions": (
        lambda cache: cache.crop(torch.tensor([1.0, 2.0, 3.0])),
        "crop expected an int, or integers of shape (batch,) = (3,), got (3,) torch.float32.",
    ),
    "crop bools": (
        lambda cache: cache.crop(torch.tensor([True, False, True])),
        "crop expected an int, or integers of shape (batch,) = (3,), got (3,) torch.bool.",
    ),
    "reorder axes": (
        lambda cache: cache.reorder(torch.tensor([[0, 1]])),
        "reorder expected row numbers of shape (new_batch,), integers, got (1, 2) torch.int64.",
    ),
    "reorder fractions": (
        lambda cache: cache.reorder(torch.tensor([0.0, 1.0])),
        "reorder expected row numbers of shape (new_batch,), integers, got (2,) torch.float32.",
    ),
    "reorder bools": (
        lambda cache: cache.reorder(torch.tensor([True, False, True])),
        "reorder expected row numbers of shape (new_batch,), integers, got (3,) torch.bool.",
    ),
    "reorder with a list": (
        lambda cache: cache.reorder([1, 0]),  # type: ignore[arg-type]
        "reorder expected row numbers of shape (new_batch,), integers, got list.",
    ),
    "reorder beyond": (
        lambda cache: cache.reorder(torch.tensor([0, 3])),
        "reorder expected numbers of the 3 rows that are held, from 0, got [0, 3].",
    ),
    "reorder negative": (
        lambda cache: cache.reorder(torch.tensor([0, -1])),
        "reorder expected numbers of the 3 rows that are held, from 0, got [0, -1].",
    ),
    "mask": (
        lambda cache: LOOP(X, mask=torch.ones(3, 2, dtype=torch.bool), cache=cache),
        "mask expected shape (batch, seq) = (3, 1) and dtype torch.bool, True for real tokens, got (3, 2) torch.bool. "
        "With a cache, pass the mask of the new tokens only: mask[:, -1:].",
    ),
    "budget": (lambda cache: LOOP(X, max_depth=5, cache=cache), "max_depth expected an int from 1 to steps=4, got 5."),
}


@pytest.mark.plain
@pytest.mark.parametrize(("name", "layout"), in_turn([(name,) for name in ERRORS], LAYOUTS))
def test_a_refusal_teaches_and_leaves_the_cache_as_it_was(name: str, layout: LayoutName) -> None:
    call, message = ERRORS[name]
    cache, twin = filled_cache(layout), filled_cache(layout)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(cache)
    assert_equal_caches(cache, twin)


def pointwise_cache() -> ad.KVReuseCache:
    """Of a block that never attends."""
    cache = ad.KVReuseCache()
    looped("pointwise")(X, cache=cache)
    return stored(cache)


# What is refused by a cache that holds nothing yet, or no keys
NEW: dict[str, tuple[Callable[[], object], str]] = {
    "layout": (
        lambda: ad.KVReuseCache(layout="dense"),  # type: ignore[arg-type]
        "KVReuseCache expected layout to be one of ('filled', 'compact', 'single'), got 'dense'.",
    ),
    "capacity": (
        lambda: ad.KVReuseCache(capacity=0),
        "KVReuseCache needs capacity >= 1, or None to grow, got capacity=0.",
    ),
    "a capacity that is a bool": (
        lambda: ad.KVReuseCache(capacity=True),
        "KVReuseCache needs capacity >= 1, or None to grow, got capacity=True.",
    ),
    "a capacity that is no number": (
        lambda: ad.KVReuseCache(capacity="8"),  # type: ignore[arg-type]
        "KVReuseCache needs capacity >= 1, or None to grow, got capacity='8'.",
    ),
    "reorder": (
        lambda: ad.KVReuseCache().reorder(torch.tensor([0])),
        "reorder expected numbers of the 0 rows that are held, from 0, got [0].",
    ),
    "gradients": (
        lambda: with_gradients(ad.KVReuseCache()),
        "A KVReuseCache is for inference, but the keys and values require gradients, which it would lose. Run the pass under torch.no_grad() or torch.inference_mode(), or without a cache.",
    ),
    "layers of a block that does not attend": (
        lambda: LOOP(X, cache=pointwise_cache()),
        "Iteration 0 made more than the 0 attention calls that the cache holds (a cache belongs to one wrapper). A "
        "looped block must call attention equally often every time, because the order of the calls tells which layer "
        "each belongs to.",
    ),
    "first pass": (
        lambda: LOOP(X.expand(3, 3, DIM), cache=ad.KVReuseCache(capacity=2)),
        "KVReuseCache(capacity=2) is too small: with the new tokens its longest row would hold 3. Give it the capacity of prompt and new tokens together, or None.",
    ),
}


@pytest.mark.plain
@pytest.mark.parametrize("name", NEW)
def test_an_empty_cache_refuses(name: str) -> None:
    call, message = NEW[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


class Stop(Exception):
    """What goes wrong in the middle of a pass."""


class Faulty(nn.Module):
    """A piece that does its work until iteration `at`."""

    def __init__(self, piece: nn.Module, at: int, fault: Callable[[Any], Any]) -> None:
        super().__init__()
        self.piece, self.at, self.fault = piece, at, fault

    def forward(self, *args: Any) -> Any:
        result = self.piece(*args)
        step = int(ad.iteration().max()) if len(args) == 1 else args[-1]
        return self.fault(result) if step == self.at else result


def stop(result: object, error: type[BaseException] = Stop) -> None:
    raise error


def layer(n: int, fault: Callable[[Any], Any]) -> Callable[[ad.RecurrentWrapper, int], None]:
    def break_(loop: ad.RecurrentWrapper, at: int) -> None:
        block = the(nn.Sequential, loop.block)
        block[n] = Faulty(block[n], at, fault)

    return break_


def gate(loop: ad.RecurrentWrapper, at: int) -> None:
    loop.gate = Faulty(the(nn.Module, loop.gate), at, lambda score: score * torch.nan)  # type: ignore[assignment]


def update(loop: ad.RecurrentWrapper, at: int) -> None:
    loop.update = Faulty(loop.update, at, lambda x: x[..., :3])  # type: ignore[assignment]


def rule(loop: ad.RecurrentWrapper, at: int) -> None:
    inner = loop.rule
    assert inner is not None
    loop.rule = lambda scores, *rest: inner(scores, *rest)[:, : -1 if scores.shape[-1] == at + 1 else None]


FAULTS: dict[str, tuple[Callable[[ad.RecurrentWrapper, int], None], type[BaseException]]] = {
    "layer 0": (layer(0, stop), Stop),
    "layer 1": (layer(1, stop), Stop),
    "interrupt": (layer(0, lambda result: stop(result, KeyboardInterrupt)), KeyboardInterrupt),
    "state of another shape": (layer(1, lambda h: h[..., :3]), ValueError),
    "attention once more": (layer(1, lambda h: PreNorm(DIM, True).double()(h)), ValueError),
    "gate": (gate, ValueError),
    "update": (update, ValueError),
    "rule": (rule, ValueError),
}


# Each fault at both places in every layout: one or the other in each, and the rest for `make test-every`.
ENDS = [
    pytest.param(name, at, layout, marks=[pytest.mark.every] if (i + j + k) % 2 else [])
    for i, name in enumerate(FAULTS)
    for j, at in enumerate((0, 2))
    for k, layout in enumerate((*EXACT, "single"))
]


@pytest.mark.parametrize(("name", "at", "layout"), ENDS)
def test_a_pass_that_ends_in_the_middle_did_not_happen(name: str, at: int, layout: LayoutName) -> None:
    loop, (break_, error) = deep_loop(), FAULTS[name]
    break_(loop, at)
    for capacity in (6, None):
        cache, twin = filled_cache(layout, capacity), filled_cache(layout, capacity)
        new = ad.KVReuseCache(layout=layout, capacity=capacity)
        for broken in (cache, new):
            mask = torch.rand(3, 6) > 0.7
            mask[:, 0] = True
            mask &= mask.cumsum(1) <= 2
            with pytest.raises(error):
                loop(rows(3, 6), mask=mask, cache=broken, min_depth=torch.tensor([[4], [1], [4]]))
        assert_equal_caches(cache, twin)
        assert new.lengths.shape == (0,) and new.steps is None
        x = rows(2, 3)  # as new: of another batch
        assert torch.equal(LOOP(x, cache=new).hidden, LOOP(x, cache=ad.KVReuseCache(layout=layout)).hidden)


@layouts
@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float, capacity: int | None, layout: LayoutName) -> None:
    loop = deep_loop().train()  # where a NaN score does not raise
    first, second, third = rows(3, 2), rows(3, 4), rows(3, 1)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    dirty, clean = (ad.KVReuseCache(layout=layout, capacity=capacity) for _ in range(2))
    for cache, value in ((dirty, bad), (clean, 0.5)):
        loop(first, cache=cache)
        spoilt = second.clone()
        spoilt[0] = value
        spoilt[~mask] = value
        out = loop(spoilt, mask=mask, cache=cache, min_depth=torch.tensor([[4], [1], [1]])).hidden
        assert bool(out[0].isfinite().any()) == (cache is clean)
        assert bool(out[1:].isfinite().all())
    assert_rows_equal(loop, dirty, clean, third, [1, 2])
    for cache in (dirty, clean):
        cache.reorder(torch.tensor([1, 0, 2, 1]))
    assert_rows_equal(loop, dirty, clean, rows(4, 3), [0, 2, 3])
    cropped, dropped = (copy.deepcopy(dirty), copy.deepcopy(clean)), (dirty, clean)
    for cache in cropped:
        cache.crop(torch.tensor([9, 2, 9, 9]))
    assert_rows_equal(loop, *cropped, rows(4, 5), [0, 1, 2, 3])
    for cache in dropped:
        cache.reorder(torch.tensor([0, 2]))
    assert_rows_equal(loop, *dropped, rows(2, 5), [0, 1])


@layouts
def test_a_slot_that_was_never_filled_is_finite(layout: LayoutName) -> None:
    """Also where every slot was filled, by a row that is not finite, when rows were dropped and before more came."""
    loop = deep_loop().train()
    prompt, later = rows(4, 2), torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    dirty, clean = (ad.KVReuseCache(layout=layout) for _ in range(2))
    x, y = rows(3, 6), rows(3, 1)
    for cache in (dirty, clean):
        loop(prompt.index_fill(0, torch.tensor([0]), torch.nan if cache is dirty else 0.5), cache=cache)
        cache.reorder(torch.tensor([0, 1, 2]))
        loop(x, mask=later, cache=cache)
    assert_rows_equal(loop, dirty, clean, y, [1, 2])


def assert_rows_equal(
    loop: ad.RecurrentWrapper, got: ad.KVReuseCache, want: ad.KVReuseCache, x: Tensor, which: list[int]
) -> None:
    """After the same tokens, on copies."""
    a, b = (loop(x, cache=copy.deepcopy(cache)) for cache in (got, want))
    assert torch.equal(a.trace.live[which], b.trace.live[which]) and torch.equal(a.hidden[which], b.hidden[which])


@layouts
def test_a_score_that_is_nan_leaves_the_cache_as_it_was(layout: LayoutName) -> None:
    cache, twin = filled_cache(layout), filled_cache(layout)
    x = rows(3, 2)
    x[0] = torch.nan
    with pytest.raises(ValueError, match="scored NaN at iteration 0"):
        LOOP(x, cache=cache)
    assert_equal_caches(cache, twin)


def test_a_capacity_may_be_an_integer_of_numpy() -> None:
    assert ad.KVReuseCache(capacity=np.int64(8)).capacity == 8  # type: ignore[arg-type]
