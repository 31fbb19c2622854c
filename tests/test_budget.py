"""`DepthBudget` holds a mean depth in training; its numbers by hand, its state and its errors."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

DIM, STEPS = 8, 4
RULES: dict[str, ad.Rule] = {
    "soft": ad.Survival(),
    "hard": ad.Threshold(0.5),
    "hard survival": ad.SurvivalThreshold(0.3),
}


def make_loop(rule: ad.Rule | None, bias: float, gate: ad.Gate | None = None) -> ad.RecurrentWrapper:
    torch.manual_seed(0)
    block = ad.Pointwise(nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)))
    gate = ad.SharedMLPGate(DIM, hidden=8, bias=bias) if gate is None else gate
    return ad.RecurrentWrapper(block, STEPS, gate, rule, ad.Interpolate())


def train(loop: ad.RecurrentWrapper, budget: ad.DepthBudget, steps: int) -> tuple[list[float], list[float]]:
    """Task losses and mean depths of every step; the task is a function that is harder for tokens of one half."""
    optimiser = torch.optim.Adam([*loop.parameters()], 2e-2)
    generator, tasks, depths = torch.Generator().manual_seed(1), [], []
    for _ in range(steps):
        x = torch.randn(8, 16, DIM, generator=generator)
        out = loop(x)
        wanted = torch.where(x[..., :1] > 0, x.roll(1, -1).sin() * 2, -x)
        task = F.mse_loss(out.hidden, wanted)
        optimiser.zero_grad()
        (task + budget(out.trace)).backward()
        optimiser.step()
        tasks.append(task.item())
        depths.append(ad.expected_depth(out.trace).item())
    return tasks, depths


@pytest.mark.parametrize(
    ("rule", "bias"),
    [
        ("soft", 4.0),
        pytest.param("soft", -1.5, marks=pytest.mark.every),
        ("hard", -1.5),
        pytest.param("hard survival", 4.0, marks=pytest.mark.every),
    ],
)
def test_the_mean_depth_ends_at_the_budget(rule: str, bias: float) -> None:
    tasks, depths = train(make_loop(RULES[rule], bias), ad.DepthBudget(2.5), steps=180)
    assert abs(depths[0] - 2.5) > 0.8 and (depths[0] > 2.5) == (bias > 0)
    assert sum(depths[-30:]) / 30 == pytest.approx(2.5, abs=0.15)
    assert sum(tasks[-10:]) < 0.7 * sum(tasks[:10])


def trace_of(live: list[list[int]], scores: list[list[float]], exits: list[list[float]]) -> tuple[ad.Trace, Tensor]:
    """One row; the scores are a leaf."""
    leaf = torch.tensor([scores], dtype=torch.float64, requires_grad=True)
    return ad.Trace(torch.tensor([live]).bool(), leaf, torch.tensor([exits], dtype=torch.float64)), leaf


@pytest.mark.shapes
def test_hard_exits_by_hand() -> None:
    """Depths 1, 3 and 2, and padding: a mean of 2."""
    trace, scores = trace_of(
        [[1, 0, 0], [1, 1, 1], [1, 1, 0], [0, 0, 0]],
        [[0.2, 0.0], [0.9, 0.8], [0.7, 0.1], [0.0, 0.0]],
        [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0]],
    )
    budget = ad.DepthBudget(1.5, gain=0.1, damping=0.4)
    loss = budget(trace)
    price = 0.1 * 0.5 + 0.4 * 0.5
    assert loss.item() == pytest.approx(price * 0.5)
    assert budget.multiplier.item() == pytest.approx(0.05)
    loss.backward()
    want = [[1, 0], [1 + 0.8, 0.9], [1 + 0.1, 0.7], [0, 0]]  # of s1 + s1 s2 over the iterations that ran
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, price / 3 * torch.tensor([want], dtype=torch.float64))
    assert budget(trace).item() == pytest.approx((0.1 + 0.2) * 0.5)  # the price rises until the depth falls


def test_soft_exits_have_the_gradient_of_the_expected_depth() -> None:
    score = torch.tensor([[[0.6]]], requires_grad=True)
    exits = torch.cat([1 - score, score], -1)
    loss = ad.DepthBudget(2.0, gain=0.5, damping=0.0)(ad.Trace(torch.ones(1, 1, 2).bool(), score.detach(), exits))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 0.4 * 0.4)
    assert score.grad is not None and score.grad.item() == pytest.approx(-0.5 * 0.4)  # too shallow: less loss if more


def test_the_price_is_limited() -> None:
    trace, scores = trace_of([[1, 1]], [[0.9]], [[0, 1]])
    budget = ad.DepthBudget(1.0, gain=10.0, damping=10.0, limit=0.5)
    budget(trace).backward()
    assert budget.multiplier.item() == 0.5
    assert scores.grad is not None and scores.grad.item() == 0.5


def test_its_state_is_saved_and_adapts_in_training_alone() -> None:
    trace, _ = trace_of([[1, 1]], [[0.9]], [[0, 1]])
    budget = ad.DepthBudget(1.5)
    budget(trace)
    again = ad.DepthBudget(1.5)
    again.load_state_dict(copy.deepcopy(budget.state_dict()))
    assert again.multiplier.item() == pytest.approx(0.005)
    again.eval()(trace)
    with torch.no_grad():
        again.train()(trace)
    empty, _ = trace_of([[0, 0]], [[0.0]], [[0, 0]])
    assert again(empty).item() == 0
    assert again.multiplier.item() == pytest.approx(0.005)
    again.bfloat16()(trace)
    assert again.multiplier.item() == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("rule", ["soft", "hard"])
@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_leaves_a_multiplier_that_goes_on(rule: str, lost: float) -> None:
    loop, budget = make_loop(RULES[rule], 0.0), ad.DepthBudget(2.0, gain=0.1)
    x = torch.randn(4, 8, DIM)
    budget(loop(x).trace)
    before = budget.multiplier.item()
    budget(loop(torch.full_like(x, lost)).trace)
    assert abs(budget.multiplier.item() - before) <= 0.05 + 1e-6
    loss = budget(loop(x).trace)
    loss.backward()
    assert math.isfinite(loss.item()) and math.isfinite(budget.multiplier.item())


def test_repr() -> None:
    assert repr(ad.DepthBudget(2.5)) == "DepthBudget(mean_depth=2.5, gain=0.01, damping=0.3, limit=5.0)"


def test_no_gradient() -> None:
    loop, x = make_loop(ad.Threshold(0.1), 0.0), torch.randn(2, 3, DIM)
    loop.gate, loop.update = ad.ConvergenceGate(), ad.Replace()
    with pytest.raises(ValueError, match="DepthBudget") as error:
        ad.DepthBudget(2.0)(loop(x).trace)
    assert str(error.value) == (
        "DepthBudget expected scores with a gradient, got none. Give the loop a learned gate and train it; an exit "
        "criterion needs calibrate instead."
    )
    ad.DepthBudget(2.0).eval()(loop(x).trace)


def test_a_loop_that_is_too_short() -> None:
    with pytest.raises(ValueError, match="DepthBudget") as error:
        ad.DepthBudget(2.5)(make_loop(ad.Survival(), 0.0)(torch.randn(2, 3, DIM), max_depth=2).trace)
    assert str(error.value) == (
        "DepthBudget(mean_depth=2.5) expected a loop of at least as many iterations, got a trace of 2. Choose a "
        "smaller mean_depth, or do not call the budget in passes with a lower max_depth."
    )


@pytest.mark.parametrize("depth", [0.5, float("nan")])
def test_a_mean_depth_below_one(depth: float) -> None:
    with pytest.raises(ValueError, match="DepthBudget") as error:
        ad.DepthBudget(depth)
    assert str(error.value) == f"DepthBudget expected mean_depth of at least 1 iteration, got {depth}."


@pytest.mark.parametrize("wrong", [{"gain": 0.0}, {"damping": -1.0}, {"limit": 0.0}])
def test_settings_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="DepthBudget") as error:
        ad.DepthBudget(2.0, **wrong)
    given = {"gain": 0.01, "damping": 0.3, "limit": 5.0} | wrong
    assert str(error.value) == (
        "DepthBudget expected gain > 0, damping >= 0 and limit > 0, got "
        + ", ".join(f"{name}={value}" for name, value in given.items())
        + "."
    )
