"""What must hold of every loop, whatever else is in the batch: laws between its own results."""

import numpy as np
import pytest
import torch
from blocks_zoo import BLOCKS, DIM, looped, mixed
from cases import each, in_turn
from narrow import the
from torch import Tensor, nn

import adadepth as ad

both = pytest.mark.parametrize("skip", [True, False])
# Left, right and ragged padding, and a row of nothing else.
RAGGED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
RULES = [
    ad.Threshold(0.5),
    ad.SurvivalThreshold(0.3),
    ad.Lookahead(ad.Threshold(0.5)),
    ad.NotBefore(2, ad.Threshold(0.5)),
    ad.ACT(0.3),
    ad.Survival(),
    None,
]
# Every block with a rule that cuts and one that weighs, and every rule with one block: neither reads the other.
BOTH = ad.Threshold, ad.ACT
PAIRS = [(kind, rule) for kind in BLOCKS for rule in RULES if kind == "attention" or isinstance(rule, BOTH)]
ruled = pytest.mark.parametrize(("kind", "rule", "skip"), in_turn(PAIRS, (True, False)))
# Those that run in a loop alone, and the others.
PLAIN = [kind for kind in BLOCKS if kind not in ("pointwise", "view", "window", "softcap and sinks", "iteration")]


def rows(batch: int, seq: int) -> Tensor:
    return torch.randn(batch, seq, DIM, dtype=torch.float64)


def assert_near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@ruled
def test_the_trace_is_lawful(kind: str, rule: ad.Rule | None, skip: bool) -> None:
    loop = looped(kind, skip=skip)
    loop.rule = rule
    out = loop(rows(4, 6), mask=RAGGED, max_depth=torch.tensor([[4], [4], [3], [4]]))
    trace = out.trace
    assert ad.is_monotonic(trace.live)
    assert torch.equal(trace.live[..., 0], RAGGED)
    assert ((trace.depth >= 1) & (trace.depth <= 4))[RAGGED].all()
    assert (trace.depth[~RAGGED] == 0).all()
    assert (trace.depth[2] <= 3).all()
    total = trace.exit_probs.sum(-1)
    soft = isinstance(rule, ad.ACT | ad.Survival)
    assert (total - RAGGED.double()).abs().max() <= (1e-6 if soft else 0)
    assert ((trace.exit_probs > 0) <= trace.live).all()
    assert (trace.scores[~trace.live[..., :-1]] == 0).all()
    assert (out.hidden[~RAGGED] == 0).all()


@ruled
def test_a_row_alone_is_the_row_in_any_batch(kind: str, rule: ad.Rule | None, skip: bool) -> None:
    loop, x = looped(kind, skip=skip), rows(4, 6)
    loop.rule = rule
    together = loop(x, mask=RAGGED, states=True)
    for i in range(4):
        alone = loop(x[i : i + 1], mask=RAGGED[i : i + 1], states=True)
        assert_equal_rows(alone, together, [i])
    backwards = loop(x.flip(0), mask=RAGGED.flip(0), states=True)
    assert_equal_rows(backwards, together, [3, 2, 1, 0])


def assert_equal_rows(got: ad.Output, want: ad.Output, which: list[int]) -> None:
    assert torch.equal(got.trace.live, want.trace.live[which])
    states = the(Tensor, got.states), the(Tensor, want.states)
    for a, b in ((got.hidden, want.hidden), states, *zip(got.trace, want.trace, strict=True)):
        assert_near(a, b[which])


@each
@pytest.mark.parametrize("causal", [True, False])
def test_padding_may_stand_anywhere(kind: str, causal: bool, skip: bool) -> None:
    loop, x = looped(kind, causal=causal, skip=skip), rows(1, 5)
    want = loop(x)
    assert mixed(want.trace.live)
    places = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [0, 2, 3, 5, 7]])
    padded = rows(3, 8).scatter(1, places.unsqueeze(-1).expand(-1, -1, DIM), x.expand(3, -1, -1))
    mask = torch.zeros(3, 8, dtype=torch.bool).scatter(1, places, True)
    out = loop(padded, mask=mask)
    for i in range(3):
        assert torch.equal(out.trace.live[i][mask[i]], want.trace.live[0])
        for a, b in ((out.hidden, want.hidden), *zip(out.trace, want.trace, strict=True)):
            assert_near(a[i][mask[i]], b[0])


