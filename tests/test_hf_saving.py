# ruff: noqa: E402 (the whole file is skipped without transformers)
"""Adapted models saved and loaded: every piece, a new process, gates alone."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adadepth as ad

transformers = pytest.importorskip("transformers")

from hf_zoo import (
    DIM,
    IDS,
    MASK,
    SPANS,
    STEPS,
    Above,
    original,
    same,
    spread,
)
from transformers import AutoModelForCausalLM

from adadepth.hf import AdaptiveForCausalLM, adapt, load_gates

GATES: dict[str, Callable[[Any], ad.Gate]] = {
    "LinearGate": lambda base: ad.LinearGate(DIM, bias=0.5),
    "SharedMLPGate": lambda base: ad.SharedMLPGate(DIM, hidden=7),
    "PerIterationMLPGate": lambda base: ad.PerIterationMLPGate(DIM, STEPS),
    "ConvergenceGate": lambda base: ad.ConvergenceGate(),
    "KLGate": lambda base: ad.KLGate(nn.Sequential(base.base_model.norm, base.get_output_embeddings())),
    "MaxProbGate": lambda base: ad.MaxProbGate(base.get_output_embeddings()),
    "MarginGate": lambda base: ad.MarginGate(base.get_output_embeddings()),
    "EntropyGate": lambda base: ad.EntropyGate(base.get_output_embeddings()),
}
RULES: list[Any] = [
    None,
    ad.Threshold(-torch.inf),
    ad.Threshold(torch.tensor(0.5)),
    ad.SurvivalThreshold(0.3),
    ad.Survival(),
    ad.ACT(0.05),
    ad.Lookahead(ad.Threshold(0.5)),
    ad.NotBefore(2, ad.Threshold(0.5)),
    Above([0.5, 0.6]),
]
UPDATES: list[Callable[[Any], ad.Update]] = [
    lambda base: ad.Replace(),
    lambda base: ad.Residual(),
    lambda base: ad.InputInjection(),
    lambda base: ad.Ponder(base.get_input_embeddings(), base.get_output_embeddings(), scale=0.5),
    lambda base: ad.SurvivalScaled(ad.Interpolate()),
    lambda base: ad.Ungated(ad.ReZero(ad.Interpolate())),
]


@pytest.mark.parametrize(
    ("gate", "rule", "update"),
    [(g, RULES[i % len(RULES)], UPDATES[i % len(UPDATES)]) for i, g in enumerate(GATES)],
    ids=list(GATES),
)
def test_every_piece_is_saved(gate: str, rule: Any, update: Callable[[Any], ad.Update], tmp_path: Path) -> None:
    base = original("llama", torch.float32)
    made, piece = GATES[gate](base), update(base)
    piece = ad.Ungated(piece) if made.measures and piece.scales else piece
    model = adapt(base, STEPS, made, rule, piece, layers=slice(1, 3))
    model.save_pretrained(tmp_path)
    loaded = AdaptiveForCausalLM.from_pretrained(tmp_path)
    assert same(loaded, model)
    assert [type(getattr(loaded.loop, name)) for name in ("gate", "rule", "update")] == [
        type(getattr(model.loop, name)) for name in ("gate", "rule", "update")
    ]
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert not [name for name in model.state_dict() if not name.startswith(("base.", "loop.gate.", "loop.update."))]


def test_pieces_of_the_saving_test_are_all_that_there_are() -> None:
    gates = {name for name, kind in vars(ad).items() if isinstance(kind, type) and issubclass(kind, ad.Gate)}
    assert gates - {"Gate"} == GATES.keys()


SCRIPT = """
import sys, torch, hf_zoo, adadepth.hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
assert type(model) is adadepth.hf.AdaptiveForCausalLM and not model.training
with torch.no_grad():
    out = model(hf_zoo.IDS, attention_mask=hf_zoo.MASK)
ids = model.generate(hf_zoo.IDS, attention_mask=hf_zoo.MASK, max_new_tokens=5, do_sample=False)
torch.save((out.logits, out.trace.depth, ids), sys.argv[2])
"""


@pytest.mark.parametrize(
    ("name", "layers"),
    [("gpt2", slice(1, 3)), pytest.param("gpt_neox tied, serial", None, marks=pytest.mark.every)],
    ids=str,
)
def test_saved_and_run_in_a_new_process_it_gives_the_same_bits(name: str, layers: slice | None, tmp_path: Path) -> None:
    model = spread(name, layers, torch.float32)
    model.save_pretrained(tmp_path / "saved")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "saved"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"})
    values, depth, ids = torch.load(tmp_path / "out.pt")
    out = model(IDS, attention_mask=MASK)
    assert torch.equal(values, out.logits) and torch.equal(depth, out.trace.depth)
    assert torch.equal(ids, model.generate(IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False))
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_adadepth.py",
        "README.md",
    }


@pytest.mark.parametrize("layers", SPANS, ids=str)
def test_gates_alone(layers: slice | None, tmp_path: Path) -> None:
    model = spread("llama tied", layers)
    model.save_gates(tmp_path)
    loaded = load_gates(original("llama tied"), tmp_path)
    assert same(loaded, model)
    never = load_gates(original("llama tied"), tmp_path, rule=None)
    assert never(IDS).trace.depth.eq(STEPS).all()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 20_000


def test_pieces_given_to_from_pretrained_stand_in_place_of_those_saved(tmp_path: Path) -> None:
    model = spread("llama", None)
    model.save_pretrained(tmp_path)
    loaded, info = AdaptiveForCausalLM.from_pretrained(tmp_path, rule=ad.Threshold(2.0), output_loading_info=True)
    assert torch.equal(loaded(IDS).trace.depth, torch.ones_like(IDS)) and not info["missing_keys"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gate=None, dtype=torch.bfloat16)
    assert again.loop.gate is None and again.dtype is torch.bfloat16
    other = AutoModelForCausalLM.from_pretrained(tmp_path, update=ad.ReZero(ad.Interpolate()))
    assert type(other.loop.update.update) is ad.Interpolate and other.loop.update.alpha == model.loop.update.alpha
