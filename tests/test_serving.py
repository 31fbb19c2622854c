"""`DepthBatch` against the definition: each request gets what one full forward over it alone would give it."""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from blocks_zoo import DEEP, DIM, looped
from cached import exact
from cases import Case, assert_same, by_definition, cases, examples, of_its_own, setting
from hypothesis import assume, given
from hypothesis import strategies as st
from served import How, serve
from torch import Tensor, nn

import adadepth as ad
from adadepth.cache.kv_reuse import LayoutName
from adadepth.serving import DepthBatch, Failed, Ran

hows = st.builds(
    How,
    seed=st.integers(0, 2**31),
    layout=st.sampled_from(["filled", "compact"]),
    rows=st.sampled_from([2, 3, 1, 4]),
    width=st.sampled_from([4, 2, 8, 1]),
    times=st.sampled_from([2, 1]),
    draft=st.sampled_from([None, 1, 2]),
    waits=st.booleans(),
    spoiled=st.booleans(),
)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.shapes
@examples(4, 20)
@pytest.mark.parametrize("kind", DEEP)
def test_each_request_is_one_full_forward_over_it(kind: str, examples: int) -> None:
    @of_its_own(kind, examples)
    @given(case=cases(causal=[True]), how=hows)
    def check(case: Case, how: How) -> None:
        s = setting(DEEP[kind], case, torch.float64)
        want = by_definition(DEEP[kind], case, s)
        requests, mixed = serve(ad.RecurrentWrapper(**s.pieces).eval(), s, how)
        assume(mixed)
        for request in requests:
            real = torch.tensor(request.columns, dtype=torch.int64)
            assert [request.depth[i] for i in range(len(real))] == want.live[request.row, real].sum(-1).tolist()
            if request.columns:
                hidden = torch.stack([request.hidden[i] for i in range(len(real))])
                here = want.hidden[request.row, real]
                assert_same({"live": real, "hidden": hidden}, {"live": real, "hidden": here}, 1e-10, 1e-13)

    check()


class Conditioned(nn.Module):
    """Adds what it is given for each token, and what it holds for each row of the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.of_row = looped("attention").block, torch.randn(8, DIM, dtype=torch.float64)

    def forward(self, x: Tensor, c: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = self.block(x + scale * c + self.of_row[ad.rows()])
        return out


class Counting(nn.Module):
    """Counts its calls, and may fail once."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls, self.fails = module, 0, False
        self.reads_step = getattr(module, "reads_step", True)

    def forward(self, *args: Any) -> Tensor:
        self.calls += 1
        if self.fails:
            self.fails = False
            raise RuntimeError("out of luck")
        out: Tensor = self.module(*args)
        return out


class Counted(Counting, ad.Gate):
    """The same as a gate."""


def batch_of(loop: ad.RecurrentWrapper, rows: int = 4, width: int = 8, capacity: int = 8) -> DepthBatch:
    return DepthBatch(loop.eval(), ad.KVReuseCache(capacity=capacity), rows, width)


def x_of(batch: int, seq: int) -> Tensor:
    return torch.randn(batch, seq, DIM, dtype=torch.float64)


def left(batch: DepthBatch) -> dict[int, Ran | Failed]:
    """What became of each row, once nothing is in flight any more."""
    found: dict[int, Ran | Failed] = {}
    while batch.room < batch.width:
        found |= {one.row: one for one in batch.call() if isinstance(one, Failed) or one.left}
    return found


def assert_alone(loop: ad.RecurrentWrapper, x: Tensor, got: Ran | Failed, **arguments: Any) -> None:
    """The row gives what it gives in a pass of its own."""
    assert isinstance(got, Ran)
    want = loop(x, **arguments)
    torch.testing.assert_close(got.hidden, want.hidden[0], rtol=1e-10, atol=1e-12)
    assert torch.equal(got.depth, want.trace.depth[0])


@pytest.mark.shapes
def test_a_block_is_given_its_kwargs_and_knows_its_row() -> None:
    loop, x, c = looped("attention"), x_of(3, 4), x_of(3, 4)
    loop.block = Conditioned()
    batch = batch_of(loop)
    batch.begin([2], x[:1], block_kwargs={"c": c[:1]})
    batch.call()
    batch.begin([0, 1], x[1:], block_kwargs={"c": c[1:, :1]})
    got = left(batch)
    for row, i, own in ((2, 0, c[:1]), (0, 1, c[1:2, :1]), (1, 2, c[2:, :1])):
        alone = copy.deepcopy(loop)
        alone.block.of_row = loop.block.of_row[row:]
        assert_alone(alone, x[i : i + 1], got[row], block_kwargs={"c": own})


