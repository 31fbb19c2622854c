"""How often the host waits for a device, and how many operators it launches: ceilings, on a stand-in for a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stand_in import DEVICE, Counts, counting, stand_in, uncounted
from stand_in_scenarios import loop_of, rows
from torch import Tensor

import adadepth as ad
from adadepth.attention import varlen


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
