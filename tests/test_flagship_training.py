"""The flagship's trainer: killed and resumed, on many ranks, refused, stopped, begun from another run."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("omegaconf")

import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate.state import AcceleratorState
from launched import FITTING, halting, launch
from narrow import the
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import adadepth as ad
from examples.adaponderlm import checkpoints, config, routers, train, trainer
from examples.adaponderlm.config import CONFIGS
from examples.adaponderlm.model import scratch
from examples.adaponderlm.objective import Objective
from examples.adaponderlm.trained import load, score_at

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
KILLS = 1
WORDS = "the quick brown fox jumps over 13 lazy dogs, and then (again) it rests until\nthe next day begins\n"
SMALL = [
    *("model.shape.hidden_size=32", "model.shape.intermediate_size=64", "model.shape.num_attention_heads=2"),
    *("data.window=16", "train.steps=8", "train.batch=4", "train.log=1", "train.warmup=0.2"),
]
# Gates whose scores spread around the threshold, and a penalty that counts.
SPREAD = [
    *("model.gate.hidden=8", "model.gate.bias=0", "model.gate.std=1", "model.gate.tau=0.3"),
    *("stages.exits.penalty.weight=0.1", "stages.exits.penalty.k=0.3", "stages.exits.penalty.over=live"),
    "stages.exits.gate_rate=0.1",
]
FIGURES = "loss", "depth", "relative_flops", "penalty", "norm"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Values that stand for a small text."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("".join(f"{i} {WORDS}" for i in range(300)))
    return [f"data.source={folder / 'text.txt'}", f"data.cache={folder / 'cache'}"]


@pytest.fixture(autouse=True)
def plain_state() -> Iterator[None]:
    """What a test says to accelerate is not heard by the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def curve(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / trainer.METRICS).read_text().splitlines()]


def trained(out: Path, *values: str, files: tuple[str, ...] = ("tiny.yaml",)) -> list[dict[str, Any]]:
    """The metrics of a run in this process."""
    train.main(["--config", *files, *values, f"out={out}"])
    return curve(out)


def agree(got: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float = 1e-6) -> None:
    """The same steps and, for each, the same figures."""
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for a, b in zip(got, expected, strict=True):
        assert (a["stage"], a["tokens"], a["rate"]) == (b["stage"], b["tokens"], b["rate"])
        for name in FIGURES:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)
        assert a["scores"] == pytest.approx(b["scores"], rel=tolerance, abs=tolerance)


@pytest.fixture(scope="module")
def whole(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole")
    trained(out, *text, *SMALL, *SPREAD)
    AcceleratorState._reset_state(reset_partial_state=True)
    return out


def checkpoint(out: Path, step: int) -> dict[str, Tensor]:
    """Weights and moments, by name."""
    path = out / "checkpoints" / f"step-{step:08d}"
    there = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: the(TensorStorageMetadata, about) for name, about in there.items()}
    state = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in tensors.items()}
    with checkpoints._alone():
        dcp.load(state, checkpoint_id=path)
    return state


def steps(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


def alike(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=partial("{}: {}".format, name))


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}


def said(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)


@pytest.mark.every
def test_killed_at_any_moment_it_goes_on_as_if_it_had_not_been(text: list[str], tmp_path: Path) -> None:
    values = [*text, *SMALL, *SPREAD, "train.steps=5", "train.save=1"]
    done = said([sys.executable, "tests/killed.py", str(tmp_path), str(KILLS), "0", *values])
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "killed.json").read_text())
    assert len({line["depth"] for line in result["whole"]}) > 3
    assert len(result["kills"]) > KILLS and all(kill["whole"] for kill in result["kills"])
    assert len(result["curves"]) > 5
    for got in result["curves"].values():
        agree(got, result["whole"])
    for out in [path for path in tmp_path.iterdir() if path.is_dir() and path.name not in ("warm", "whole")]:
        assert not list(out.rglob("*.part")) and steps(out) == [4, 5]
        alike(weights(out), weights(tmp_path / "whole"), 0)
        assert config.read([str(out / "config.yaml")]).out == str(out)


RETROFIT = ["tiny.yaml", "retrofit.yaml"]
ROUTER = ["tiny.yaml", "router.yaml"]
TRAININGS = {  # files, values, and the row of a step from which on tokens leave as soon as anyone may
    "gates": (["tiny.yaml"], SPREAD, None),
    "one rank halts": (["tiny.yaml"], SPREAD, 2),
    "all halt": (["tiny.yaml"], SPREAD, 0),
    "gates alone": (RETROFIT, ["model.gate.hidden=8", "stages.gates.share=0.75", "stages.joint.share=0.25"], None),
    "router": (ROUTER, ["model.router.kind=window", "model.router.tells=true", "model.router.probed=16"], None),
}


