"""How often the host waits for a device, and how many operators it launches: ceilings, on a stand-in for a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stand_in import DEVICE, Counts, counting, stand_in, uncounted
from stand_in_scenarios import loop_of, rows
from torch import Tensor

import adadepth as ad


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
        looped = loop_of(DEVICE, kind="stack", **options).train(call is train)
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
    "decode at batch 8": (decode, True, {}, (3, 5, 397)),
}


@pytest.mark.parametrize("name", CEILINGS)
def test_no_more_waits_and_operators_than(name: str) -> None:
    call, padded, options, ceilings = CEILINGS[name]
    counts = counted(call, padded, **options)
    got = counts.waits.total(), counts.sent.total(), counts.operators.total()
    assert all(number <= most for number, most in zip(got, ceilings, strict=True)), (got, counts)
