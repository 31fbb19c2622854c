"""`calibrate`: from a wanted mean depth to a threshold, for any gate, and what it refuses."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks_zoo import PreNorm
from narrow import the
from torch import Tensor, nn

import adadepth as ad
from adadepth.calibration import arguments, search

DIM, STEPS = 16, 4


class Watching(ad.Gate):
    """Sees in which mode it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[bool, bool]] = set()

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        self.seen.add((self.training, torch.is_grad_enabled()))
        return h[..., 0]


def head() -> nn.Linear:
    linear = nn.Linear(DIM, 40)
    nn.init.normal_(linear.weight)
    return linear


def learned() -> ad.Gate:
    gate = ad.PerIterationMLPGate(DIM, STEPS, hidden=8)
    for p in gate.parameters():
        nn.init.normal_(p, std=0.7)
    return gate


GATES: dict[str, Callable[[], ad.Gate]] = {
    "learned": learned,
    "ConvergenceGate": ad.ConvergenceGate,
    "MaxProbGate": lambda: ad.MaxProbGate(head()),
    "EntropyGate": lambda: ad.EntropyGate(head()),
}


def make_loop(gate: ad.Gate | None, rule: ad.Rule | None = None) -> ad.RecurrentWrapper:
    block = PreNorm(DIM, causal=True)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    return ad.RecurrentWrapper(block, STEPS, gate, rule)


def text(batches: int = 4) -> list[dict[str, Any]]:
    """Rows with padding on the left."""
    shape = (8, 32)
    mask = torch.arange(shape[1]) >= torch.randint(0, 12, (shape[0], 1))
    return [{"x": torch.randn(*shape, DIM), "mask": mask} for _ in range(batches)]


def mean_depth(loop: ad.RecurrentWrapper, rule: ad.Rule, batches: list[dict[str, Any]]) -> float:
    loop.eval()
    loop.rule = rule
    depths = torch.cat([loop(**batch).trace.depth[batch["mask"]] for batch in batches])
    loop.rule = None
    return float(depths.double().mean())


RULES = ad.Threshold, ad.SurvivalThreshold, lambda tau: ad.Lookahead(ad.Threshold(tau))
# Each rule with every second gate; `make test-every` has the rest.
REACHED = [
    pytest.param(name, rule, marks=[pytest.mark.every] if (i + j) % 2 else [])
    for i, name in enumerate(GATES)
    for j, rule in enumerate(RULES)
]


@pytest.mark.parametrize(("name", "rule"), REACHED)
def test_reaches_the_depth_that_is_asked_for(name: str, rule: Callable[[float], ad.Rule]) -> None:
    loop, data = make_loop(GATES[name]()), text()
    for wanted in (2.2, 3.2, 3.9):
        found = ad.calibrate(loop, data, wanted, rule)
        assert found.depth == pytest.approx(wanted, rel=0.02)
        assert found.rule is not loop.rule and loop.rule is None
        assert found.depth == pytest.approx(mean_depth(loop, found.rule, data[::2]))
        assert found.unseen_depth == pytest.approx(mean_depth(loop, found.rule, data[1::2]))
        assert found.unseen_depth == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("name", ["min_depth", "max_depth"])
@pytest.mark.parametrize("each", [False, True])
def test_depths_in_the_data_bound_what_can_be_reached(name: str, each: bool) -> None:
    loop, data = make_loop(learned()), text()
    bound: int | Tensor = torch.tensor([[2], [3]] * 4) if each else 3
    ends = {"min_depth": (2.5 if each else 3.0, 4.0), "max_depth": (1.0, 2.5 if each else 3.0)}[name]
    data = [{**batch, "mask": torch.ones(8, 32, dtype=torch.bool), name: bound} for batch in data]
    for wanted in ends:
        assert ad.calibrate(loop, data, wanted).depth == pytest.approx(wanted)
    middle = sum(ends) / 2
    assert ad.calibrate(loop, data, middle).depth == pytest.approx(middle, rel=0.02)
    for outside in (ends[0] - 0.1, ends[1] + 0.1):
        with pytest.raises(ad.OutOfReach, match=re.escape(f"from {ends[0]:.4g}, where")):
            ad.calibrate(loop, data, outside)