@ruled
def test_future_tokens_change_nothing(kind: str, rule: ad.Rule | None, skip: bool) -> None:
    loop, x = looped(kind, skip=skip), rows(3, 6)
    loop.rule = rule
    want, other = loop(x), torch.cat([x[:, :4], rows(3, 2)], 1)
    for got in (loop(other), loop(x[:, :4])):
        assert torch.equal(got.trace.live[:, :4], want.trace.live[:, :4])
        assert_near(got.hidden[:, :4], want.hidden[:, :4])
        assert_near(got.trace.scores[:, :4], want.trace.scores[:, :4])


@both
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("causal", [True, False])
def test_one_iteration_is_the_block(kind: str, causal: bool, skip: bool) -> None:
    block, x = BLOCKS[kind].make(DIM, causal).double(), rows(3, 6)
    want = block(x)
    leave = ad.Threshold(1.1)
    gate = ad.LinearGate(DIM).double()
    for loop in (
        ad.RecurrentWrapper(block, 1, causal=causal, skip=skip),
        ad.RecurrentWrapper(block, 4, gate, leave, causal=causal, skip=skip),
    ):
        out = loop(x)
        assert (out.trace.depth == 1).all()
        assert_near(out.hidden, want)
    assert_near(loop(x, max_depth=1).hidden, want)


@both
@pytest.mark.parametrize("kind", PLAIN)
def test_where_nobody_leaves_it_is_the_loop_written_by_hand(kind: str, skip: bool) -> None:
    block, x, start = BLOCKS[kind].make(DIM, True).double(), rows(3, 6), rows(3, 6)
    loop = ad.RecurrentWrapper(block, 3, update=ad.InputInjection(), skip=skip)
    h = block(start + block(start + block(x)))
    assert_near(loop(x, start=start).hidden, h)
    loop.rule, loop.gate = ad.Threshold(0.0), ad.LinearGate(DIM).double()
    assert_near(loop(x, start=start).hidden, h)


@each
def test_states_are_extra(kind: str, skip: bool) -> None:
    loop, x = looped(kind, skip=skip), rows(4, 6)
    out = loop(x, mask=RAGGED, states=True)
    assert loop(x, mask=RAGGED).states is None
    assert torch.equal(loop(x, mask=RAGGED).hidden, out.hidden)
    last = (out.trace.depth - 1).clamp_min(0)[..., None, None].expand(-1, -1, 1, DIM)
    states = the(Tensor, out.states)
    assert torch.equal(states.gather(2, last).squeeze(2), out.hidden)
    assert torch.equal(states[:, :, -1], out.hidden)  # a token that left keeps its last


@each
@pytest.mark.parametrize(
    ("shape", "causal"),
    [
        *(((0, 6), True), ((3, 0), False), ((0, 0), True), ((3, 6), True), ((3, 6), False)),
        *(pytest.param(*case, marks=pytest.mark.every) for case in (((0, 6), False), ((3, 0), True), ((0, 0), False))),
    ],
)
def test_nothing_to_run_gives_nothing(kind: str, causal: bool, skip: bool, shape: tuple[int, int]) -> None:
    loop, x = looped(kind, causal=causal, skip=skip), rows(*shape).requires_grad_()
    for mask in (torch.zeros(shape, dtype=torch.bool), None) if x.numel() == 0 else (torch.zeros(shape).bool(),):
        out = loop(x, mask=mask, states=True, max_depth=torch.full(shape, 2))
        assert out.hidden.shape == x.shape
        states = the(Tensor, out.states)
        assert states.shape == (*shape, 4, DIM)
        assert [t.shape[-1] for t in out.trace] == [4, 3, 4]
        assert not any(t.any() for t in (out.hidden, states, *out.trace))


@pytest.mark.plain
def test_a_depth_is_any_integer() -> None:
    loop, x = looped("attention"), rows(2, 6)
    want = loop(x, min_depth=2, max_depth=2)
    got = loop(x, min_depth=np.int64(2), max_depth=np.array(2))
    assert got.trace.live.shape == want.trace.live.shape
    assert torch.equal(got.hidden, want.hidden)


