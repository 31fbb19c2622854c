"""Ranks whose tokens have depths of their own: two processes make what one makes of the rows of both."""

import functools
import multiprocessing
from typing import Any

import pytest
import ranked
import torch
from narrow import the
from torch import Tensor, nn

import adadepth as ad

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # of copies of a process
SECONDS = 240  # of which a machine that has nothing else to do needs 15


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What `ranked.py` made of its cases, those of this run alone, by rank."""
    pytest.importorskip("transformers")
    import adadepth.hf  # noqa: F401 (once, for both)

    asked: list[Any] = [item for item in request.session.items if "case" in getattr(item, "fixturenames", ())]
    here = {item.callspec.params["case"] for item in asked}
    cases = [case for case in (*ranked.CASES, *ranked.MORE) if case in here]
    folder = tmp_path_factory.mktemp("ranks")
    # Copies of this process have imported everything, but where it computed on a GPU they cannot train.
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    started = [context.Process(target=ranked.logged, args=(str(folder), rank, cases)) for rank in range(ranked.RANKS)]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(SECONDS)
        codes = [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
            process.join()
    assert None not in codes, f"After {SECONDS} s the ranks still wait for each other."
    assert codes == [0] * ranked.RANKS, "\n".join(path.read_text() for path in folder.glob("*.txt"))
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranked.RANKS)]


@functools.cache
def alone(name: str, data: str) -> dict[str, Tensor]:
    return ranked.trained(ranked.objective(name), *ranked.rows(data))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "case", [*ranked.CASES, *(pytest.param(case, marks=pytest.mark.every) for case in ranked.MORE)], ids=", ".join
)
def test_two_ranks_make_what_one_process_makes_of_all_rows(ranks: list[dict[Any, Any]], case: tuple[str, ...]) -> None:
    want, got = alone(*case[:2]), [of[case] for of in ranks]
    close(torch.stack([of["loss"] for of in got]).mean(), want["loss"])
    for of in got:
        assert of.keys() == want.keys()
        for name in want.keys() - {"loss"}:
            close(of[name], want[name])


@pytest.mark.parametrize("case", ranked.DECODED, ids=", ".join)
def test_they_decode_alike(ranks: list[dict[Any, Any]], case: tuple[str, str]) -> None:
    name, data = case
    want = ranked.decoded(ranked.objective(name).model, ranked.empty_cache(name), *ranked.rows(data))
    close(torch.cat([of[case] for of in ranks]), want)


def test_a_budget_has_one_price_if_the_trace_is_gathered(ranks: list[dict[Any, Any]]) -> None:
    prices, weights = ranked.to_a_depth(ranked.own, *ranked.rows("apart"))
    untrained = nn.utils.parameters_to_vector(ranked.objective("block").model.loop.gate.parameters())
    assert len(prices.unique()) == len(prices) and not torch.allclose(weights, untrained)
    for of in ranks:
        close(of["budget"][0], prices)
        close(of["budget"][1], weights)


def test_a_budget_has_a_price_for_each_rank_otherwise(ranks: list[dict[Any, Any]]) -> None:
    (one, _), (other, _) = (of["budget, not gathered"] for of in ranks)
    assert not bool(torch.isclose(one, other).any())


@pytest.mark.parametrize("name", ranked.MODELS)
def test_the_cases_are_what_they_say(name: str) -> None:
    made = ranked.objective(name)

    def depths(data: str) -> list[Tensor]:
        ids, mask, deep = ranked.rows(data)
        return list(made.model(ids, mask, max_depth=deep).trace.depth.chunk(ranked.RANKS))

    deeper, other = depths("apart")
    assert len(deeper.unique()) > 2  # the rule cuts as well
    assert int(deeper.max()) > int(other.max()) > 1
    deeper, other = depths("one rank halts")
    assert int(deeper.max()) > 2 and bool((other == 1).all())
    assert bool((torch.cat(depths("all halt")) <= 1).all())
    assert bool((depths("all padding")[1] == 0).all())
    reached = {
        data: any(bool(grad.any()) for weight, grad in alone(name, data).items() if "gate" in weight)
        for data in ("apart", "all halt")
    }
    assert reached == {"apart": True, "all halt": False}


# A rank on which nothing is left goes on with the others


class Picky(nn.Module):
    """A block that cannot run on nothing, and that counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.ran = ranked.Layer(), 0

    def forward(self, x: Tensor) -> Tensor:
        assert x.numel() > 0
        self.ran += 1
        return self.layer(x)


