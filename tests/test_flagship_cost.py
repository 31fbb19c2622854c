"""What training costs at full scale: the accounting, held against models that run, and the page that shows it."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import the
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from adadepth.flops import FORMULAS
from examples.adaponderlm import cost
from examples.adaponderlm.config import read
from examples.adaponderlm.cost import METHOD, SIZES, Costs, Way
from examples.adaponderlm.model import build
from examples.adaponderlm.objective import Objective
from examples.adaponderlm.plan import Plan

PAGE = Path(__file__).parent.parent / "docs" / "full-scale.md"
D, LAYERS, WORDS, WINDOW, STEPS = 64, 6, 384, 96, 4
SMALL = [
    f"model.shape.hidden_size={D}",
    f"model.shape.intermediate_size={4 * D}",
    f"model.shape.num_hidden_layers={LAYERS}",
    "model.shape.num_attention_heads=4",
    f"model.shape.vocab_size={WORDS}",
    f"data.window={WINDOW}",
    "train.steps=10",
]
# Parameters of Pythia's models: those of EleutherAI's on the hub.
PYTHIA = {"70m": 70_426_624, "160m": 162_322_944, "410m": 405_334_016, "1.4b": 1_414_647_808, "2.8b": 2_775_208_960}


@pytest.fixture(scope="module")
def pythias() -> dict[str, Costs]:
    return {name: Costs(read([name, METHOD]), 3.6) for name in SIZES}


def small(*more: str) -> Costs:
    return Costs(read([SIZES[0], METHOD], [*SMALL, *more]), 2.5)


def objective(costs: Costs) -> Objective:
    torch.manual_seed(0)
    model = build(costs.config.model)
    model.loop.checkpoint = costs.config.train.checkpointing
    return Objective(model, costs.config).train()


def rows(count: int) -> Tensor:
    return torch.randint(0, WORDS, (count, WINDOW + 1), generator=torch.Generator().manual_seed(0))


# Parameters


def test_410m_is_built_without_memory_and_has_pythias_parameters_and_the_gates() -> None:
    config = read(["pythia-410m.yaml", METHOD])
    with torch.device("meta"):
        model = build(config.model)
    assert all(weight.is_meta for weight in model.parameters())
    d = 1024
    gate = (d * 4 * d + 4 * d) + (4 * d + 1)  # two linear maps, and their biases
    assert sum(weight.numel() for weight in model.base.parameters()) == 405_334_016
    assert sum(weight.numel() for weight in model.parameters()) == 405_334_016 + 3 * gate


@pytest.mark.every
def test_every_size_has_the_parameters_that_its_shape_says(pythias: dict[str, Costs]) -> None:
    for (name, costs), published in zip(pythias.items(), PYTHIA.values(), strict=True):
        shape, model = costs.config.model.shape, costs.model
        d, norm = shape.hidden_size, 2 * shape.hidden_size
        layer = 2 * norm + (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)
        assert model.layers == layer * shape.num_hidden_layers, name
        assert model.base == model.layers + norm + 2 * 50_304 * d == published, name
        assert model.gates == 3 * (4 * d * d + 4 * d + 4 * d + 1), name


# FLOPs


def test_flops_of_a_run_are_those_of_a_formula(pythias: dict[str, Costs]) -> None:
    """Of 410M, written out: 26 billion tokens, four passes, the last two fifths of which at depth 3.6."""
    d, layers, words, window, tokens = 1024, 24, 50_304, 2048, 12_398 * 1024 * 2048

    def spent(depth: float, gates: bool) -> float:
        block, attention = 24 * d * d * layers, 4 * d * window * layers
        pondering, head, gate = 4 * d * words, 2 * d * words, 8 * d * d + 8 * d
        last = (depth - 1) / 3  # as many run the second iteration as the last
        scored = 1 + 2 * last
        return 3 * (block * depth + head + gate * scored * gates) + 3.5 * (attention * depth + pondering * 3 * last)

    costs = pythias["pythia-410m.yaml"]
    assert costs.tokens == tokens
    assert costs.fixed() == pytest.approx(tokens * spent(4, gates=False), rel=1e-9)
    assert costs.run() == pytest.approx(tokens * (0.4 * spent(4, True) + 0.6 * spent(3.6, True)), rel=1e-3)
    again = costs.fixed(checkpointing=True) - costs.fixed()
    assert again == pytest.approx(tokens * 4 * (24 * d * d + 4 * d * window) * layers, rel=1e-9)


def attention(grad: Any, q: Any, k: Any, v: Any, *args: Any, **_: Any) -> int:
    """Scores again, and the gradients of weights, queries, keys and values."""
    return 5 * 2 * q[0] * q[1] * q[2] * k[2] * q[3]


def unmix(grad: Any, h: Any, weight: Any, *args: Any, **_: Any) -> int:
    """Logits again, and the gradients of weights, states, head and table."""
    return 5 * 2 * h[0] * weight[0] * h[1]


COUNTED = FORMULAS | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention,
    torch.ops.adadepth.expected_embedding_backward: unmix,
}


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.every), True])
def test_flops_of_a_step_are_those_that_torch_counts(checkpointing: bool) -> None:
    """At full depth, and with exits as deep as they were; within 1 %."""
    costs = small(f"train.checkpointing={checkpointing}")
    run, tokens = objective(costs), 2 * WINDOW
    plan = Plan(costs.config)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as forward:
        loss = run(rows(2), plan.turn(0)).loss
    assert forward.get_total_flops() == pytest.approx(tokens * costs.forward(STEPS).total, rel=0.01)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as backward:
        loss.backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    assert both == pytest.approx(tokens * costs.step(STEPS, checkpointing=checkpointing), rel=0.01)


def test_flops_of_the_real_70m_are_those_that_torch_counts(pythias: dict[str, Costs]) -> None:
    """Of a pass over 16 tokens, which needs no window of 2,048."""
    costs = pythias[SIZES[0]]
    model = build(costs.config.model)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(torch.arange(16).unsqueeze(0), min_depth=STEPS)
    live = torch.ones(1, 16, STEPS, dtype=torch.bool)
    assert counter.get_total_flops() == pytest.approx(costs.model.flops.count(live).total, rel=0.01)


# Memory


class Alive(TorchDispatchMode):
    """The bytes of all tensors that operators make, `now` and at their `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if (place := storage.data_ptr()) and place not in self.known:
            self.known.add(place)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, place, storage.nbytes())

    def _gone(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def peak(costs: Costs, count: int, at: int) -> int:
    """The most bytes that a step on so many rows holds at once, beside weights and gradients."""
    run = objective(costs)
    for weight in run.parameters():
        weight.grad = torch.zeros_like(weight)
    ids, turn, half = rows(count), Plan(costs.config).turn(at), costs.config.train.precision == "bf16"
    with Alive() as alive:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = run(ids, turn).loss
        loss.backward()
    return alive.peak


# Each stage with checkpointing or without it; `make test-every` has the other, and bf16.
ALIVE = [
    pytest.param(at, precision, again, marks=[] if precision == "fp32" and again == (at > 0) else [pytest.mark.every])
    for at in (0, 9)
    for precision in ("fp32", "bf16")
    for again in (False, True)
]


@pytest.mark.parametrize(("at", "precision", "checkpointing"), ALIVE)
def test_activations_are_the_bytes_alive_in_a_step(at: int, precision: str, checkpointing: bool) -> None:
    """Four more rows hold so many bytes more, within 4 %. Stages without exits keep no keys and values."""
    costs = small(f"train.checkpointing={checkpointing}", f"train.precision={precision}")
    measured = (peak(costs, 8, at) - peak(costs, 4, at)) / (4 * WINDOW)
    config = costs.config
    if at == 0:
        del config.stages["exits"]
    assert measured == pytest.approx(cost.activations(config, checkpointing), rel=0.04)


def test_memory_of_a_gpu_is_the_sum_of_its_parts(pythias: dict[str, Costs]) -> None:
    costs = pythias["pythia-2.8b.yaml"]
    weights, layers, d = costs.model.total, costs.model.layers, 2560
    rows = 2 * 2048 * cost.activations(costs.config, checkpointing=False)
    assert rows / (2 * 2048) == 4 * 32 * 38 * d + 4 * 10 * d + 3 * (4 * d + 4 * 4 * d) + 2 * 4 * 4 * d + 12 * 50_304
    assert costs.memory(Way(1, False, False, 2)) == pytest.approx(18 * weights + rows)
    assert costs.memory(Way(8, False, False, 2)) == pytest.approx(22 * weights + rows)
    outside = weights - layers + layers / 16
    assert costs.memory(Way(8, True, False, 2)) == pytest.approx(2 * weights + 2 * outside + 4 * weights + rows)
    once = 1024 * 2048 * rows / (2 * 2048) / 64
    assert costs.memory(Way(64, True, False, 16)) == pytest.approx(weights / 4 + 4 * outside + once)


def test_what_is_chosen_fits_and_a_row_more_would_not(pythias: dict[str, Costs]) -> None:
    for name, costs in pythias.items():
        for gpus in cost.GPUS:
            way = costs.best(gpus)
            assert way is not None and costs.memory(way) <= 72 * 2**30, name
            more = way._replace(rows=2 * way.rows)
            assert way.rows == 16 or costs.memory(more) > 72 * 2**30, name
            assert costs.config.train.batch % (way.rows * gpus) == 0
            if way.checkpointing:
                assert all(costs.fits(gpus, sharded=s, checkpointing=False) is None for s in (False, True)), name


def test_configurations_fit_a_gpu_as_they_are(pythias: dict[str, Costs]) -> None:
    for name, costs in pythias.items():
        train = costs.config.train
        assert costs.memory(Way(1, False, train.checkpointing, the(int, train.micro))) <= 72 * 2**30, name


# The page


def test_the_page_is_what_the_code_prints(
    pythias: dict[str, Costs], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = {costs.config.out: costs.model for costs in pythias.values()}
    monkeypatch.setattr(cost, "count", lambda config: known[config.out])  # once is enough
    cost.main([])
    printed = capsys.readouterr().out
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text().replace("26.0", "27.0"))
    cost.main(["--markdown", str(copy)])
    assert printed.strip() in PAGE.read_text(), "python -m examples.adaponderlm.cost --markdown docs/full-scale.md"
    assert copy.read_text() == PAGE.read_text()


def test_hours_follow_from_flops(pythias: dict[str, Costs]) -> None:
    costs = pythias[SIZES[0]]
    text = cost.page({"pythia-70m.yaml": costs}, 0.25)
    hours = costs.fixed() / (8 * 989e12 * 0.25) / 3600
    assert f"| {hours:.1f} / " in text


@pytest.mark.parametrize("args", [["--mfu", "0"], ["--mfu", "1.5"], ["--depth", "0.5"]])
def test_what_cannot_be_is_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cost.main(args)
    assert "expected --mfu in (0, 1] and --depth from 1" in capsys.readouterr().err


def test_a_missing_file_is_refused_in_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^error: there is no configuration nothing.yaml"):
        cost.main(["nothing.yaml"])