def test_what_is_no_tensor_must_be_the_same_for_all() -> None:
    loop, x = looped("attention"), x_of(1, 2)
    loop.block = Conditioned()
    batch = batch_of(loop)
    batch.begin([0], x, block_kwargs={"c": x, "scale": 1.0})
    batch.begin([1], x, block_kwargs={"c": x, "scale": 2.0})
    with pytest.raises(ValueError, match="Tokens that run in one call must have the same block_kwargs"):
        batch.call()


@pytest.mark.parametrize(("gate", "calls"), [(ad.LinearGate(DIM), 1), (ad.PerIterationMLPGate(DIM, 4), 2)])
def test_gates_and_updates_are_asked_once_unless_they_read_the_step(gate: ad.Gate, calls: int) -> None:
    loop = looped("attention")
    loop.gate, loop.rule, loop.block = Counted(gate.double()), None, Counting(loop.block)
    batch, x = batch_of(loop), x_of(3, 1)
    for row in range(3):  # of which the first has one iteration left, which is not scored
        batch.begin([row], x[row : row + 1])
        batch.call()
    before = loop.gate.calls, loop.block.calls
    batch.call()
    assert (loop.gate.calls - before[0], loop.block.calls - before[1]) == (calls, 1)


def test_a_score_that_is_no_number_ends_its_row_alone() -> None:
    loop, x = looped("attention"), x_of(3, 3)
    x[1] = torch.nan
    batch = batch_of(loop)
    batch.begin([0, 1], x[:2])
    (failed,) = (one for one in batch.call() if isinstance(one, Failed))
    batch.begin([2], x[2:])
    got = left(batch)
    assert failed.row == 1
    assert str(failed.error).startswith("PerIterationMLPGate scored NaN at iteration 0.")
    for row in (0, 2):
        assert_alone(loop, x[row : row + 1], got[row])
    batch.begin([1], x[:1])
    assert_alone(loop, x[:1], left(batch)[1])


@exact
def test_nothing_of_a_row_that_was_given_back_is_seen_by_the_next(layout: LayoutName) -> None:
    loop, x = looped("attention"), x_of(1, 6)
    loop.gate = loop.rule = None
    batch = DepthBatch(loop.eval(), ad.KVReuseCache(layout, capacity=8), 2, 8)
    batch.begin([0], torch.full_like(x, torch.nan))
    left(batch)
    batch.release(0)
    batch.begin([1], x)  # longer than the new one beside it, which so is read as wide
    batch.begin([0], x[:, :5])
    got = left(batch)
    assert_alone(loop, x[:, :5], got[0])
    assert_alone(loop, x, got[1])