def test_another_default_device_changes_nothing() -> None:
    loop, data = make_loop(learned()), text()
    with torch.device("meta"):
        assert ad.calibrate(loop, data, 2.5).depth == pytest.approx(2.5, rel=0.02)


def test_the_ends_can_be_reached() -> None:
    loop, data = make_loop(learned()), text()
    assert ad.calibrate(loop, data, 1.0).depth == 1
    assert ad.calibrate(loop, data, float(STEPS)).depth == STEPS


def test_few_runs_are_enough() -> None:
    loop, data = make_loop(learned()), text()
    passes = []
    loop.register_forward_hook(lambda *_: passes.append(1))
    found = ad.calibrate(loop, [batch["x"] for batch in data], 2.5)
    assert found.depth == pytest.approx(2.5, rel=0.01)
    assert len(passes) <= 2 * (1 + 4 + 1)  # two batches each: without exits, at most four to fit, and the unseen


def test_the_model_is_left_as_it_was() -> None:
    rule, gate = ad.Threshold(0.3), Watching()
    loop = make_loop(gate, rule).train()
    the(PreNorm, loop.block).norm1.eval()
    modes = {name: module.training for name, module in loop.named_modules()}
    ad.calibrate(loop, text(), 2.0)
    with pytest.raises(ValueError, match="mean_depth"):
        ad.calibrate(loop, text(), 9.0)
    assert gate.seen == {(False, False)}
    assert loop.rule is rule
    assert {name: module.training for name, module in loop.named_modules()} == modes
    assert torch.is_grad_enabled()


def test_search_bears_a_measure_that_is_off_and_not_monotone() -> None:
    taus = torch.linspace(0, 1, 1001, dtype=torch.float64)

    def predict(tau: float) -> float:
        return 4 - 3 * tau

    def measure(tau: float) -> float:
        x = predict(tau)
        return x + 0.25 * (x - 1) * (4 - x) * (1 + 0.3 * float(torch.tensor(40 * x).sin()))

    for wanted in (1.2, 2.0, 3.2, 3.9):
        tau, depth = search(wanted, taus, predict, measure)
        assert depth == measure(tau)
        assert depth == pytest.approx(wanted, rel=0.02)
        assert search(wanted, taus.flip(0), predict, measure)[1] == pytest.approx(wanted, rel=0.02)


def test_search_measures_also_where_it_thought_it_knew() -> None:
    taus = torch.linspace(0, 3, 4, dtype=torch.float64)
    assert search(4.0, taus, lambda tau: 4 - tau, lambda tau: 3.9 - tau) == (0, 3.9)


@pytest.mark.filterwarnings("ignore:calibrate found no threshold")
def test_scores_that_are_all_alike_give_the_nearest_depth() -> None:
    class Half(ad.Gate):
        def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
            return torch.where(h[..., 0] > 0, 0.5, -0.5)

    loop, data = make_loop(Half()), text()
    depths = {mean_depth(loop, ad.Threshold(tau), data[::2]) for tau in (-1.0, 0.0, 1.0)}
    for wanted in (1.1, 1.5, 2.0, 2.5, 3.9):
        assert ad.calibrate(loop, data, wanted).depth == min(depths, key=lambda depth: abs(depth - wanted))


def test_without_a_gate() -> None:
    with pytest.raises(ValueError, match="calibrate") as error:
        ad.calibrate(make_loop(None), text())
    assert str(error.value) == (
        "calibrate needs a gate: without one, every score is 1 and no threshold can separate tokens. Give the loop a "
        "gate or an exit criterion."
    )


@pytest.mark.plain
@pytest.mark.parametrize(
    ("rule", "got"), [(ad.Threshold(0.1), "Threshold"), (ad.Survival, "the class Survival"), (1, "1")]
)
def test_a_rule_that_takes_no_threshold(rule: Any, got: str) -> None:
    with pytest.raises(ValueError, match="calibrate") as error:
        ad.calibrate(make_loop(learned()), text(), rule=rule)
    assert str(error.value) == (
        "calibrate expected rule to be a class or a function of a threshold, such as adadepth.SurvivalThreshold, got "
        f"{got}. Pass the class, not an object of it; a rule without a threshold cannot be calibrated."
    )