WAYS = ("ddp", "fsdp2")
RESUMED = ("gates", "fsdp2"), ("router", "ddp")
# Three trainings in one way, and `make test-every` all in both: what a rank computes is the same in both.
ONE = {"gates": "fsdp2", "one rank halts": "fsdp2", "router": "ddp"}
PAIRS = [(name, way) for name in TRAININGS for way in WAYS]


def launched(rows: list[dict[str, Any]], folder: Path) -> None:
    """Trainings on two ranks, by our own configuration for FSDP2, made one for CPUs."""
    about = yaml.safe_load((CONFIGS / "accelerate" / "fsdp2.yaml").read_text())
    (folder / "fsdp2.yaml").write_text(yaml.safe_dump(about | {"use_cpu": True, "num_processes": 2}))
    (folder / "trainings.json").write_text(json.dumps(rows))
    assert launch(str(folder / "fsdp2.yaml"), str(folder / "trainings.json"))


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest) -> list[tuple[str, str]]:
    """What is trained on two ranks, and how."""
    return [*ONE.items()] if "not every" in request.config.getoption("markexpr") else PAIRS


@pytest.fixture(scope="module")
def on_ranks(text: list[str], pairs: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each training on two ranks by DDP or by FSDP2; two of them are ended and resumed."""
    folder, rows = tmp_path_factory.mktemp("ranks"), []
    for name, way in pairs:
        files, values, halts = TRAININGS[name]
        words = ["--config", *files, *text, *SMALL, *values, "train.save=100", f"out={folder / name / way}"]
        row = {"sharded": way == "fsdp2", "halts": halts}
        ends = [["train.stop=5"], []] if (name, way) in RESUMED else [[]]
        rows += [row | {"arguments": [*words, *end]} for end in ends]
    words = ["--config", "tiny.yaml", *text, *SMALL, *SPREAD, "train.save=100", f"out={folder / 'moved'}"]
    rows += [
        {"sharded": False, "halts": None, "arguments": [*words, "train.stop=3"]},
        {"sharded": True, "halts": None, "arguments": [*words, "train.stop=6"]},
    ]
    words = ["--config", "tiny.yaml", *text, *SMALL, *SPREAD, "train.precision=bf16", f"out={folder / 'bf16'}"]
    rows += [{"sharded": True, "halts": None, "arguments": words}]
    launched(rows, folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "way"), [pytest.param(*p, marks=[] if p in ONE.items() else [pytest.mark.every]) for p in PAIRS]
)
def test_two_ranks_are_one_process(
    on_ranks: Path, text: list[str], name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routers, "STEPS", FITTING)
    files, values, halts = TRAININGS[name]
    if halts is not None:
        monkeypatch.setattr(Objective, "_depths", halting(Objective._depths, halts))
    one = trained(on_ranks / name / "one", *text, *SMALL, *values, "train.save=100", files=tuple(files))
    depths = {line["depth"] for line in one}
    assert depths == {4.0} if name == "gates alone" else min(depths) < 3
    out = on_ranks / name / way
    agree(curve(out), one, 1e-5)
    alike(weights(out), weights(on_ranks / name / "one"), 1e-5)
    alike(checkpoint(out, 8), checkpoint(on_ranks / name / "one", 8), 1e-5)
    run = load(out)
    loss, _ = score_at(run, run.router)(torch.arange(40).view(2, 20))
    assert loss.isfinite().all()
    assert run.model.generation_config.eos_token_id == run.tokenizer.eos_token_id


def test_a_checkpoint_fits_any_number_of_ranks(on_ranks: Path, whole: Path, text: list[str]) -> None:
    assert steps(on_ranks / "moved") == [3, 6]
    agree(trained(on_ranks / "moved", *text, *SMALL, *SPREAD, "train.save=100"), curve(whole), 1e-5)


def test_shards_compute_in_bf16_and_add_up_in_float32(on_ranks: Path) -> None:
    losses, exact = ([line["loss"] for line in curve(on_ranks / name)] for name in ("bf16", "gates/fsdp2"))
    assert losses == pytest.approx(exact, rel=0.01)
    # of bf16 numbers from 4 to 8, the mean of two is a multiple of 1/64
    assert all(4 < loss < 8 and loss * 64 % 1 for loss in losses), losses


def test_begun_from_another_run_it_goes_on_as_that_one(whole: Path, text: list[str], tmp_path: Path) -> None:
    trained(tmp_path / "first", *text, *SMALL, *SPREAD, "train.stop=4")
    begin = f"begin={tmp_path / 'first'}"
    agree(trained(tmp_path / "second", *text, *SMALL, *SPREAD, begin), curve(whole))
    alike(weights(tmp_path / "second"), weights(whole), 0)
    # killed before its first checkpoint, with metrics of its own: it begins again
    shutil.rmtree(tmp_path / "second" / "checkpoints")
    agree(trained(tmp_path / "second", *text, *SMALL, *SPREAD, begin), curve(whole))
    assert not (tmp_path / "first" / "model").exists() and len(curve(tmp_path / "first")) == 4


def test_a_run_may_begin_where_one_without_gates_is(text: list[str], tmp_path: Path) -> None:
    fixed = ["model.update=interpolate", "model.gate.hidden=8"]
    trained(
        tmp_path / "first", *text, *SMALL, "model.gate.kind=none", "model.update=interpolate", *WHOLE, "train.stop=4"
    )
    trained(tmp_path / "second", *text, *SMALL, *fixed, "train.save=5", f"begin={tmp_path / 'first'}", "train.stop=5")
    first, second = checkpoint(tmp_path / "first", 4), checkpoint(tmp_path / "second", 5)
    new = second.keys() - first.keys()
    assert new and all(".loop.gate." in name for name in new) and not first.keys() - second.keys()
    ages = {name: age.item() for name, age in second.items() if name.startswith("optimiser.step.")}
    assert all(age == (1 if ".gate." in name else 5) for name, age in ages.items())
    refused(tmp_path / "third", "is of another model: it has in another shape", *text, *SMALL, *fixed,
            "model.shape.intermediate_size=32", f"begin={tmp_path / 'first'}")  # fmt: skip
    refused(tmp_path / "fourth", "is of another model: it has more", *text, *SMALL, "model.gate.kind=none", *WHOLE,
            "model.update=interpolate", f"begin={tmp_path / 'second'}")  # fmt: skip


WHOLE = "stages.open.share=1", "stages.exits.share=0", "stages.exits.depth=full", "stages.exits.penalty.weight=0"


def refused(out: Path, words: str, *values: str, files: tuple[str, ...] = ("tiny.yaml",)) -> str:
    with pytest.raises(SystemExit) as error:
        trained(out, *values, files=files)
    says = str(error.value)
    assert says.startswith("error: ") and words in says and "\n" not in says, says
    return says


def test_rows_run_in_parts_are_the_whole_batch(text: list[str], tmp_path: Path) -> None:
    values = [*text, *SMALL, *SPREAD, "stages.exits.penalty.weight=0"]
    whole = trained(tmp_path / "whole", *values)
    parts = trained(tmp_path / "parts", *values, "train.micro=1")
    for a, b in zip(parts, whole, strict=True):
        assert all(a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-6) for name in FIGURES), a["step"]
    alike(weights(tmp_path / "parts"), weights(tmp_path / "whole"), 1e-5)
    assert min(line["depth"] for line in whole) < 3
    with_penalty = trained(tmp_path / "penalty", *text, *SMALL, *SPREAD, "train.micro=1", "train.stop=2")
    assert all(math.isfinite(line["loss"]) for line in with_penalty)


def test_the_newest_checkpoints_are_kept(text: list[str], tmp_path: Path) -> None:
    trained(tmp_path, *text, *SMALL, "train.save=3", "train.keep=2")
    assert steps(tmp_path) == [6, 8]
    trained(tmp_path, *text, *SMALL, "train.steps=12", "train.save=2", "train.keep=3")
    assert steps(tmp_path) == [8, 10, 12]


def test_while_gates_learn_alone_the_backbone_does_not_move_by_a_bit(text: list[str], tmp_path: Path) -> None:
    stages = [
        *("stages.open.share=0.5", "stages.exits.share=0.5", "stages.exits.depth=full", "stages.exits.learns=gates"),
        *("train.decay=0.5", "train.save=2", "train.keep=9", "model.gate.hidden=8"),
    ]
    trained(tmp_path, *text, *SMALL, *stages)
    first, before, after = (checkpoint(tmp_path, step) for step in (2, 4, 8))
    for name in before:
        alone = "model.loop.gate." in name
        assert torch.equal(before[name], after[name]) is not alone, name
    learned = [name for name in first if name.startswith("model.model.base.") and first[name].dtype.is_floating_point]
    assert all(not torch.equal(first[name], before[name]) for name in learned)  # there were moments to move it


def test_a_retrofit_begins_as_the_model_it_is_made_from(text: list[str], tmp_path: Path) -> None:
    settings = config.read(["tiny.yaml"], SMALL).model
    base = scratch(settings)
    base.save_pretrained(tmp_path / "base")
    values = [
        *text,
        *SMALL,
        f"model.pretrained={tmp_path / 'base'}",
        "stages.gates.share=0.75",
        "stages.joint.share=0.25",
    ]
    lines = trained(tmp_path / "run", *values, "train.save=6", files=("tiny.yaml", "retrofit.yaml"))
    assert lines[0]["loss"] == pytest.approx(math.log(257), abs=0.1)
    state, moved = checkpoint(tmp_path / "run", 6), checkpoint(tmp_path / "run", 8)
    for name, weight in base.state_dict().items():
        assert torch.equal(state[f"model.model.base.{name}"], weight)
        assert not torch.equal(moved[f"model.model.base.{name}"], weight)
    gate = [name for name in state if name.startswith("model.model.loop.gate.")]
    assert gate and all(f"optimiser.exp_avg.{name.removeprefix('model.')}" in state for name in gate)
    assert state["model.model.loop.update.alpha"].abs().item() > 0


DEPTHS = {"random": ("random", "full"), "another stage": ("1", "3")}


@pytest.mark.parametrize("name", DEPTHS)
def test_steps_of_different_depth_share_a_line_of_the_metrics(text: list[str], tmp_path: Path, name: str) -> None:
    depth = [f"stages.{stage}.depth={depth}" for stage, depth in zip(("open", "exits"), DEPTHS[name], strict=True)]
    depth += ["stages.exits.penalty.weight=0"]
    each = trained(tmp_path / "each", *text, *SMALL, *depth)
    both = trained(tmp_path / "both", *text, *SMALL, *depth, "train.log=8")
    assert len({line["depth"] for line in each}) > 1 and len(both) == 1
    assert both[0]["depth"] == pytest.approx(sum(line["depth"] for line in each) / 8)
    for i, score in enumerate(both[0]["scores"]):
        seen = [line["scores"][i] for line in each if len(line["scores"]) > i]
        assert score == pytest.approx(sum(seen) / len(seen))


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    trainer.keep_until(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    trainer.keep_until(tmp_path / "none.jsonl", 2)
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_is_not_finite_stops_the_run_and_the_last_checkpoint_stays(text: list[str], tmp_path: Path) -> None:
    out = tmp_path / "rate"
    trained(out, *text, *SMALL, "train.save=2", "train.stop=4")
    says = refused(out, "step 6, stage exits: loss", *text, *SMALL, "train.save=100", "train.rate=1e38")
    assert "The newest checkpoint is of step 4." in says and "Try a lower train.rate" in says
    assert steps(out) == [2, 4] and not (out / "model").exists()
    batch = torch.load(out / "diverged-6-rank-0.pt")
    assert batch.shape == (4, 17) and str(out / "diverged-6-rank-0.pt") in says
    whole = trained(tmp_path / "whole", *text, *SMALL)
    agree(trained(out, *text, *SMALL), whole)  # with other settings it goes on


def refusal(out: Path, *values: str) -> str:
    with pytest.raises(SystemExit) as error:
        trained(out, *values)
    return str(error.value)


@pytest.mark.parametrize(("poisoned", "words"), [("gate", "score of iteration 2"), ("head", "loss")])
def test_a_poisoned_weight_is_named_by_what_it_spoils(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poisoned: str, words: str
) -> None:
    real = Objective.forward

    def forward(self: Objective, ids: Tensor, turn: Any, first: int = 0) -> Any:
        if turn.at == 2:
            with torch.no_grad():
                gate = the(ad.PerIterationMLPGate, self.model.loop.gate)
                spoilt = gate.mlps[1] if poisoned == "gate" else self.model.get_output_embeddings()
                next(spoilt.parameters()).view(-1)[0] = math.nan
        return real(self, ids, turn, first)

    monkeypatch.setattr(Objective, "forward", forward)
    says = refusal(tmp_path, *text, *SMALL, "train.save=1")
    assert says.startswith("error: step 3, stage open: ") and words in says.split(" is not finite")[0]
    assert "of step 2, right before it: remove it" in says and steps(tmp_path) == [1, 2]


def test_weights_that_are_not_finite_are_not_saved(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer.Trainer._update

    def update(self: trainer.Trainer, turn: Any) -> Any:
        line = real(self, turn)
        if turn.at == 3:
            with torch.no_grad():
                next(self.whole.parameters())[0, 0] = math.inf
        return line

    monkeypatch.setattr(trainer.Trainer, "_update", update)
    says = refusal(tmp_path, *text, *SMALL, "train.save=2")
    assert says.startswith("error: step 4: the weights are not finite after it. The newest checkpoint is of step 2.")
    assert steps(tmp_path) == [2]


def test_options_that_change_speed_and_memory_change_no_loss(whole: Path, text: list[str], tmp_path: Path) -> None:
    exact = curve(whole)
    agree(trained(tmp_path / "checkpointing", *text, *SMALL, *SPREAD, "train.checkpointing=true"), exact)
    AcceleratorState._reset_state(reset_partial_state=True)
    rough = trained(tmp_path / "bf16", *text, *SMALL, *SPREAD, "train.precision=bf16")
    assert [line["loss"] for line in rough] == pytest.approx([line["loss"] for line in exact], rel=0.02)
    assert rough[0]["loss"] != exact[0]["loss"]


@pytest.mark.plain
@pytest.mark.every
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_steps_without_exits_compile_to_one_graph(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counter, compiled = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda run: compiled(run, backend=counter, fullgraph=True))
    whole = trained(tmp_path / "whole", *text, *SMALL, *SPREAD)
    assert counter.frame_count == 0
    agree(trained(tmp_path / "compiled", *text, *SMALL, *SPREAD, "train.compile=true"), whole, 1e-5)
    assert counter.frame_count == 1


def test_tensorboard_is_told(text: list[str], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = trained(tmp_path / "run", *text, *SMALL, "train.trackers=[tensorboard]")
    (file,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    for name in ("loss", "depth", "relative_flops", "tokens_per_second"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]


BAD = {
    "train.stepz=3": "Key 'stepz' not in 'Train'",
    "train.rate=fast": "could not be converted to Float",
    "data.source=none.txt": "there is no file none.txt",
    "data.source={empty}": "there is no text in",
    "data.tokenizer=nowhere/at/all": "no tokenizer of that name",
    "model.shape.vocab_size=200": "expected a tokenizer of at most the 200 ids of the model, got 257",
    "seed=-1": "expected seed of at least 0, got -1",
    "train.steps=0": "expected train.steps of at least 1, got 0",
    "train.log=0": "expected train.log of at least 1, got 0",
    "train.micro=0": "expected train.micro of at least 1, got 0",
    "train.micro=3": "expected rows of a rank to be a multiple of train.micro=3, got 4",
    "train.stop=99": "expected train.stop of at most train.steps=8, got 99",
    "train.rate=0": "expected train.rate above 0, got 0",
    "train.clip=-1": "expected train.clip above 0, got -1",
    "train.betas=[0.9,1]": "expected train.betas in [0, 1), got [0.9, 1",
    "train.trackers=[nothing]": "there is no tracker nothing here",
    "data.window=0": "expected data.window of at least 1, got 0",
    "data.window=4096": "expected data.window of at most the 2048 positions of the model, got 4096",
    "model.steps=0": "expected model.steps of at least 1, got 0",
    "model.shape.num_attention_heads=5": "expected model.shape.hidden_size to be a multiple of num_attention_heads=5",
    "model.gate.first=9": "expected model.gate.first from 1 to model.steps=4, got 9",
    "model.pretrained=nowhere/at/all": "cannot load the model nowhere/at/all",
    "stages.exits.penalty.k=2": "expected stages.exits.penalty.k in (0, 1], got 2",
    "stages.exits.penalty.warmup=[0.5,0.1]": "expected stages.exits.penalty.warmup to begin at 0 or later",
    "stages.exits.rate=1": "expected stages.exits.rate in (0, 1), got 1",
    "stages.exits.share=-0.5": "expected stages.exits.share of at least 0, got -0.5",
    "stages.exits.penalty.weight=-1": "expected stages.exits.penalty.weight of at least 0, got -1",
    "stages.exits.guidance=1": "needs losses of all iterations: depth full or alternate, got exits",
    "model.gate.kind=entropy": "stages.exits.penalty needs a learned gate, got model.gate.kind=entropy",
    "train.warmup=-1": "expected train.warmup of at least 0, got -1",
    "stages.exits.share=0.5": "expected the shares of all stages to sum to 1, got 0.9",
    "stages.exits.depth=deep": "expected stages.exits.depth to be a number or one of full,",
    "begin=nowhere": "cannot begin where there is no checkpoint: nowhere",
}


@pytest.mark.parametrize("value", BAD)
def test_refused_in_one_line(text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty.txt").touch()
    refused(tmp_path / "out", BAD[value], *text, *SMALL, value.format(empty=tmp_path / "empty.txt"))


def test_a_router_of_letters_reads_bytes(text: list[str], tmp_path: Path) -> None:
    refused(tmp_path, "model.router.kind=words reads bytes", *text, *SMALL, "data.tokenizer=x", files=tuple(ROUTER))


def test_a_gate_and_a_router_are_not_had_at_once(text: list[str], tmp_path: Path) -> None:
    refused(tmp_path, "expected model.gate.kind or", *text, *SMALL, "model.gate.kind=shared", files=tuple(ROUTER))


def test_a_router_is_never_used_before_it_is_fitted(text: list[str], tmp_path: Path) -> None:
    small = [*text, *SMALL, "train.stop=6"]
    trained(tmp_path / "first", *small, files=("tiny.yaml", "loop.yaml"))
    values = [*text, *SMALL, "model.router.probed=16", f"begin={tmp_path / 'first'}"]
    refused(tmp_path / "second", "with a router that was never fitted", *values, files=tuple(ROUTER))


def test_files_are_refused_in_one_line(text: list[str], tmp_path: Path) -> None:
    refused(tmp_path / "out", "there is no configuration none.yaml", files=("none.yaml",))
    (tmp_path / "bad.yaml").write_text("train: {steps: 3\n")
    refused(tmp_path / "out", "bad.yaml is not YAML", files=(str(tmp_path / "bad.yaml"),))
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "out", "cannot write to", *text, *SMALL)
    trained(tmp_path / "out", *text, *SMALL, "train.stop=1")
    for value, other in {"model.gate.kind=shared": "model", "stages.exits.rate=0.4": "stages", "seed=1": "seed",
                         "data.window=8": "data.window"}.items():  # fmt: skip
        refused(tmp_path / "out", f"holds a run with other {other}: give another out", *text, *SMALL, value)
    refused(tmp_path / "out", "the text to train on has changed", *SMALL, *longer(text, tmp_path))


def longer(text: list[str], folder: Path) -> list[str]:
    (folder / "longer.txt").write_text(WORDS * 400)
    return [f"data.source={folder / 'longer.txt'}", text[1]]


def test_the_bar_says_how_it_goes(text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, *text, *SMALL, "train.log=4")
    bar = capsys.readouterr().out.strip().splitlines()[-1]
    assert bar.startswith("exits 8/8 loss ") and all(word in bar for word in (" depth ", " FLOPs ", "× ", " tokens/s"))
    assert [line["step"] for line in curve(tmp_path)] == [4, 8]


@pytest.mark.every  # `on_ranks` starts its processes by itself
def test_launched_as_the_readme_says(text: list[str], tmp_path: Path) -> None:
    values = ["--config", "tiny.yaml", *text, *SMALL, f"out={tmp_path / 'out'}"]
    done = said([*LAUNCH, "examples/adaponderlm/train.py", *values, "train.log=4"])
    assert done.returncode == 0, done.stderr
    bar = done.stdout.strip().splitlines()[-1]
    assert bar.startswith("exits 8/8 loss ") and all(word in bar for word in (" depth ", " FLOPs ", "× ", " tokens/s"))
    assert [line["step"] for line in curve(tmp_path / "out")] == [4, 8]
    assert load(tmp_path / "out").config.train.steps == 8


@pytest.mark.every  # what `refused` sees of many errors, in a process that imports everything once more
def test_a_process_that_is_refused_says_one_line(text: list[str], tmp_path: Path) -> None:
    values = ["--config", "tiny.yaml", *text, *SMALL, f"out={tmp_path / 'out'}"]
    done = said([sys.executable, "examples/adaponderlm/train.py", *values, "train.stepz=3"])
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: train.stepz=3: Key 'stepz' not in 'Train'. Did you mean one of: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "2 processes were started, each by itself: on CPUs give accelerate launch --cpu"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "accelerate shards on accelerators alone"),
    ],
)
def test_processes_that_are_alone_are_refused(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    refused(tmp_path / "out", words, *text, *SMALL)
    assert not (tmp_path / "out").exists()
