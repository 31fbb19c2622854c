"""FLOPs counted from a trace, against torch's counter on the packed execution and against sums written out."""

import re
from collections.abc import Callable

import pytest
import torch
from narrow import the
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import adadepth as ad
from adadepth.flops import FORMULAS, Cost

pytestmark = pytest.mark.shapes

DIM, HEADS, SEQ, STEPS = 128, 4, 96, 4


def block() -> nn.Module:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, dropout=0.0, batch_first=True, norm_first=True)
    return ad.CausalEncoder(layer)


def looped(update: ad.Update | None = None, gate: ad.Gate | None = None, steps: int = STEPS) -> ad.RecurrentWrapper:
    torch.manual_seed(0)
    return ad.RecurrentWrapper(block(), steps, gate, update=update)


def ponder() -> ad.Update:
    return ad.Ponder(nn.Embedding(500, DIM), nn.Linear(DIM, 500, bias=False))


@pytest.mark.parametrize("mean", [1.5, 2.5, 3.6])
@pytest.mark.parametrize("update", [ad.Interpolate, ponder], ids=["interpolate", "ponder"])
@pytest.mark.parametrize("gate", [False, True], ids=["no gate", "gate"])
def test_the_trace_costs_what_the_packed_execution_does(mean: float, update: type, gate: bool) -> None:
    """Within 1 %: the queries by which groups of rows are filled up."""
    model, head = looped(update(), ad.PerIterationMLPGate(DIM, STEPS) if gate else None), nn.Linear(DIM, 300)
    generator = torch.Generator().manual_seed(0)
    depth = ad.uniform_depths((6, SEQ), STEPS, mean, generator)
    mask = torch.arange(SEQ) >= torch.tensor([0, 0, 10, 40, 0, 70]).unsqueeze(1)
    cost = ad.TokenFlops.measure(model, DIM, once=[head])
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        out = model(torch.randn(6, SEQ, DIM, generator=generator), mask=mask, min_depth=depth, max_depth=depth)
        head(out.hidden[mask])
    flops = cost.count(out.trace.live)
    assert abs(counter.get_total_flops() / flops.total - 1) < 0.01
    assert flops.once == 2 * DIM * 300 * mask.sum()
    assert (flops.gate > 0) == gate
    assert (flops.update > 0) == (update is ponder)


def test_each_part_is_what_its_matrices_say() -> None:
    cost = ad.TokenFlops.measure(looped(ponder(), ad.PerIterationMLPGate(DIM, STEPS, hidden=16)), DIM)
    assert cost.block == (2 * 12 * DIM**2, 4 * DIM)  # for each key: a product with the query, and one with the weight
    assert cost.gate == (2 * (DIM * 16 + 16),) * (STEPS - 1)
    assert cost.update == (2 * 2 * 500 * DIM,) * (STEPS - 1)
    assert cost.once == (0, 0)


def test_a_prelude_that_attends_runs_once() -> None:
    cost = ad.TokenFlops.measure(looped(), DIM, once=[looped(steps=1), nn.Linear(DIM, 10)])
    assert cost.once == (2 * 12 * DIM**2 + 2 * DIM * 10, 4 * DIM)


def test_a_trace_is_counted_token_by_token() -> None:
    depth = torch.tensor([[4, 1, 2, 0], [3, 3, 0, 0]])
    cost = ad.TokenFlops(Cost(100.0, 3.0), (1.0, 2.0, 4.0), (10.0, 20.0, 40.0), Cost(7.0, 0.5))
    flops = cost.count(ad.depth_mask(depth, STEPS))
    assert flops.block == 100 * 13
    assert flops.attention == 3 * 3 * 13  # the longer row holds three
    assert flops.gate == 1 * 5 + 2 * 4 + 4 * 3  # those who ran the first three iterations
    assert flops.update == 10 * 4 + 20 * 3 + 40 * 1  # those who went on
    assert flops.once == 7 * 5 + 0.5 * 3 * 5
    assert flops.one_pass == flops.once + (100 + 3 * 3) * 5
    assert flops.fixed == flops.once + 4 * (100 + 3 * 3) * 5 + 70 * 5
    assert flops.relative == flops.total / flops.one_pass
    assert flops.bound == flops.fixed / flops.total
    assert cost.count(ad.depth_mask(depth, STEPS), keys=20).attention == 3 * 20 * 13


