"""`calibrate`: from a wanted mean depth to a threshold, for any gate, and what it refuses."""

from collections.abc import Callable

import pytest

pytest.importorskip("transformers")

import torch
from blocks_zoo import PreNorm
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import adadepth as ad
from adadepth.hf import adapt
from adadepth.hf.calibration import OutOfReach, calibrate, search

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


def text(batches: int = 4) -> list[dict[str, Tensor]]:
    """Rows with padding on the left."""
    shape = (8, 32)
    mask = torch.arange(shape[1]) >= torch.randint(0, 12, (shape[0], 1))
    return [{"x": torch.randn(*shape, DIM), "mask": mask} for _ in range(batches)]


def mean_depth(loop: ad.RecurrentWrapper, rule: ad.Rule, batches: list[dict[str, Tensor]]) -> float:
    loop.eval()
    loop.rule = rule
    depths = torch.cat([loop(**batch).trace.depth[batch["mask"]] for batch in batches])
    return float(depths.double().mean())


@pytest.mark.parametrize("rule", [ad.Threshold, ad.SurvivalThreshold, lambda tau: ad.Lookahead(ad.Threshold(tau))])
@pytest.mark.parametrize("name", GATES)
def test_reaches_the_depth_that_is_asked_for(name: str, rule: Callable[[float], ad.Rule]) -> None:
    loop, data = make_loop(GATES[name]()), text()
    for wanted in (2.2, 3.2, 3.9):
        found = calibrate(loop, data, wanted, rule)
        assert found.relative_flops == pytest.approx(wanted, rel=0.02)
        assert found.depth == pytest.approx(mean_depth(loop, found.rule, data[::2]))
        assert found.unseen_depth == pytest.approx(mean_depth(loop, found.rule, data[1::2]))
        assert found.unseen_relative_flops == found.unseen_depth  # all is looped
        assert found.unseen_depth == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize(("layers", "once", "wanted"), [(None, 0, 2.3), (slice(1, 2), 2, 1.6)])
def test_a_language_model(layers: slice | None, once: int, wanted: float) -> None:
    config = GPTNeoXConfig(
        vocab_size=40,
        hidden_size=DIM,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.4,
    )
    model = adapt(GPTNeoXForCausalLM(config), STEPS, learned(), ad.Threshold(0.5), layers=layers)
    nn.init.constant_(model.loop.update.alpha, 0.5)
    mask = torch.arange(32) >= torch.randint(0, 12, (8, 1))
    data = [{"input_ids": torch.randint(40, (8, 32)), "attention_mask": mask, "labels": mask.long()} for _ in range(4)]
    found = calibrate(model, data, wanted)
    assert found.relative_flops == pytest.approx(wanted, rel=0.02)
    for batch, depth, cost in [
        (data[::2], found.depth, found.relative_flops),
        (data[1::2], found.unseen_depth, found.unseen_relative_flops),
    ]:
        depths = torch.cat([model.eval()(**inputs, rule=found.rule).trace.depth[mask] for inputs in batch])
        assert depth == pytest.approx(float(depths.double().mean()))
        assert cost == pytest.approx((once + (3 - once) * depth) / 3)
    ids = [batch["input_ids"] for batch in data]
    assert calibrate(model, ids, wanted).relative_flops == pytest.approx(wanted, rel=0.02)
    assert calibrate(model, ids, (once + (3 - once) * STEPS) / 3).depth == STEPS


def test_the_ends_can_be_reached() -> None:
    loop, data = make_loop(learned()), text()
    assert calibrate(loop, data, 1.0).depth == 1
    assert calibrate(loop, data, float(STEPS)).depth == STEPS


def test_few_runs_are_enough() -> None:
    loop, data = make_loop(learned()), text()
    passes = []
    loop.register_forward_hook(lambda *_: passes.append(1))
    found = calibrate(loop, [batch["x"] for batch in data], 2.5)
    assert found.depth == pytest.approx(2.5, rel=0.01)
    assert len(passes) <= 2 * (1 + 4 + 1)  # two batches each: without exits, at most four to fit, and the unseen


def test_the_model_is_left_as_it_was() -> None:
    rule, gate = ad.Threshold(0.3), Watching()
    loop = make_loop(gate, rule).train()
    loop.block.norm1.eval()
    modes = {name: module.training for name, module in loop.named_modules()}
    calibrate(loop, text(), 2.0)
    with pytest.raises(ValueError, match="relative_flops"):
        calibrate(loop, text(), 9.0)
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


def test_scores_that_are_all_alike_give_the_nearest_depth() -> None:
    class Half(ad.Gate):
        def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
            return torch.where(h[..., 0] > 0, 0.5, -0.5)

    loop, data = make_loop(Half()), text()
    depths = {mean_depth(loop, ad.Threshold(tau), data[::2]) for tau in (-1.0, 0.0, 1.0)}
    for wanted in (1.1, 1.5, 2.0, 2.5, 3.9):
        assert calibrate(loop, data, wanted).depth == min(depths, key=lambda depth: abs(depth - wanted))


def test_without_a_gate() -> None:
    with pytest.raises(ValueError, match="calibrate") as error:
        calibrate(make_loop(None), text())
    assert str(error.value) == (
        "calibrate needs a gate: without one every score is 1 and no threshold can choose. Give the loop a gate or an "
        "exit criterion."
    )


def test_too_few_batches() -> None:
    with pytest.raises(ValueError, match="calibrate") as error:
        calibrate(make_loop(learned()), text(1))
    assert str(error.value) == (
        "calibrate expected at least 2 batches, since every second one is kept unseen, got 1. Cut the text into more "
        "batches."
    )


@pytest.mark.parametrize(("rule", "low"), [(ad.Threshold, 1), (lambda tau: ad.Lookahead(ad.Threshold(tau)), 2)])
@pytest.mark.parametrize("wanted", [0.9, 4.1])
def test_out_of_reach(wanted: float, rule: Callable[[float], ad.Rule], low: int) -> None:
    with pytest.raises(OutOfReach, match="calibrate") as error:
        calibrate(make_loop(learned()), text(), wanted, rule)
    assert str(error.value) == (
        f"calibrate expected relative_flops from {low}, where all tokens leave as early as the rule lets them, to 4, "
        f"where all stay as long, got {wanted}."
    )


@pytest.mark.parametrize("part", [0, 1])
def test_nothing_but_padding(part: int) -> None:
    data = text(2)
    data[part]["mask"] = torch.zeros(8, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match="calibrate") as error:
        calibrate(make_loop(learned()), data)
    assert str(error.value) == (
        "calibrate found nothing but padding in every second batch, from the first or the second on. Leave such "
        "batches out."
    )


@pytest.mark.plain  # the hook would raise first
def test_data_that_is_one_batch() -> None:
    with pytest.raises(ValueError, match="calibrate") as error:
        calibrate(make_loop(learned()), text()[0])
    assert str(error.value) == (
        "calibrate expected data to be batches, each a tensor or a mapping of the model's arguments, got a str. One "
        "batch alone goes into a list; split it for a part that is kept unseen."
    )