def test_a_rule_that_fails_ends_the_rows_that_began_with_it() -> None:
    def rule(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
        raise ArithmeticError("no rule")

    loop, x = looped("attention"), x_of(2, 3)
    batch = batch_of(loop)
    batch.begin([0], x[:1])
    batch.begin([1], x[1:], rule=rule)
    got = left(batch)
    assert_alone(loop, x[:1], got[0])
    assert isinstance(got[1], Failed)
    assert isinstance(got[1].error, ArithmeticError)


def test_a_row_that_has_left_a_pass_does_not_fail_with_it() -> None:
    def rule(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
        if scores.shape[-1] == 3:
            raise ArithmeticError("no rule")
        return remaining

    loop, x = looped("attention"), x_of(2, 1)
    batch = batch_of(loop)
    batch.begin([0, 1], x, max_depth=torch.tensor([[1], [4]]), rule=rule)
    assert next(one.row for one in batch.call() if isinstance(one, Ran) and one.left) == 0
    batch.begin([0], x[1:], min_depth=4)
    got = left(batch)
    assert isinstance(got[1], Failed)
    assert isinstance(got[0], Ran)
    both = torch.cat([x[:1], x[1:]], 1)
    want = loop(both, min_depth=torch.tensor([[1, 4]]), max_depth=torch.tensor([[1, 4]]))
    torch.testing.assert_close(got[0].hidden, want.hidden[0, 1:], rtol=1e-10, atol=1e-12)


def test_a_call_whose_block_fails_may_be_made_again() -> None:
    loop, x = looped("attention"), x_of(2, 3)
    loop.block = Counting(loop.block)
    batch = batch_of(loop)
    batch.begin([0], x[:1])
    batch.call()
    batch.begin([1], x[1:])
    loop.block.fails = True
    with pytest.raises(RuntimeError, match="out of luck"):
        batch.call()
    got = left(batch)
    for row in (0, 1):
        assert_alone(loop, x[row : row + 1], got[row])


class LastFails(nn.Module):
    """Fails once, in its second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.fails = nn.ModuleList(looped("attention").block for _ in range(2)), True

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        x = first(x)
        if self.fails:
            self.fails = False
            raise RuntimeError("out of luck")
        out: Tensor = second(x)
        return out


def test_the_first_call_may_be_made_again() -> None:
    loop, x = looped("attention"), x_of(1, 3)
    loop.block, loop.self_check = LastFails(), False
    batch = batch_of(loop)
    batch.begin([0], x)
    with pytest.raises(RuntimeError, match="out of luck"):
        batch.call()
    assert_alone(loop, x, left(batch)[0])


@pytest.mark.parametrize("waits", [False, True])
def test_a_row_may_begin_twice_before_the_first_call(waits: bool) -> None:
    loop, x = looped("attention"), x_of(1, 5)
    batch, wait = batch_of(loop), {(0, 0)}
    batch.begin([0], x[:, :1])
    if waits:
        assert batch.call(wait) == []
    batch.begin([0], x[:, 1:])
    if waits:
        assert batch.call({(0, 0), (0, 1)}) == []
    got = dict[int, Ran]()
    while batch.room < batch.width:
        got |= {one.position: one for one in batch.call() if isinstance(one, Ran) and one.left}
    want = loop(x).hidden[0]
    torch.testing.assert_close(torch.cat([got[0].hidden, got[1].hidden]), want, rtol=1e-10, atol=1e-12)


class FailingUpdate(Counting, ad.Update):
    """The same as an update."""


def test_an_update_that_fails_loses_no_result() -> None:
    loop, x = looped("attention"), x_of(2, 3)
    loop.update = FailingUpdate(loop.update)
    batch, most = batch_of(loop), torch.tensor([[1], [4]])
    batch.begin([0, 1], x, max_depth=most)
    loop.update.fails = True
    with pytest.raises(RuntimeError, match="out of luck"):
        batch.call()
    got = left(batch)
    for row in (0, 1):
        assert_alone(loop, x[row : row + 1], got[row], max_depth=most[row : row + 1])


def test_the_self_check_is_made_once_whatever_rules_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ad.RecurrentWrapper, "self_check", True)
    loop, calls = looped("attention"), list[int]()
    loop.block.register_forward_hook(lambda *_: calls.append(1))
    batch, after = batch_of(loop), list[int]()
    for row in range(3):
        batch.begin([row], x_of(1, 3), rule=ad.Threshold(0.1 * row))
        after.append(len(calls))
    assert after[0] > 0
    assert after == after[:1] * 3


@pytest.mark.shapes
def test_a_request_may_be_given_up_at_any_time() -> None:
    loop, x = looped("attention"), x_of(3, 3)
    batch = batch_of(loop, rows=2)
    batch.begin([0, 1], x[:2])
    batch.call()
    batch.release(1)
    batch.begin([1], x[2:])
    got = left(batch)
    assert_alone(loop, x[:1], got[0])
    assert_alone(loop, x[2:], got[1])


@pytest.mark.shapes
def test_rows_without_tokens_begin_nothing() -> None:
    loop, x = looped("attention"), x_of(2, 3)
    batch = batch_of(loop)
    batch.begin([0, 1], x, mask=torch.tensor([[False] * 3, [True] * 3]))
    assert batch.length(0) == 0
    got = left(batch)
    assert got.keys() == {1}
    assert_alone(loop, x[1:], got[1])
    batch.begin([0], x[:1, :0])
    assert batch.room == batch.width


class Convolved(nn.Module):
    """Mixes neighbours where no attention call shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.conv = looped("attention").block, nn.Conv1d(DIM, DIM, 3, padding=1).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x + self.conv(x.mT).mT)
        return out


def test_a_block_that_mixes_tokens_unseen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ad.RecurrentWrapper, "self_check", True)
    loop = looped("attention")
    loop.block = Convolved()
    with pytest.raises(ValueError, match="Convolved mixes tokens outside its attention calls"):
        batch_of(loop).begin([0, 1], x_of(2, 4))


