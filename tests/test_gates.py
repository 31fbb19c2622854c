"""Learned gates: the precision of their scores, and what their repr says."""

from collections.abc import Callable

import pytest
import torch
from narrow import the
from torch import Tensor, nn

import adadepth as ad

pytestmark = pytest.mark.shapes

DIM, STEPS = 16, 3
LEARNED: dict[str, Callable[[float], ad.Gate]] = {
    "LinearGate": lambda bias: ad.LinearGate(DIM, bias),
    "SharedMLPGate": lambda bias: ad.SharedMLPGate(DIM, bias=bias),
    "PerIterationMLPGate": lambda bias: ad.PerIterationMLPGate(DIM, STEPS, hidden=8, bias=bias),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("name", LEARNED)
def test_a_gate_that_is_wide_open_still_learns_in_low_precision(name: str, autocast: bool) -> None:
    torch.manual_seed(0)
    gate, h = LEARNED[name](7.0), torch.randn(5, DIM)
    if not autocast:
        gate, h = gate.bfloat16(), h.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        score = gate(h, h, 0)
    assert score.dtype == torch.float32
    assert score.max() < 1 and score.min() > 0.99
    assert score.unique().numel() == len(h)  # bfloat16 has one number between 0.996 and 1
    score.sum().backward()
    gradients = [the(Tensor, p.grad) for n, p in gate.named_parameters() if not n.startswith("mlps.1")]
    assert all(bool((g != 0).any()) for g in gradients)
    assert {p.grad.dtype for p in gate.parameters() if p.grad is not None} == {next(gate.parameters()).dtype}


@pytest.mark.parametrize("name", LEARNED)
def test_the_hidden_layers_keep_the_low_precision(name: str) -> None:
    gate, seen = LEARNED[name](7.0).bfloat16(), []
    for module in gate.modules():
        if isinstance(module, nn.GELU):
            module.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    h = torch.randn(5, DIM, dtype=torch.bfloat16)
    gate(h, h, 0)
    assert seen == ([] if name == "LinearGate" else [torch.bfloat16])


@pytest.mark.parametrize("name", LEARNED)
def test_float64_stays(name: str) -> None:
    gate, h = LEARNED[name](3.0).double(), torch.randn(5, DIM, dtype=torch.float64)
    assert gate(h, h, 0).dtype == torch.float64


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        gate, h = ad.SharedMLPGate(DIM), torch.empty(2, 5, DIM)
    assert gate(h, h, 0).shape == (2, 5)


@pytest.mark.parametrize("name", LEARNED)
def test_weights_that_are_made_anew_after_the_meta_device_start_as_declared(name: str) -> None:
    """As FSDP's `param_init_fn` does."""
    with torch.device("meta"):
        made = nn.ModuleList([LEARNED[name](2.0), ad.ReZero(ad.Interpolate())])
    for weight in made.to_empty(device="cpu").parameters():
        nn.init.constant_(weight, torch.nan)
    for part in made.modules():
        if part._parameters:
            part.reset_parameters()  # type: ignore[operator]
    last = [part for part in made.modules() if isinstance(part, nn.Linear) and part.out_features == 1]
    assert last and all(the(Tensor, part.bias).tolist() == [2.0] for part in last)
    assert all(bool(weight.isfinite().all()) for weight in made.parameters())
    assert the(ad.ReZero, made[1]).alpha.tolist() == [0.0]


@pytest.mark.parametrize(
    ("gate", "want"),
    [
        (ad.LinearGate(16), "dim=16, bias=3.0"),
        (ad.SharedMLPGate(16, hidden=8), "dim=16, hidden=8, bias=3.0"),
        (ad.PerIterationMLPGate(16, 2, bias=4.0), "dim=16, steps=2, hidden=None, bias=4.0"),
        (ad.ConvergenceGate(), ""),
        *((kind(nn.Linear(16, 40)), "head=Linear (40, 16)") for kind in (ad.KLGate, ad.MaxProbGate)),
        (ad.MarginGate(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 40))), "head=Sequential (40, 16)"),
        (ad.EntropyGate(nn.Identity()), "head=Identity"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_repr_says_what_a_gate_was_made_with(gate: ad.Gate, want: str) -> None:
    assert gate.extra_repr() == want and want in repr(gate)
    assert not any(name.startswith("head") for name in gate.state_dict())
