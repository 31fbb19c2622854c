"""What the guide to the flagship says of it, beyond what every page is tested for."""

import re
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("omegaconf")

import torch
from accelerate import Accelerator

from examples.adaponderlm.config import CONFIGS, read
from examples.adaponderlm.model import scratch
from examples.adaponderlm.trainer import Trainer

GUIDE = (Path(__file__).parent.parent / "docs" / "adaponderlm.md").read_text()


def test_the_table_has_every_method() -> None:
    rows = re.findall(r"^\| `(\w+\.yaml)` \|", GUIDE, re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in (CONFIGS / "methods").iterdir())


def test_every_size_of_pythia_is_named() -> None:
    named = set(re.findall(r"`(pythia-[\w.]+\.yaml)`", GUIDE))
    assert named == {path.name for path in CONFIGS.glob("pythia-*.yaml")}


def test_a_retrofit_first_trains_what_it_adds_and_nothing_else(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    torch.manual_seed(0)
    base = scratch(read(["tiny.yaml"]).model)
    base.save_pretrained(tmp_path / "base")
    small = ["train.steps=6", "train.batch=2", "train.decay=0", "train.save=9", "data.window=16", "model.gate.hidden=4"]
    small += ["stages.gates.share=0.5", "stages.joint.share=0.5", "train.warmup=0", "model.gate.std=0.5"]
    places = [f"model.pretrained={tmp_path}/base", f"data.source={text}", f"data.cache={tmp_path}"]
    trainer = Trainer(read(["retrofit.yaml"], [*small, *places, f"out={tmp_path}/run"]), Accelerator(cpu=True))
    model = trainer.whole.model
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for stays in ("base.", "nothing"):
        for _ in range(3):
            trainer._update(trainer.plan.turn(trainer.step))
            trainer.step += 1
        moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
        assert moved == {name for name in before if not name.startswith(stays)}