def test_relative_flops_are_the_mean_depth_where_only_the_block_costs() -> None:
    depth = torch.tensor([[4, 1, 2, 1]])
    assert ad.TokenFlops(Cost(100.0), (0.0,) * 3, (0.0,) * 3).count(ad.depth_mask(depth, STEPS)).relative == 2
    flops = ad.TokenFlops(Cost(100.0), (0.0,) * 3, (0.0,) * 3, Cost(50.0)).count(ad.depth_mask(depth, STEPS))
    assert flops.bound == (50 + 4 * 100) / (50 + 2 * 100)


def test_a_shortened_loop_and_no_tokens_are_counted() -> None:
    cost = ad.TokenFlops(Cost(100.0, 3.0), (1.0, 2.0, 4.0), (10.0, 20.0, 40.0))
    assert cost.count(ad.depth_mask(torch.tensor([[2, 2]]), 2)).gate == 2
    nothing = cost.count(ad.depth_mask(torch.zeros(2, 3, dtype=torch.int64), STEPS))
    assert (nothing.total, nothing.relative, nothing.bound) == (0, 0, 1)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = looped(gate=ad.LinearGate(DIM)).train()
    gate = the(nn.Module, model.gate).eval()
    ad.TokenFlops.measure(model, DIM)
    assert model.training
    assert not gate.training
    assert all(p.grad is None for p in model.parameters())


def test_a_loop_without_weights_of_its_own_is_measured_as_the_head_is() -> None:
    linear = nn.Linear(DIM, DIM, dtype=torch.float64)

    class Refers(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(x)

    model, head = ad.RecurrentWrapper(ad.Pointwise(Refers()), STEPS), nn.Linear(DIM, 7, dtype=torch.float64)
    cost = ad.TokenFlops.measure(model, DIM, once=[head])
    assert cost.block == Cost(2 * DIM**2) and cost.once == Cost(2 * DIM * 7)


def test_a_block_is_measured_with_what_it_needs() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.modulation = nn.Linear(DIM, DIM), nn.Linear(7, DIM)

        def forward(self, x: torch.Tensor, c: tuple[torch.Tensor, float]) -> torch.Tensor:
            return self.linear(x) + c[1] * self.modulation(c[0])

    model = ad.RecurrentWrapper(ad.Pointwise(Conditioned()), STEPS)
    cost = ad.TokenFlops.measure(model, DIM, block_kwargs={"c": (torch.randn(1, 1, 7), 2.0)})
    assert cost.block == Cost(2 * DIM**2 + 2 * 7 * DIM)


FOUR = ad.TokenFlops(Cost(1.0), (0.0,) * 3, (0.0,) * 3)
TRACE = ad.Trace(torch.ones(1, 2, 4, dtype=torch.bool), torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "the trace": (
        lambda: FOUR.count(TRACE),  # type: ignore[arg-type]
        "TokenFlops.count expected live of shape (batch, seq, steps), bool, got Trace. Pass out.trace.live or, for "
        "given depths, adadepth.depth_mask(depth, steps).",
    ),
    "depths": (
        lambda: FOUR.count(TRACE.depth),
        "TokenFlops.count expected live of shape (batch, seq, steps), bool, got a tensor of shape (1, 2) torch.int64. "
        "Pass out.trace.live or, for given depths, adadepth.depth_mask(depth, steps).",
    ),
    "another loop": (
        lambda: FOUR.count(torch.ones(1, 2, 5, dtype=torch.bool)),
        "TokenFlops.count expected live of 1 to 4 iterations, those of the loop that was measured, got shape (1, 2, "
        "5). Measure the loop that made the trace.",
    ),
    "a block": (
        lambda: ad.TokenFlops.measure(nn.Linear(DIM, DIM), DIM),  # type: ignore[arg-type]
        "TokenFlops.measure expected looped, a RecurrentWrapper, got Linear. For a model, pass the wrapper that it "
        "holds, and pass as once= the modules around it.",
    ),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", ERRORS)
def test_errors_teach(case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