@pytest.mark.parametrize("real", [True, False], ids=["halts at once", "all padding"])
@pytest.mark.parametrize("run", ["trains", "checkpoints", "evaluates", "decodes"])
def test_iterations_on_nothing_run_the_block_and_change_nothing(run: str, real: bool) -> None:
    x = torch.randn(2, 5, ranked.DIM)
    mask, depth = torch.full((2, 5), real), torch.tensor([[1]])  # a tensor: as an int it would shorten the loop
    block = Picky()
    loop = ad.RecurrentWrapper(block, ranked.STEPS, ranked.gate(), ad.Threshold(0.6), ad.Interpolate())
    loop.checkpoint = run == "checkpoints"

    def outputs() -> list[Tensor]:
        x.requires_grad_(trained := run in ("trains", "checkpoints"))
        cache = ad.KVReuseCache() if run == "decodes" else None
        with torch.set_grad_enabled(trained):
            out = loop(x, mask=mask, max_depth=depth, cache=cache)
        grads = torch.autograd.grad(out.hidden.sum(), [x, *loop.block.parameters()]) if trained else []
        return [out.hidden, *out.trace, *grads]

    want = outputs()
    loop.agree, block.ran = lambda left: True, 0
    for got, expected in zip(outputs(), want, strict=True):
        assert torch.equal(got, expected)
    assert block.ran == ranked.STEPS * (2 if run == "checkpoints" else 1)


# The three functions by themselves


def test_any_rank_asks_all(ranks: list[dict[Any, Any]]) -> None:
    assert [of["any"] for of in ranks] == [[False, True, True]] * 2


@pytest.mark.parametrize(("name", "sizes"), [("gathered", [2, 2]), ("gathered, uneven", [2, 1])])
def test_the_gradient_of_gathered_rows_is_the_sum_of_what_all_ranks_ask(
    ranks: list[dict[Any, Any]], name: str, sizes: list[int]
) -> None:
    rows = torch.tensor([[0.0, 1.0], [2.0, 3.0], [10.0, 11.0], [12.0, 13.0]])[: sum(sizes)]
    for of, mine in zip(ranks, rows.split(sizes), strict=True):
        everyone, grad = of[name]
        assert torch.equal(everyone, rows)
        assert torch.equal(grad, 2 * mine * (1 + 2))


def test_only_the_group_is_asked(ranks: list[dict[Any, Any]]) -> None:
    assert [of["in groups"] for of in ranks] == [(False, torch.tensor([0])), (True, torch.tensor([1]))]


@pytest.mark.shapes
def test_without_ranks_they_change_nothing() -> None:
    assert [ad.ranks.any_rank(flag) for flag in (False, True)] == [False, True]
    rows = torch.randn(2, 3, requires_grad=True)
    assert ad.ranks.gather(rows) is rows


@pytest.mark.shapes
def test_anchor_gives_what_was_not_reached_a_gradient_of_0() -> None:
    parts = [nn.Linear(3, 1) for _ in range(3)]
    parts[2].requires_grad_(False)
    with torch.no_grad():
        parts[1].weight.fill_(torch.nan)
        parts[2].weight.fill_(torch.inf)
    loss = parts[0](torch.ones(2, 3)).sum()
    anchored = ad.ranks.anchor(loss, nn.ModuleList(parts))
    assert torch.equal(anchored, loss)
    anchored.backward()
    grads = [(the(Tensor, part.weight.grad).tolist(), the(Tensor, part.bias.grad).tolist()) for part in parts[:2]]
    assert grads == [([[2.0] * 3], [2.0]), ([[0.0] * 3], [0.0])]
    assert parts[2].weight.grad is None and parts[2].bias.grad is None


def test_anchor_keeps_a_loss_that_is_not_finite_and_its_dtype() -> None:
    module = nn.Linear(3, 1, dtype=torch.bfloat16)
    for loss in (torch.tensor(torch.nan), torch.tensor(torch.inf), torch.tensor(1.5, dtype=torch.float64)):
        anchored = ad.ranks.anchor(loss, module)
        assert anchored.dtype == loss.dtype
        assert torch.equal(anchored.nan_to_num(-1.0), loss.nan_to_num(-1.0))
        (grad,) = torch.autograd.grad(anchored, [module.weight])
        assert grad.dtype == torch.bfloat16 and not bool(grad.any())