def test_a_failure_is_returned_though_another_piece_raises_in_the_same_call() -> None:
    loop, x = looped("attention"), x_of(2, 1)
    loop.update, x[0] = FailingUpdate(loop.update), torch.nan
    for released in (False, True):
        batch = batch_of(loop)
        batch.begin([0], x[:1])
        batch.begin([1], x[1:], min_depth=4)
        loop.update.fails = True
        with pytest.raises(RuntimeError, match="out of luck"):
            batch.call()
        if released:  # what failed is gone, so the row's next token has not failed
            batch.release(0)
            batch.begin([0], x[1:])
        got = left(batch)
        assert_alone(loop, x[1:], got[1], min_depth=4)
        if released:
            assert_alone(loop, x[1:], got[0])
        else:
            assert isinstance(got[0], Failed) and got[0].position == 0 == batch.length(0)


def test_a_token_may_wait_in_the_call_after_one_that_raised() -> None:
    """The token before it has exited, but the call that raised did not return it."""
    loop, x = looped("attention"), x_of(2, 2)
    loop.update = FailingUpdate(loop.update)
    batch = batch_of(loop)
    batch.begin([0], x[:1, :1], max_depth=1)
    batch.begin([1], x[1:])
    loop.update.fails = True
    with pytest.raises(RuntimeError, match="out of luck"):
        batch.call()
    batch.begin([0], x[:1, 1:])
    got = [(one.row, one.position) for one in batch.call({(0, 1)})]
    assert (0, 0) in got and (0, 1) not in got
    want = loop(x[:1], max_depth=torch.tensor([[1, 4]])).hidden[0, 1:]
    ran = left(batch)
    assert isinstance(ran[0], Ran)
    torch.testing.assert_close(ran[0].hidden, want, rtol=1e-10, atol=1e-12)
    assert_alone(loop, x[1:], ran[1])


def test_rows_may_be_integers_of_any_kind() -> None:
    loop, x = looped("attention"), x_of(2, 1)
    batch = batch_of(loop)
    for rows in (torch.tensor([2, 0]), np.array([2, 0])):
        batch.begin(rows, x)
        got = left(batch)
        assert_alone(loop, x[:1], got[2])
        assert_alone(loop, x[1:], got[0])
        for row in rows:
            assert batch.length(row) == 1
            batch.drop(row, rows[1])
    assert batch.cache._begun.keys() == {0, 2}


@pytest.mark.plain
def test_a_rule_for_certain_rows_is_given_when_they_begin() -> None:
    loop, x, tau = looped("attention"), x_of(2, 4), torch.tensor([[0.0], [1.1]], dtype=torch.float64)
    loop.rule = ad.Threshold(tau)
    batch = batch_of(loop)
    expected = "Threshold expected to return how much of each token continues, for any row, shape"
    with pytest.raises(ValueError, match=expected):
        batch.begin([0, 1], x)
    batch.begin([1], x[:1], rule=ad.Threshold(tau[:1]))
    loop.rule = ad.Threshold(0.0)
    assert_alone(loop, x[:1], left(batch)[1])


def flying() -> DepthBatch:
    batch = batch_of(looped("attention"))
    batch.begin([0, 1], x_of(2, 1))
    return batch


def overtaking() -> DepthBatch:
    loop = looped("attention")
    loop.gate = loop.rule = None
    batch = batch_of(loop)
    batch.begin([0], x_of(1, 1))
    batch.call()
    batch.begin([0], x_of(1, 1))
    batch.call({(0, 0)})
    return batch


