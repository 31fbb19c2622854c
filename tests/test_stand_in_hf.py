"""Adapted models and the flagship on a stand-in for a GPU: what the CPU gives, and no tensor of the wrong device."""

import copy
from functools import cache, partial
from importlib.util import find_spec
from itertools import cycle, groupby, product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import adadepth as ad

pytest.importorskip("transformers")

from hf_zoo import IDS, LABELS, MASK, STEPS, spread
from stand_in_checks import Scenario, check, finds

from adadepth.hf import AdaptiveForCausalLM, backbone, calibrate
from adadepth.hf.noise import Noise
from adadepth.hf.outside import Outside

SPANS = {"whole": None, "slice": slice(1, 3)}
DEPTH = torch.randint(1, STEPS + 1, (3, 9), generator=torch.Generator().manual_seed(1))
FLAGSHIP = [
    *("model.shape.hidden_size=16", "model.shape.intermediate_size=32", "model.shape.num_attention_heads=2"),
    *("data.window=8", "train.steps=10", "train.batch=2", "model.gate.std=1", "model.gate.bias=0"),
]
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "no_repeat_ngram_size": 1, "suppress_tokens": [0]}


@cache
def made(kind: str, span: str) -> AdaptiveForCausalLM:
    return spread(kind, SPANS[span])


def model_on(device: torch.device, span: str, kind: str = "llama") -> AdaptiveForCausalLM:
    """Made on the CPU and moved."""
    return copy.deepcopy(made(kind, span)).to(device)


def on(device: torch.device, *tensors: Tensor) -> Any:
    return [tensor.to(device) for tensor in tensors]


def adapted(device: torch.device, span: str) -> Any:
    """The check that `adapt` makes, on the device; and again in a pass with a loss."""
    adaptive = model_on(device, span)
    adaptive.check()
    ids, mask, labels = on(device, IDS, MASK, LABELS)
    out = adaptive.train()(ids, attention_mask=mask, labels=labels, states=True)
    out.loss.backward()
    return out.loss, out.logits, *out.trace, out.states, {name: p.grad for name, p in adaptive.named_parameters()}


@torch.no_grad()
def passed(device: torch.device, span: str, kind: str) -> Any:
    """Depths that stay on the CPU, a rule of a call, and all states."""
    model = model_on(device, span, kind)
    ids, mask = on(device, IDS, MASK)
    out = model(ids, attention_mask=mask, max_depth=DEPTH, output_hidden_states=True)
    other = model(ids, attention_mask=mask, rule=ad.Threshold(0.5), min_depth=2)
    return out.logits, out.hidden_states, *out.trace, other.logits


def generated(device: torch.device, span: str, **options: Any) -> Any:
    ids, mask = on(device, IDS, MASK)
    torch.manual_seed(0)
    return model_on(device, span).generate(ids, attention_mask=mask, **GREEDY | options)


def served(device: torch.device, span: str, **options: Any) -> Any:
    texts = [row[mask.bool()].tolist() for row, mask in zip(IDS, MASK, strict=True)]
    torch.manual_seed(0)
    outs = model_on(device, span).generate_batch(texts, rows=2, width=4, **GREEDY | options).values()
    return [(out.generated_tokens, out.depth) for out in outs]


def calibrated(device: torch.device) -> Any:
    model = model_on(device, "whole")
    model.loop.rule = None
    found = calibrate(model, [{"input_ids": IDS, "attention_mask": MASK}] * 4, 2.2)
    return found.tau, found.depth, found.relative_flops


def step_of_flagship(device: torch.device, method: str) -> Any:
    """The loss, and the weights behind a step of the optimiser, of the first step of each stage."""
    from examples.adaponderlm import config, routers
    from examples.adaponderlm.model import build
    from examples.adaponderlm.objective import Objective

    settings = config.read(["tiny.yaml", f"methods/{method}.yaml"], FLAGSHIP)
    torch.manual_seed(0)
    objective = Objective(build(settings.model), settings).train().double().to(device)
    ids = torch.randint(256, (2, 9)).to(device)
    found = []
    with mock.patch.object(routers, "STEPS", 3):
        for turn in map(objective.plan.turn, (0, 5, 8, 9)):
            if turn.since == 0 and turn.stage.fit and objective.router is not None:
                with torch.no_grad():
                    objective.router.fit(ids[:, :-1], objective(ids, None), 2.5)
            figures = objective(ids, turn)
            optimiser = torch.optim.AdamW(objective.parameters(), 1e-2)
            figures.loss.backward()
            torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            found.append(figures)
    return found, objective.state_dict()


GENERATE: list[dict[str, Any]] = [
    *({}, {"use_cache": False}, {"num_beams": 2}, {"max_depth": 2}, {"draft_depth": 1}),
    *({"do_sample": True, "top_k": 5}, {"rule": ad.Threshold(0.5)}),
]
SERVE: list[dict[str, Any]] = [{}, {"draft_depth": 1}, {"max_depth": 2}, {"do_sample": True, "seed": 3}]
SCENARIOS: dict[str, Scenario] = {f"adapt, {span}": partial(adapted, span=span) for span in SPANS}
for kind, span in product(("llama", "gpt2", "qwen3 windows"), SPANS):
    SCENARIOS[f"pass, {kind}, {span}"] = partial(passed, span=span, kind=kind)
for name, run, calls in (("generate", generated, GENERATE), ("generate_batch", served, SERVE)):
    for span, call in zip(cycle(SPANS), calls, strict=False):
        SCENARIOS[f"{name}, {span}, {call}"] = partial(run, span=span, **call)
SCENARIOS["calibrate"] = calibrated
if find_spec("omegaconf") is not None:
    methods = (
        "adaponder",
        "guided",
        "uniform",
        "geometric",
        "random",
        "prior",
        "survival",
        "criterion",
        "router",
        "told",
    )
    SCENARIOS |= {f"flagship, {method}": partial(step_of_flagship, method=method) for method in methods}


# Of each kind every second by default, and of the flagship's methods every third.
SOME = [
    pytest.param(name, marks=[pytest.mark.every] if i % (3 if kind == "flagship" else 2) else [])
    for kind, names in groupby(SCENARIOS, key=lambda name: name.partition(",")[0])
    for i, name in enumerate(names)
]


@pytest.mark.parametrize("name", SOME)
def test_as_on_the_cpu(name: str) -> None:
    check(SCENARIOS[name])


PLANTED: dict[str, tuple[Any, str, str]] = {
    "positions": (backbone, "positions_of", "pass, gpt2, slice"),
    "padding": (backbone, "new_columns", "pass, llama, whole"),
    "requests": (Outside, "_embedded", "generate_batch, slice, {'draft_depth': 1}"),
    "noise": (Noise, "of", "generate_batch, slice, {'do_sample': True, 'seed': 3}"),
}


@pytest.mark.parametrize("room", PLANTED)
def test_a_planted_mistake_is_found(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, scenario = PLANTED[room]
    finds(owner, name, SCENARIOS[scenario], monkeypatch)
