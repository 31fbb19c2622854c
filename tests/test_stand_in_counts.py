"""How often the host waits for a device, and how many operators it launches: ceilings, on a stand-in for a GPU."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from blocks_zoo import DIM, PreNorm
from stand_in import DEVICE, Counts, counting, stand_in, uncounted
from stand_in_scenarios import STEPS, loop_of, rows
from torch import Tensor, nn

import adadepth as ad
from adadepth import _vocabulary
from adadepth.attention import flex, varlen
from adadepth.attention.how import How


def test_waits_are_counted_by_place() -> None:
    with stand_in(), counting() as counts:
        x = torch.arange(4, device=DEVICE)
        for wait in (
            lambda: x.tolist(),
            lambda: bool(x.any()),
            lambda: x.nonzero(),
            lambda: x[x > 1],
            lambda: x.unique(),
            lambda: x.bincount(),
            lambda: torch.equal(x, x),
            lambda: x.repeat_interleave(x),
            lambda: x.masked_select(x > 1),
            lambda: x.cpu(),
        ):
            before = counts.waits.total()
            wait()
            assert counts.waits.total() == before + 1
        both = counts.waits.total(), counts.sent.total()
        x[x > 1] = 0
        x.repeat_interleave(x, output_size=1)
        torch.nonzero_static(x, size=2)
        assert (counts.waits.total(), counts.sent.total()) == both
        torch.tensor([1, 2], device=DEVICE)
        assert counts.sent.total() == both[1] + 1
        x.view(2, 2).T.unsqueeze(0)
        assert counts.operators.total() == sum(counts.operators.values()) and "view" not in counts.operators
        assert ad.is_monotonic(torch.ones(2, 3, dtype=torch.bool, device=DEVICE))
    assert [place for place in counts.waits if place != "outside"] == ["masks.py:21 is_monotonic"]


def counted(call: Callable[..., None], padded: bool, **options: Any) -> Counts:
    """Of one call with a stack of two layers and four iterations, on 8 rows of 16 tokens."""
    with stand_in(), torch.set_grad_enabled(call is train):
        one_call = options.pop("one_call", False)
        looped = loop_of(DEVICE, kind="stack", **options).train(call is train)
        looped.one_call = one_call
        torch.manual_seed(2)
        x = rows(DEVICE, 8, 16)
        mask = torch.arange(16, device=DEVICE) >= torch.arange(8, device=DEVICE).unsqueeze(1)
        with counting() as counts:
            call(looped, x, mask if padded else None)
    return counts


def decode(looped: ad.RecurrentWrapper, x: Tensor, mask: Tensor) -> None:
    """A token for each row behind prompts, which are not counted."""
    cache = ad.KVReuseCache(capacity=32)
    with uncounted():
        looped(x[:, :15], mask=mask[:, :15], cache=cache)
    looped(x[:, 15:], cache=cache)


def train(looped: ad.RecurrentWrapper, x: Tensor, mask: Tensor | None) -> None:
    looped(x, mask=mask).hidden.sum().backward()


def evaluate(looped: ad.RecurrentWrapper, x: Tensor, mask: Tensor | None) -> None:
    looped(x, mask=mask)


# Call, padded, options of the wrapper: no more waits of the host, copies to the device and operators than these.
CEILINGS: dict[str, tuple[Any, bool, dict[str, Any], tuple[int, int, int]]] = {
    "packed training": (train, False, {}, (3, 6, 1117)),
    "packed training, padded": (train, True, {}, (4, 8, 1363)),
    "dense training, padded": (train, True, {"skip": False}, (0, 0, 700)),
    "packed evaluation": (evaluate, False, {}, (3, 6, 484)),
    "packed evaluation, padded": (evaluate, True, {}, (4, 8, 608)),
    "decode at batch 8": (decode, True, {}, (3, 1, 397)),
    "decode at batch 8, one call": (decode, True, {"one_call": True}, (3, 1, 308)),
}


@pytest.mark.parametrize("name", CEILINGS)
def test_no_more_waits_and_operators_than(name: str) -> None:
    call, padded, options, ceilings = CEILINGS[name]
    counts = counted(call, padded, **options)
    got = counts.waits.total(), counts.sent.total(), counts.operators.total()
    assert all(number <= most for number, most in zip(got, ceilings, strict=True)), (got, counts)


LAYERS = 24


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(PreNorm(DIM, True) for _ in range(LAYERS))).double().to(DEVICE)


def by_hand(x: Tensor) -> Counts:
    """What four iterations of the same layers launch in a loop that knows no exits."""
    block, plain = layers(), F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        with mock.patch.object(F, "scaled_dot_product_attention", plain):  # counted as attention in a loop is
            return How(0.0, None, False, None, None, None).answer(q, k, v, None, is_causal)

    with counting() as counts, mock.patch.object(F, "scaled_dot_product_attention", attention):
        for _ in range(STEPS):
            x = block(x)
        x.sum().backward()
    return counts


def looped_with(depth: Tensor, backward: bool = True, **options: Any) -> Counts:
    """The same of a loop whose tokens have these depths."""
    looped = ad.RecurrentWrapper(layers(), STEPS)
    looped.self_check = False
    for name, value in options.items():
        setattr(looped, name, value)
    with counting() as counts, torch.set_grad_enabled(backward):
        out = looped(rows(DEVICE, 8, 16), max_depth=depth.to(DEVICE)).hidden
        if backward:
            out.sum().backward()
    return counts


EVEN = (torch.arange(16) % STEPS + 1).expand(8, 16)
UNEVEN = torch.tensor([([4] * (r // 2 + 1) + [3, 3] + [2] * (r % 3 + 1) + [1] * 16)[:16] for r in range(8)])


@pytest.mark.every
def test_operators_of_24_layers_against_a_loop_by_hand() -> None:
    """Rows that differ ask in groups, each in a call of its own: flex attention is for them."""
    with stand_in():
        hand = by_hand(rows(DEVICE, 8, 16)).operators.total()
        for depth, skip, most in ((EVEN, True, 1.15), (EVEN, False, 1.21), (UNEVEN, True, 1.78)):
            assert 1.0 < looped_with(depth, skip=skip).operators.total() / hand <= most, (skip, most)


def test_under_flex_attention_rows_that_differ_launch_no_more() -> None:
    def answered(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        assert more["block_mask"] is not None
        return q + k.sum() * v.sum()  # three operators

    with stand_in(), mock.patch.object(flex, "_attention", return_value=answered):
        counts = [looped_with(depth, backward=False, one_call=True).operators for depth in (EVEN, UNEVEN)]
    assert counts[0] == counts[1] and counts[0]["attention"] == LAYERS


def test_ponder_launches_few_operators() -> None:
    """As of 16 Ki tokens and 50,304 words, in as many chunks: both are a 32nd here, and the tile is a 1,024th."""
    with stand_in(), mock.patch.object(_vocabulary, "ELSEWHERE", _vocabulary.ELSEWHERE // 1024):
        torch.manual_seed(0)
        embedding, head = nn.Embedding(1572, 4, device=DEVICE), nn.Linear(4, 1572, bias=False, device=DEVICE)
        ponder = ad.Ponder(embedding, head)
        x, scores = torch.randn(1, 512, 4).to(DEVICE).requires_grad_(), torch.rand(1, 512, 1).to(DEVICE)
        with counting() as forward:
            out = ponder(x, x, x, scores, 0)
        with counting() as backward:
            out.sum().backward()
    assert forward.operators["log_"] == 4  # chunks
    assert forward.operators.total() <= 71 and backward.operators.total() <= 52


Key = tuple[Any, ...]


def key(part: Any) -> Key:
    """What a kernel's plan depends on."""
    if isinstance(part, Tensor):
        return tuple(part.shape), part.stride(), part.dtype
    return tuple(map(key, part)) if isinstance(part, tuple) else (part,)