@pytest.mark.shapes
@exact
@pytest.mark.parametrize("gated", [True, False])
def test_a_token_that_is_no_number_reaches_no_other(layout: LayoutName, gated: bool) -> None:
    """Neither those before it in its row, nor rows that are read as wide as the longest of them."""
    loop, x = looped("attention"), x_of(3, 8)
    loop.rule = None
    loop.gate = loop.gate if gated else None
    batch = DepthBatch(loop.eval(), ad.KVReuseCache(layout, capacity=8), 3, 8)
    lengths = [5, 7, 6]
    batch.begin([0, 1, 2], x, mask=torch.arange(8) < torch.tensor(lengths)[:, None])
    left(batch)
    batch.begin([0, 1, 2], torch.stack([x[i, n : n + 1] for i, n in enumerate(lengths)]))
    assert not any(isinstance(one, Failed) for one in batch.call())
    batch.begin([0], torch.full_like(x[:1, :1], torch.nan))
    failed = [one for one in batch.call() if isinstance(one, Failed)]
    assert [(one.row, one.position) for one in failed] == ([(0, 6)] if gated else [])
    if not gated:
        batch.call()
        batch.drop(0, 6)
    assert batch.length(0) == 6
    got = {one.row: one for one in batch.call() if isinstance(one, Ran)} | left(batch)
    for row, n in enumerate(lengths):
        want = loop(x[row : row + 1, : n + 1])
        ran = got[row]
        assert isinstance(ran, Ran) and ran.position == n
        torch.testing.assert_close(ran.hidden, want.hidden[0, n:], rtol=1e-10, atol=1e-12)
    batch.begin([0], x[:1, 6:7])
    ran = left(batch)[0]
    assert isinstance(ran, Ran)
    torch.testing.assert_close(ran.hidden, loop(x[:1, :7]).hidden[0, 6:], rtol=1e-10, atol=1e-12)


TRAINING_ONLY = (
    "The rule best_half is for training only: with a cache it gets the new tokens alone and would decide differently. "
    "Decode with a rule that treats each token on its own, such as adadepth.Threshold(tau)."
)