MADE: dict[str, tuple[Callable[[float], Any], str]] = {
    "ACT": (
        ad.ACT,
        "ACT(-1.0) raised: ACT expected eps, a number in [0, 1), got -1.0. The paper's is 0.01. Pass a class or a "
        "function such as adadepth.Threshold.",
    ),
    "a rule around a rule": (
        ad.Lookahead,  # type: ignore[dict-item]
        "Lookahead(-1.0) raised: Lookahead expected rule to be a rule, got -1.0. Give it one, such as Threshold(0.5). "
        "Pass a class or a function such as adadepth.Threshold.",
    ),
    "a class": (
        lambda tau: ad.Threshold,
        "<lambda>(-1.0) gave the class Threshold. Write it as in rule=lambda tau: adadepth.Threshold(tau).",
    ),
    "nothing": (
        lambda tau: None,
        "<lambda>(-1.0) gave None. Write it as in rule=lambda tau: adadepth.Threshold(tau).",
    ),
}


@pytest.mark.plain
@pytest.mark.parametrize("name", MADE)
def test_what_makes_no_rule_from_a_threshold(name: str) -> None:
    rule, said = MADE[name]
    with pytest.raises(ValueError, match="calibrate") as error:
        ad.calibrate(make_loop(learned()), text(), rule=rule)
    assert str(error.value) == f"calibrate expected rule to make a rule from any threshold, but {said}"


def test_a_cache_in_the_data() -> None:
    with pytest.raises(ValueError, match="calibrate") as error:
        ad.calibrate(make_loop(learned()), [batch | {"cache": ad.KVReuseCache()} for batch in text()])
    assert str(error.value) == (
        "calibrate runs each batch several times, which a cache would take for one long text, got cache=a "
        "KVReuseCache. Give it whole texts, without a cache."
    )


class Around(nn.Module):
    """Runs its loop by its forward, or not at all."""

    def __init__(self, runs: bool) -> None:
        super().__init__()
        self.loop, self.runs = make_loop(learned()), runs

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.loop.forward(x, mask=mask).hidden if self.runs else x


@pytest.mark.parametrize("runs", [False, True])
def test_a_loop_that_is_not_called(runs: bool) -> None:
    with pytest.raises(ValueError, match="calibrate") as error:
        ad.calibrate(Around(runs), text())
    assert str(error.value) == (
        "calibrate saw no pass of the loop in Around. The model must call its RecurrentWrapper, as looped(...): "
        "looped.forward(...) is not seen."
    )


def test_too_few_batches() -> None:
    with pytest.raises(ValueError, match="calibrate") as error:
        ad.calibrate(make_loop(learned()), text(1))
    assert str(error.value) == (
        "calibrate expected at least 2 batches, because it measures the result on every second one, got 1. Split the "
        "data into more batches."
    )


@pytest.mark.parametrize(("rule", "low"), [(ad.Threshold, 1), (lambda tau: ad.Lookahead(ad.Threshold(tau)), 2)])
@pytest.mark.parametrize("wanted", [0.9, 4.1])
def test_out_of_reach(wanted: float, rule: Callable[[float], ad.Rule], low: int) -> None:
    with pytest.raises(ad.OutOfReach, match="calibrate") as error:
        ad.calibrate(make_loop(learned()), text(), wanted, rule)
    assert str(error.value) == (
        f"calibrate expected mean_depth from {low}, where all tokens exit as early as the rule allows, to 4, "
        f"where all exit as late as it allows, got {wanted}."
    )


@pytest.mark.parametrize("part", [0, 1])
def test_nothing_but_padding(part: int) -> None:
    data = text(2)
    data[part]["mask"] = torch.zeros(8, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match="calibrate") as error:
        ad.calibrate(make_loop(learned()), data)
    assert str(error.value) == (
        "calibrate expected real tokens in the batches 1, 3, 5, ... and in the batches 2, 4, 6, ..., got only padding "
        "in one of these two parts. Remove batches without real tokens."
    )