@pytest.mark.parametrize("batch", [8, 32])
def test_a_cache_in_one_call_tells_the_device_nothing_and_asks_alike_for_each_token(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of other lengths and depths, 6 tokens each: the block never waits, nor sends; calls differ by live rows."""
    keys, attend = set[Key](), varlen.attend

    def noted(*args: Any) -> Tensor:
        keys.add(key(args))
        return attend(*args)

    monkeypatch.setattr(varlen, "attend", noted)
    with stand_in(), torch.no_grad(), counting() as counts:
        looped = loop_of(DEVICE, kind="stack").eval()
        looped.one_call = True
        inside = list[tuple[int, int]]()

        def note(*_: Any) -> None:
            inside.append((counts.waits.total(), counts.sent.total()))

        looped.block.register_forward_pre_hook(note)
        looped.block.register_forward_hook(note)
        x, cache = rows(DEVICE, batch, 26), ad.KVReuseCache(capacity=26)
        mask = torch.arange(20, device=DEVICE) >= torch.arange(batch, device=DEVICE).unsqueeze(1) % 17
        looped(x[:, :20], mask=mask, cache=cache)
        keys.clear()
        sizes = set[int]()
        for column in range(20, 26):
            sizes |= set(looped(x[:, column : column + 1], cache=cache).trace.live.sum((0, 1)).tolist())
    assert len(inside) > 6 * 2 and inside[::2] == inside[1::2]
    assert len(keys) == len(sizes - {0}) > 1