def best_half(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    latest = scores[..., -1]
    return torch.where(latest >= latest.median(-1, keepdim=True).values, remaining, 0)


def only_trained() -> ad.RecurrentWrapper:
    loop = looped("attention")
    loop.rule = ad.TrainingOnly(best_half)
    return loop


def prompted() -> DepthBatch:
    batch = batch_of(looped("attention"))
    batch.begin([0], x_of(1, 5), min_depth=4)
    batch.call()
    return batch


ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "a cache without a capacity": (
        lambda: DepthBatch(looped("attention").eval(), ad.KVReuseCache(), 2, 2),
        "Expected a new KVReuseCache with a capacity, the most tokens that a row may hold, got no capacity. Pass "
        "one, such as adadepth.KVReuseCache(layout='filled', capacity=2048).",
    ),
    "no loop": (
        lambda: DepthBatch(None, ad.KVReuseCache, 2, 2),  # type: ignore[arg-type]
        "DepthBatch expected a RecurrentWrapper and a KVReuseCache, got None and the class KVReuseCache. Call it as "
        "DepthBatch(looped, adadepth.KVReuseCache(capacity=2048), rows=8, width=8).",
    ),
    "a training loop": (
        lambda: DepthBatch(looped("attention"), ad.KVReuseCache(capacity=4), 2, 2),
        "DepthBatch expected a causal loop in evaluation mode, got causal=True and training=True. Call looped.eval() "
        "first; a loop that is not causal has no next token.",
    ),
    "no rows": (
        lambda: batch_of(looped("attention"), rows=0),
        "DepthBatch expected rows and width of 1 or more, got rows=0, width=8.",
    ),
    "a row twice": (
        lambda: batch_of(looped("attention")).begin([1, 1], x_of(2, 1)),
        "begin expected numbers of the 4 rows, from 0, each once, and x for each of them, got rows [1, 1] and x of "
        "shape (2, 1, 8).",
    ),
    "a row twice, as tensors": (
        lambda: batch_of(looped("attention")).begin(torch.tensor([1, 1]), x_of(2, 1)),
        "begin expected numbers of the 4 rows, from 0, each once, and x for each of them, got rows [1, 1] and x of "
        "shape (2, 1, 8).",
    ),
    "a bool as a row": (
        lambda: batch_of(looped("attention")).begin([True], x_of(1, 1)),
        "DepthBatch expected the number of one of its 4 rows, from 0, got True.",
    ),
    "a mask of rows": (
        lambda: batch_of(looped("attention")).begin(torch.tensor([True]), x_of(1, 1)),
        "DepthBatch expected the number of one of its 4 rows, from 0, got tensor(True).",
    ),
    "a row below the first": (
        lambda: flying().release(-1),
        "DepthBatch expected the number of one of its 4 rows, from 0, got -1.",
    ),
    "a row above the last": (
        lambda: flying().length(4),
        "DepthBatch expected the number of one of its 4 rows, from 0, got 4.",
    ),
    "no number": (
        lambda: flying().drop(1.5, 0),  # type: ignore[arg-type]
        "DepthBatch expected the number of one of its 4 rows, from 0, got 1.5.",
    ),
    "a position below the first": (
        lambda: flying().drop(0, -1),
        "drop expected the position of the first token to forget, 0 or more, got -1. To keep the first n tokens of a "
        "row, call drop(row, n).",
    ),
    "what is not in flight": (
        lambda: batch_of(looped("attention")).call({(0, 1)}),
        "call expected wait to be rows and positions of tokens in flight, got (0, 1).",
    ),
    "one of two that began together": (
        lambda: flying().call({(0, 0)}),
        "Rows that began together must wait together, got wait=[(0, 0)], without (1, 0). Begin rows one by one if they "
        "must wait separately.",
    ),
    "a token that would overtake": (
        lambda: overtaking().call({(0, 0)}),
        "The token at position 1 of row 0 attends to the one at 0, which must wait at depth 1, so its keys and values "
        "are missing. Let both wait, or neither.",
    ),
    "a loop for training only": (lambda: batch_of(only_trained()).begin([0], x_of(1, 3)), TRAINING_ONLY),
    "a rule for training only": (
        lambda: batch_of(looped("attention")).begin([0], x_of(1, 3), rule=ad.TrainingOnly(best_half)),
        TRAINING_ONLY,
    ),
    "what is no rule": (
        lambda: batch_of(looped("attention")).begin([0], x_of(1, 3), rule="x"),  # type: ignore[arg-type]
        "RecurrentWrapper expected rule to be a function or a callable object, got str. The order is block, steps, "
        "gate, rule, update.",
    ),
    "half of a prompt": (
        lambda: prompted().drop(0, 3),
        "drop expected a position at which tokens of row 0 began, got 3: the 5 tokens from position 0 on began "
        "together, and some of them still run. Drop all of them, or wait until they have exited.",
    ),
    "a row that is too long": (
        lambda: batch_of(looped("attention")).begin([0], x_of(1, 9)),
        "Row 0 would hold 9 tokens, more than the 8 of KVReuseCache(capacity=8). End its text here, or give the cache "
        "the capacity of the longest prompt and its new tokens together.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_a_pass_that_was_refused_began_nothing() -> None:
    loop, x = looped("attention"), x_of(1, 3)
    batch = batch_of(loop)
    batch.begin([0], x)
    with pytest.raises(ValueError, match="Row 0 would hold 9 tokens"):
        batch.begin([0], x_of(1, 6))
    assert batch.length(0) == 3
    assert_alone(loop, x, left(batch)[0])


@pytest.mark.parametrize("requests", [300, pytest.param(20_000, marks=pytest.mark.every)])
def test_memory_does_not_grow_with_requests(requests: int) -> None:
    loop = looped("attention")
    batch = DepthBatch(loop.eval(), ad.KVReuseCache("compact", capacity=4), 16, 8)
    x, free = x_of(16, 3), list(range(16))
    begun, sizes = 0, []
    while begun < requests or len(free) < 16:
        while free and begun < requests and batch.room > 0:
            row = free.pop()
            batch.begin([row], x[row : row + 1, : 1 + begun % 3])
            begun += 1
        for one in batch.call():
            if isinstance(one, Ran) and one.left:
                batch.release(one.row)
                free.append(one.row)
        sizes.append(batch.cache.nbytes)
    assert max(sizes[len(sizes) // 4 :]) <= max(sizes[: len(sizes) // 4])
    assert not batch.cache.lengths.any()
    assert not batch._passes
    assert not batch._exited
    assert_alone(loop, x[:1], (batch.begin([5], x[:1]), left(batch)[5])[1])


def test_a_dropped_row_stays_away_while_others_of_its_pass_leave() -> None:
    loop, x, most = looped("attention"), x_of(3, 2), torch.tensor([[4], [2], [4]])
    loop.rule = None
    batch = batch_of(loop)
    batch.begin([0, 1, 2], x, max_depth=most)
    batch.call()
    batch.drop(0, 0)
    got = left(batch)
    assert got.keys() == {1, 2}
    for row in (1, 2):
        assert_alone(loop, x[row : row + 1], got[row], max_depth=most[row : row + 1])
