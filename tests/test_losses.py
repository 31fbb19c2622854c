"""The losses against what their definitions say, token by token."""

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from allocations import largest
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import the
from torch import Tensor, nn

import adadepth as ad

pytestmark = pytest.mark.shapes

DIM, WORDS = 6, 9


def traced(seed: int, rule: ad.Rule | None = None, steps: int = 4) -> ad.Trace:
    """Of a small loop over rows with padding anywhere, with gradients to the gate."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    gate = ad.LinearGate(DIM, bias=0.0)
    nn.init.normal_(gate.proj.weight, std=2.0)
    looped = ad.RecurrentWrapper(ad.Pointwise(nn.Linear(DIM, DIM)), steps, gate, rule or ad.Threshold(0.5)).double()
    mask = torch.rand(3, 5, generator=generator) < 0.8
    return looped(torch.randn(3, 5, DIM, generator=generator, dtype=torch.float64), mask=mask).trace


@given(
    seed=st.integers(0, 99),
    k=st.floats(0.01, 1),
    over=st.sampled_from(["all", "live"]),
    of=st.sampled_from(["gates", "survival", "logits"]),
)
@settings(max_examples=60)
def test_the_penalty_is_the_mean_of_the_smallest_share(
    seed: int, k: float, over: Literal["all", "live"], of: str
) -> None:
    trace = traced(seed)
    values = trace.scores.logit(1e-6) if of == "logits" else getattr(trace, of)
    got = ad.BottomKPenalty(k, over=over)(values, trace.live, at=0)
    entries = []  # those who have left first, as 0
    for row in range(3):
        for token in range(5):
            for step in range(3):
                real, goes_on = trace.live[row, token, 0], trace.live[row, token, step + 1]
                if goes_on:
                    entries.append((1, values[row, token, step].item()))
                elif real and over == "all":
                    entries.append((0, 0.0))
    count = math.ceil(k * len(entries) - 1e-9)
    want = sum(value for _, value in sorted(entries)[:count]) / max(1, count)
    assert got.item() == pytest.approx(want, abs=1e-12)


def test_the_penalty_pushes_the_smallest_gates_that_go_on() -> None:
    scores = torch.tensor([[[0.9, 0.8], [0.6, 0.1], [0.7, 0.0]]], requires_grad=True)
    live = torch.tensor([[[True, True, True], [True, True, True], [True, True, False]]])
    trace = ad.Trace(live, scores, torch.zeros(1, 3, 3))
    ad.BottomKPenalty(0.5)(trace.gates, live, at=0).backward()
    third = 1 / 3  # three of six entries count: the halted one as 0, then 0.1 and 0.6
    torch.testing.assert_close(scores.grad, torch.tensor([[[0.0, 0.0], [third, third], [0.0, 0.0]]]))


@pytest.mark.parametrize(
    ("at", "share"), [(0, 0.0), (10, 0.0), (15, 0.05), (20, 0.1), (30, 0.2), (10**6, 0.2)], ids=lambda x: str(x)
)
def test_k_warms_up_linearly(at: int, share: float) -> None:
    assert ad.BottomKPenalty(0.2, warmup=(10, 30)).k(at) == pytest.approx(share, abs=1e-15)


def test_before_its_warm_up_the_penalty_is_zero() -> None:
    trace = traced(0, ad.Threshold(0.0))
    assert ad.BottomKPenalty(0.2, warmup=(10, 30))(trace.gates, trace.live, at=3).item() == 0
    assert ad.BottomKPenalty(0.2)(trace.gates, trace.live, at=0).item() > 0
    assert ad.BottomKPenalty(0.2, warmup=(10, 10))(trace.gates, trace.live, at=3).item() == 0
    assert ad.BottomKPenalty(0.2)(trace.gates, trace.live, at=-1).item() == 0


def test_padding_alone_is_not_punished() -> None:
    nothing = ad.Trace(torch.zeros(2, 3, 4, dtype=torch.bool), torch.zeros(2, 3, 3), torch.zeros(2, 3, 4))
    for over in ("all", "live"):
        assert ad.BottomKPenalty(0.2, over=over)(nothing.gates, nothing.live, at=0).item() == 0
    assert ad.ponder_cost(nothing).item() == ad.expected_depth(nothing).item() == 0


@given(seed=st.integers(0, 99))
@settings(max_examples=30)
def test_ponder_cost_and_expected_depth_count_real_tokens(seed: int) -> None:
    for rule in (ad.Survival(), ad.ACT(0.1), ad.Threshold(0.5)):
        trace = traced(seed, rule)
        cost, depth, real = 0.0, 0.0, 0
        for live, exits in zip(trace.live.flatten(0, 1), trace.exit_probs.flatten(0, 1), strict=True):
            if live[0]:
                ran = int(live.sum())
                cost, real = cost + ran + exits[ran - 1].item(), real + 1
                depth += sum((i + 1) * exits[i].item() for i in range(4))
        assert ad.ponder_cost(trace).item() == pytest.approx(cost / real)
        assert ad.expected_depth(trace).item() == pytest.approx(depth / real)
    assert ad.expected_depth(trace).item() == pytest.approx(trace.depth[trace.depth > 0].double().mean().item())


def test_expected_depth_tells_soft_gates_to_let_go() -> None:
    """By its gradient, held against a difference."""
    torch.manual_seed(0)
    block, gate = ad.Pointwise(nn.Linear(DIM, DIM)), ad.LinearGate(DIM, 0.5)
    looped = ad.RecurrentWrapper(block, 4, gate, ad.Survival()).double()
    x, bias, little = torch.randn(2, 3, DIM, dtype=torch.float64), gate.proj.bias, 1e-6
    (grad,) = torch.autograd.grad(ad.expected_depth(looped(x).trace), bias)
    before = ad.expected_depth(looped(x).trace).item()
    nn.init.constant_(bias, bias.item() + little)
    assert grad.item() == pytest.approx((ad.expected_depth(looped(x).trace).item() - before) / little, rel=1e-4)
    assert grad.item() > 0.1


def head_and_states(shape: tuple[int, ...]) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, WORDS)).double()
    states = torch.randn(*shape, DIM, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(WORDS, shape[:2])
    return head, states, labels.masked_fill(torch.rand(shape[:2]) < 0.3, -100)


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_every_iteration_has_the_loss_of_its_logits(chunk: int | None) -> None:
    head, states, labels = head_and_states((3, 5, 4))
    got = ad.per_iteration_loss(states, head, labels, chunk)
    p = head(states).softmax(-1)
    want = torch.zeros(3, 5, 4, dtype=torch.float64)
    for row, token in (labels >= 0).nonzero().tolist():
        want[row, token] = -p[row, token, :, labels[row, token]].log()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert torch.equal(ad.per_iteration_loss(states, head, labels.int(), chunk), got)
    weights = torch.randn(3, 5, 4, dtype=torch.float64)
    inputs = [states, *head.parameters()]
    each = [torch.autograd.grad((loss * weights).sum(), inputs) for loss in (got, want)]
    for ours, theirs in zip(*each, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4)])
def test_no_tokens_have_no_loss(shape: tuple[int, ...]) -> None:
    head, states, labels = head_and_states(shape)
    assert ad.per_iteration_loss(states, head, labels).shape == shape


def test_the_logits_of_all_iterations_never_stand_side_by_side() -> None:
    """Forward and backward hold those of one chunk, in several copies."""
    head, states = nn.Linear(DIM, 5000), torch.randn(1, 400, 4, DIM, requires_grad=True)
    labels, all_logits = torch.randint(5000, (1, 400)), 400 * 4 * 5000 * 4

    def compute(chunk: int | None) -> None:
        ad.per_iteration_loss(states, head, labels, chunk).sum().backward()

    assert largest(lambda: compute(20)) <= all_logits / 20
    assert largest(lambda: compute(None)) <= 2**21 * 4 < all_logits / 3  # the default: about two million logits


def test_priors_sum_to_one_and_the_last_takes_what_remains() -> None:
    assert ad.depth_prior("uniform", 4).tolist() == [0.25] * 4
    want = [0.3, 0.7 * 0.3, 0.7**2 * 0.3, 0.7**3]
    torch.testing.assert_close(ad.depth_prior("geometric", 4, rate=0.3), torch.tensor(want))
    assert ad.depth_prior("geometric", 1).tolist() == [1.0]


def test_a_gate_of_one_score_exits_by_the_geometric_prior() -> None:
    gate = ad.LinearGate(DIM)
    looped = ad.RecurrentWrapper(ad.Pointwise(nn.Identity()), 5, gate, ad.Survival())
    nn.init.zeros_(gate.proj.weight)
    nn.init.constant_(gate.proj.bias, math.log(0.7 / 0.3))
    exits = looped(torch.randn(1, 1, DIM)).trace.exit_probs[0, 0]
    torch.testing.assert_close(exits, ad.depth_prior("geometric", 5, rate=0.3))


def test_random_depths_are_drawn_from_the_prior_and_are_a_function_of_the_step() -> None:
    prior = torch.tensor([0.0, 0.2, 0.3, 0.5])
    drawn = [ad.random_depth(prior, at) for at in range(4000)]
    torch.manual_seed(7)  # another rank, in another state
    assert drawn == [ad.random_depth(prior, at) for at in range(4000)]
    assert drawn != [ad.random_depth(prior, at, seed=1) for at in range(4000)]
    shares = torch.tensor(drawn).bincount(minlength=5)[1:] / 4000
    assert shares[0] == 0
    assert (shares - prior).abs().max() < 0.03


@given(seed=st.integers(0, 99), margin=st.floats(0, 1), min_depth=st.integers(1, 4))
@settings(max_examples=40)
def test_loss_gain_looks_at_the_best_later_iteration(seed: int, margin: float, min_depth: int) -> None:
    losses = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    gain, goes_on = ad.loss_gain(losses, margin, min_depth)
    assert not gain.requires_grad
    for row in range(2):
        for token in range(3):
            for i in range(3):
                want = losses[row, token, i] - min(losses[row, token, j] for j in range(i + 1, 4))
                assert gain[row, token, i] == want
                assert goes_on[row, token, i] == (want > margin or i + 1 < min_depth)


def test_loss_gain_of_one_iteration_is_empty() -> None:
    assert ad.loss_gain(torch.rand(2, 3, 1)).gain.shape == (2, 3, 0)


def test_losses_of_a_looped_block_reach_every_part() -> None:
    torch.manual_seed(0)
    head = nn.Linear(DIM, WORDS)
    looped = ad.RecurrentWrapper(ad.Pointwise(nn.Linear(DIM, DIM)), 3, ad.LinearGate(DIM, bias=0.0), ad.Threshold(0.0))
    out = looped(torch.randn(2, 4, DIM), states=True)
    each = ad.per_iteration_loss(out.states, head, torch.randint(WORDS, (2, 4)))
    taught = (out.trace.scores - ad.loss_gain(each).goes_on.float()).square().mean()
    ((each * ad.depth_prior("geometric", 3)).sum(-1).mean() + taught).backward()
    assert all(the(Tensor, p.grad).abs().sum() > 0 for p in [*looped.parameters(), *head.parameters()])


wrong: Any = ad  # for arguments that no type allows
ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "k": (
        lambda: ad.BottomKPenalty(1.5),
        "BottomKPenalty expected k_max, a share, in (0, 1], got 1.5. The paper's is 0.1.",
    ),
    "k as a string": (
        lambda: wrong.BottomKPenalty("0.1"),
        "BottomKPenalty expected k_max, a share, in (0, 1], got '0.1'. The paper's is 0.1.",
    ),
    "warm-up": (
        lambda: ad.BottomKPenalty(0.1, warmup=(20, 10)),
        "BottomKPenalty expected warmup=(first, last), training steps with 0 <= first <= last, got (20, 10). "
        "To grow over the first 100 steps write warmup=(0, 100).",
    ),
    "warm-up as a number": (
        lambda: wrong.BottomKPenalty(warmup=100),
        "BottomKPenalty expected warmup=(first, last), training steps with 0 <= first <= last, got 100. "
        "To grow over the first 100 steps write warmup=(0, 100).",
    ),
    "over": (
        lambda: wrong.BottomKPenalty(0.1, over="some"),
        "BottomKPenalty expected over to be 'all' or 'live', got 'some'.",
    ),
    "live": (
        lambda: ad.BottomKPenalty(0.1)(torch.zeros(2, 3, 3), torch.ones(2, 3, 3, dtype=torch.bool), at=0),
        "BottomKPenalty expected values (batch, seq, steps - 1) and live (batch, seq, steps), bool, got a tensor of "
        "shape (2, 3, 3) torch.float32 and a tensor of shape (2, 3, 3) torch.bool. Call it as penalty(trace.gates, "
        "trace.live, at).",
    ),
    "the trace for the values": (
        lambda: wrong.BottomKPenalty(0.1)(traced(0), traced(0).live, at=0),
        "BottomKPenalty expected values (batch, seq, steps - 1) and live (batch, seq, steps), bool, got Trace and a "
        "tensor of shape (3, 5, 4) torch.bool. Call it as penalty(trace.gates, trace.live, at).",
    ),
    "depths for live": (
        lambda: ad.BottomKPenalty(0.1)(traced(0).gates, traced(0).depth, at=0),
        "BottomKPenalty expected values (batch, seq, steps - 1) and live (batch, seq, steps), bool, got a tensor of "
        "shape (3, 5, 3) torch.float64 and a tensor of shape (3, 5) torch.int64. Call it as penalty(trace.gates, "
        "trace.live, at).",
    ),
    "the output": (
        lambda: wrong.ponder_cost(ad.Output(torch.zeros(2, 3, DIM), traced(0))),
        "ponder_cost expected the trace of a pass, got Output. Pass out.trace.",
    ),
    "depths for the trace": (
        lambda: wrong.expected_depth(traced(0).depth),
        "expected_depth expected the trace of a pass, got a tensor of shape (3, 5) torch.int64. Pass out.trace.",
    ),
    "the output for states": (
        lambda: wrong.per_iteration_loss(ad.Output(torch.zeros(2, 3, DIM), traced(0)), nn.Linear(DIM, WORDS), None),
        "per_iteration_loss expected states of shape (batch, seq, steps, dim), got Output. Pass out.states, of out = "
        "looped(x, states=True).",
    ),
    "hidden for states": (
        lambda: ad.per_iteration_loss(torch.zeros(2, 3, DIM), nn.Linear(DIM, WORDS), torch.zeros(2, 3).long()),
        f"per_iteration_loss expected states of shape (batch, seq, steps, dim), got a tensor of shape (2, 3, {DIM}) "
        "torch.float32. Pass out.states, of out = looped(x, states=True).",
    ),
    "labels before the head": (
        lambda: wrong.per_iteration_loss(torch.zeros(2, 3, 4, DIM), torch.zeros(2, 3).long(), nn.Linear(DIM, WORDS)),
        "per_iteration_loss expected labels, a tensor of shape (batch, seq), got Linear. The order is states, head, "
        "labels.",
    ),
    "no states": (
        lambda: ad.per_iteration_loss(None, nn.Linear(DIM, WORDS), torch.zeros(2, 3).long()),
        "per_iteration_loss expected every iteration's states, got None. Call looped(x, states=True).",
    ),
    "labels": (
        lambda: ad.per_iteration_loss(torch.zeros(2, 4, 3, DIM), nn.Linear(DIM, WORDS), torch.zeros(2, 3).long()),
        "per_iteration_loss expected labels of shape (batch, seq) = (2, 4), got (2, 3). For a language model shift "
        "them: states[:, :-1] with ids[:, 1:].",
    ),
    **{
        f"labels of {dtype}": (
            lambda dtype=dtype: ad.per_iteration_loss(  # type: ignore[misc]
                torch.zeros(2, 3, 3, DIM), nn.Linear(DIM, WORDS), torch.zeros(2, 3, dtype=dtype)
            ),
            f"per_iteration_loss expected labels to be integers, the numbers of words, got {dtype}. Pass ids.",
        )
        for dtype in (torch.float32, torch.bool)
    },
    "another index for no label": (
        lambda: ad.per_iteration_loss(torch.zeros(2, 3, 3, DIM), nn.Linear(DIM, WORDS), torch.full((2, 3), -1)),
        f"per_iteration_loss expected labels from 0 to {WORDS - 1}, the last word of the head, or -100 where there is "
        "none, got one outside: Target -1 is out of bounds. Write such labels as -100: labels.masked_fill(labels == "
        "..., -100).",
    ),
    "a head of another dtype": (
        lambda: ad.per_iteration_loss(
            torch.zeros(2, 3, 3, DIM), nn.Linear(DIM, WORDS, dtype=torch.float64), torch.zeros(2, 3).long()
        ),
        "per_iteration_loss expected a head that maps (n, dim) to logits (n, vocabulary), but Linear failed on states "
        f"(0, {DIM}) torch.float32: mat1 and mat2 must have the same dtype, but got Float and Double. Give it the "
        "module that computes logits, of the width and dtype of the states.",
    ),
    "chunk": (
        lambda: ad.per_iteration_loss(torch.zeros(2, 3, 4, DIM), nn.Linear(DIM, WORDS), torch.zeros(2, 3).long(), 0),
        "per_iteration_loss needs chunk >= 1, got 0.",
    ),
    "kind": (
        lambda: wrong.depth_prior("normal", 4),
        "depth_prior expected kind to be 'geometric' or 'uniform', got 'normal'.",
    ),
    "steps": (
        lambda: ad.depth_prior("uniform", 0),
        "depth_prior needs steps >= 1, got 0. The order is kind, steps, rate.",
    ),
    "steps first": (
        lambda: wrong.depth_prior(4, "uniform"),
        "depth_prior needs steps >= 1, got 'uniform'. The order is kind, steps, rate.",
    ),
    "rate": (
        lambda: ad.depth_prior("geometric", 4, 1.0),
        "depth_prior expected rate, the share that exits, in (0, 1), got 1.0.",
    ),
    "weights": (
        lambda: ad.random_depth(torch.tensor([0.5, -0.5, 1.0]), 0),
        "random_depth expected prior, a tensor (steps,) of weights, none negative and not all 0, got tensor([ 0.5000, "
        "-0.5000,  1.0000]). Take depth_prior(...), or make one: torch.tensor([0.0, 0.3, 0.7]).",
    ),
    "no weights": (
        lambda: ad.random_depth(torch.zeros(2), 0),
        "random_depth expected prior, a tensor (steps,) of weights, none negative and not all 0, got tensor([0., 0.]). "
        "Take depth_prior(...), or make one: torch.tensor([0.0, 0.3, 0.7]).",
    ),
    "a list": (
        lambda: wrong.random_depth([0.5, 0.5], 0),
        "random_depth expected prior, a tensor (steps,) of weights, none negative and not all 0, got [0.5, 0.5]. Take "
        "depth_prior(...), or make one: torch.tensor([0.0, 0.3, 0.7]).",
    ),
    "a mean": (
        lambda: ad.loss_gain(torch.tensor(1.5)),
        "loss_gain expected losses of shape (batch, seq, steps), got a tensor of shape () torch.float32. Pass what "
        "per_iteration_loss(out.states, head, labels) returns, before any mean.",
    ),
    "min_depth": (
        lambda: ad.loss_gain(torch.zeros(1, 2, 4), min_depth=5),
        "loss_gain expected min_depth from 1 to steps=4, got 5.",
    ),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", ERRORS)
def test_errors_teach(case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
