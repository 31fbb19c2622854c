"""The library on a stand-in for a GPU: what the CPU gives, and no tensor of the wrong device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stand_in import DEVICE, MixedDevices, counting, stand_in
from stand_in_checks import check, finds
from stand_in_scenarios import SCENARIOS
from torch import Tensor

import adadepth as ad
from adadepth import _vocabulary, calibration, criteria, diagnostics, gates, losses, selection
from adadepth import depths as ad_depths
from adadepth.attention import dense, how, packed, tokens
from adadepth.cache import grids, paged, view
from adadepth.loop import iterations
from adadepth.loop.bounds import Bounds
from adadepth.serving import batch
from adadepth.testing import pieces

# Of the products of gates and rules, of blocks and executions, of caches and blocks, and of the contract suites every
# third by default.
PRODUCTS = "loop", "block", "call", "cache", "serving", "helper: check_"
SOME = [
    pytest.param(name, marks=[pytest.mark.every] if name.startswith(PRODUCTS) and i % 3 else [])
    for i, name in enumerate(SCENARIOS)
]


@pytest.mark.parametrize("name", SOME)
def test_as_on_the_cpu(name: str) -> None:
    check(SCENARIOS[name])


# A function that gives a tensor of the CPU is a mistake in its room; found by the scenario.
PLANTED: dict[str, tuple[Any, str, str]] = {
    "attention, packed": (packed, "bias", "block: attention, causal False, skip True, mask ragged"),
    "attention, dense": (dense, "seen", "block: grouped-query, causal True, skip False, mask ragged"),
    "attention, tokens": (tokens, "positions_of", "block: view, causal False, skip False, mask ragged"),
    "attention, written out": (how.How, "_written_out", "block: softcap and sinks, causal True, skip True, mask none"),
    "cache, grids": (grids, "_part", "cache: filled, batch 3, attention"),
    "cache, pages": (paged, "sequences", "cache: in one call, filled, window"),
    "cache, views": (view, "seen", "cache: compact, batch 3, window"),
    "loop, bounds": (Bounds, "clamp", "call: ints, {'skip': True}"),
    "loop, iterations": (iterations, "_continuing", "loop: LinearGate, Threshold, True, Replace, none"),
    "serving": (batch, "joined", "serving: filled, Interpolate, PerIterationMLPGate"),
    "gates": (gates, "_chance", "helper: check_gate LinearGate"),
    "criteria": (criteria, "_doubt", "helper: calibrate a criterion"),
    "rules": (ad.SurvivalThreshold, "__call__", "helper: a threshold per row"),
    "updates": (ad.Interpolate, "forward", "helper: flops"),
    "Ponder": (_vocabulary, "_logits", "helper: check_update Ponder"),
    "losses": (losses, "_nats", "helper: per-iteration loss"),
    "selection": (selection, "_choose", "helper: penalties"),
    "depths": (ad_depths, "_draw", "helper: depths"),
    "masks": (ad, "depth_mask", "helper: selection and masks"),
    "calibration": (calibration, "_moved", "helper: calibrate"),
    "diagnostics": (diagnostics, "deciles", "helper: diagnostics"),
    "testing": (pieces, "drawn", "helper: check_gate LinearGate"),
}


@pytest.mark.parametrize("room", PLANTED)
def test_a_planted_mistake_is_found(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, scenario = PLANTED[room]
    finds(owner, name, SCENARIOS[scenario], monkeypatch)


def test_what_a_gpu_takes_of_the_cpu_and_what_not() -> None:
    with stand_in():
        x, number, places = torch.arange(6.0, device=DEVICE), torch.tensor(2.0), torch.tensor([0, 2])
        assert (x * number).device == x[places].device == torch.where(x > 3, x, number).device == DEVICE
        x[places] = number
        x.copy_(torch.zeros(6))
        mixing: list[Callable[[], Any]] = [
            lambda: x + torch.ones(6),
            lambda: torch.cat([x, number.view(1)]),
            lambda: torch.stack([x[0], number]),
            lambda: x.index_select(0, places),
            lambda: number.add_(x[0]),
            lambda: torch.ones(6)[x.long()],
            lambda: x.put_(places, x[:2]),
        ]
        for mixed in mixing:
            with pytest.raises(MixedDevices, match="got tensors of lazy, and of the CPU"):
                mixed()
        assert x.tolist() == [0.0] * 6


def test_nothing_of_the_device_stays() -> None:
    before = [torch.tensor, torch.as_tensor, Tensor.new_tensor, torch.Generator, torch.autocast]
    with stand_in(), counting():
        assert torch.tensor is not before[0]
    assert before == [torch.tensor, torch.as_tensor, Tensor.new_tensor, torch.Generator, torch.autocast]
    assert not hasattr(torch, "lazy") and not torch.__future__.get_swap_module_params_on_conversion()
    with pytest.raises(NotImplementedError):
        torch.ones(1, device=DEVICE)