@both
@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (3, 6)])
def test_nothing_to_run_can_be_trained_on(skip: bool, shape: tuple[int, int]) -> None:
    """A batch that filtering emptied, or one rank's share of padding, must not stop the training."""
    loop, x = looped("attention", skip=skip), rows(*shape).requires_grad_()
    loop(x, mask=torch.zeros(shape, dtype=torch.bool)).hidden.sum().backward()
    assert not the(Tensor, x.grad).any()


@each
@pytest.mark.parametrize(
    ("causal", "bad"),
    [
        *((True, float("nan")), (False, float("inf"))),
        *(pytest.param(*case, marks=pytest.mark.every) for case in ((True, float("inf")), (False, float("nan")))),
    ],
)
def test_what_stands_at_padding_does_not_leak(kind: str, causal: bool, skip: bool, bad: float) -> None:
    loop = looped(kind, causal=causal, skip=skip)
    loop.update = ad.SurvivalScaled(ad.InputInjection())
    given = rows(4, 6), rows(4, 6)
    results = []
    for value in (0.0, bad):
        x, start = (t.masked_fill(~RAGGED.unsqueeze(-1), value).requires_grad_() for t in given)
        out = loop(x, start=start, mask=RAGGED, states=True)
        states = the(Tensor, out.states)
        loss = out.hidden.sum() + states.sum() + out.trace.scores.sum() + out.trace.exit_probs.sum()
        inputs = [x, start, *loop.parameters()]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        results.append([out.hidden, states, *out.trace, *gradients])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert not results[1][5][~RAGGED].any()


@both
@pytest.mark.parametrize("kind", ["encoder layer", "encoder", "multihead"])
def test_dropout_counts_in_training_alone(kind: str, skip: bool) -> None:
    loop, x = looped(kind, skip=skip), rows(3, 6)
    want = loop(x).hidden
    for module in loop.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.5
    assert not torch.equal(loop(x).hidden, want)
    assert_near(loop.eval()(x).hidden, want)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(
    ("causal", "frozen"),
    [
        *((True, True), (False, False)),
        *(pytest.param(*case, marks=pytest.mark.every) for case in ((True, False), (False, True))),
    ],
)
def test_the_same_in_evaluation_without_gradients(kind: str, causal: bool, frozen: bool) -> None:
    """Where PyTorch's fused layers would take their fast path, past us."""
    x = rows(4, 6)
    loops = [looped(kind, causal=causal, skip=skip) for skip in (True, False)]
    for given in (RAGGED, None):
        want = loops[0](x, mask=given).hidden
        for loop in loops:
            loop.eval().requires_grad_(not frozen)
            with torch.no_grad():
                out = loop(x, mask=given)
            assert mixed(out.trace.live)
            assert_near(out.hidden, want)


@each
def test_replayed_depths_give_the_same_bits(kind: str, skip: bool) -> None:
    loop = looped(kind, skip=skip)
    x = rows(4, 6)
    out = loop(x, mask=RAGGED)
    assert mixed(out.trace.live)
    for rule in (loop.rule, ad.Threshold(2.0), None):
        loop.rule = rule
        again = loop(x, mask=RAGGED, min_depth=out.trace.depth, max_depth=out.trace.depth)
        assert torch.equal(again.hidden, out.hidden)
        assert torch.equal(again.trace.live, out.trace.live)


@each
def test_a_row_s_budget_changes_no_other_row(kind: str, skip: bool) -> None:
    loop, x = looped(kind, skip=skip), rows(4, 6)
    free = loop(x)
    deepest = free.trace.depth.amax(1).argmax()
    budget = torch.full((4, 1), 4).index_fill(0, deepest, 1)
    capped = loop(x, max_depth=budget)
    assert free.trace.depth[deepest].max() > 1
    assert (capped.trace.depth[deepest] == 1).all()
    others = torch.arange(4) != deepest
    assert torch.equal(capped.trace.depth[others], free.trace.depth[others])
    assert_near(capped.hidden[others], free.hidden[others])