@pytest.mark.plain  # the hook would raise first
def test_data_that_is_one_batch() -> None:
    with pytest.raises(ValueError, match="calibrate") as error:
        ad.calibrate(make_loop(learned()), text()[0])  # type: ignore[arg-type]
    assert str(error.value) == (
        "calibrate expected data to be batches, each a tensor or a mapping of the model's arguments, got a str. Put a "
        "single batch into a list, split in two: the result is measured on every second batch."
    )


class Model(nn.Module):
    """What people have around a loop; asks for ids and, in a nested mapping, for a shift of them."""

    def __init__(self, loops: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, DIM)
        self.loops = nn.ModuleList(make_loop(learned()) for _ in range(loops))

    def forward(self, ids: Tensor, extra: dict[str, Tensor] | None = None) -> Tensor:
        return self.loops[0](self.embed(ids) + (0 if extra is None else extra["shift"])).hidden


def test_a_model_that_holds_a_loop() -> None:
    model, data = Model(1), list(torch.randint(40, (4, 8, 32)))
    found = ad.calibrate(model, data, 2.5, ad.SurvivalThreshold)
    rows = [{"x": model.embed(ids), "mask": torch.ones_like(ids).bool()} for ids in data]
    assert found == ad.calibrate(model.loops[0], rows, 2.5, ad.SurvivalThreshold)._replace(rule=found.rule)
    assert not model.loops[0]._forward_hooks
    zero = [{"ids": ids, "extra": {"shift": torch.zeros(DIM), "n": 3}} for ids in data]
    assert ad.calibrate(model, zero, 2.5, ad.SurvivalThreshold).tau == found.tau


@pytest.mark.parametrize("loops", [0, 2])
def test_a_model_with_another_number_of_loops(loops: int) -> None:
    with pytest.raises(ValueError, match="calibrate") as error:
        ad.calibrate(Model(loops), list(torch.randint(40, (4, 8, 32))))
    assert str(error.value) == (
        f"calibrate expected a RecurrentWrapper or a module that holds exactly one, got Model with {loops}. Pass the "
        "wrapper itself, with data that are its arguments. For an adapted Hugging Face model use adadepth.hf.calibrate."
    )


def test_tensors_are_moved_to_the_device_of_the_model() -> None:
    batch = {"x": torch.zeros(2), "block_kwargs": {"c": torch.zeros(3), "scale": 2.0}}
    by_place, by_name = arguments(batch, nn.Linear(2, 2, device="meta"))
    assert by_place == () and by_name["x"].is_meta and by_name["block_kwargs"]["c"].is_meta
    assert by_name["block_kwargs"]["scale"] == 2.0
    assert arguments(batch["x"], nn.Identity())[0][0] is batch["x"]  # no parameters, nowhere to go


class Alike(ad.Gate):
    """The same score for every token of an iteration."""

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        return torch.full_like(h[..., 0], 0.9 if step else 0.7)


@pytest.mark.parametrize(("rule", "nearest"), [(ad.Threshold, 4), (ad.SurvivalThreshold, 3)])
def test_a_goal_that_equal_scores_cannot_give_is_warned_of(rule: Callable[[float], ad.Rule], nearest: int) -> None:
    """Nearest is what is nearest to the goal among the depths that a threshold can give."""
    loop = make_loop(Alike())
    with pytest.warns(UserWarning, match="calibrate") as warned:
        assert ad.calibrate(loop, text(), mean_depth=nearest - 0.45, rule=rule).depth == nearest
    assert str(warned[0].message) == (
        f"calibrate found no threshold near mean_depth={nearest - 0.45}: the nearest gives {nearest}, because many "
        "tokens have the same scores and exit together. Train the gate, or choose that value."
    )
    assert warned[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        assert ad.calibrate(loop, text(), mean_depth=float(nearest), rule=rule).depth == nearest
