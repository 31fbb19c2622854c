"""The library on a stand-in for a GPU: what the CPU gives, and no tensor of the wrong device.

A scenario is a function of a device. It makes its tensors from a seed, moves them there, and returns what came.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from blocks_zoo import BLOCKS, DEEP, DIM, spread
from stand_in import DEVICE, Held, MixedDevices, counting, stand_in
from test_contracts import GATES, RULES, UPDATES
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import adadepth as ad
from adadepth.serving import DepthBatch

Scenario = Callable[[torch.device], Any]
CPU = torch.device("cpu")
STEPS, BATCH, SEQ = 4, 3, 6
MASKS = {
    "none": None,
    "left": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]],
    "ragged": [[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0]],
}


def placed(piece: Any, device: torch.device) -> Any:
    """A piece on a device, in float64, with the heads and embeddings that it refers to."""
    for part in piece.modules() if isinstance(piece, nn.Module) else ():
        for name in ("head", "embedding"):
            if isinstance(model := getattr(part, name, None), nn.Module):
                model.to(device, torch.float64)
    return piece.to(device, torch.float64) if isinstance(piece, nn.Module) else piece


def rows(device: torch.device, batch: int = BATCH, seq: int = SEQ) -> Tensor:
    return torch.randn(batch, seq, DIM, dtype=torch.float64).to(device)


def mask_of(kind: str, device: torch.device) -> Tensor | None:
    return None if MASKS[kind] is None else torch.tensor(MASKS[kind], dtype=torch.bool).to(device)


def loop_of(
    device: torch.device,
    kind: str = "attention",
    gate: str | None = "PerIterationMLPGate",
    rule: Any = "Threshold",
    update: str = "Interpolate",
    causal: bool = True,
    **options: Any,
) -> ad.RecurrentWrapper:
    """Seeded; its tokens leave all over it."""
    torch.manual_seed(1)
    zoo = DEEP if kind in DEEP and options.pop("deep", False) else BLOCKS
    block = zoo[kind].make(DIM, causal)
    scores = None if gate is None else spread(GATES[gate]())
    rule = RULES[rule] if isinstance(rule, str) else rule
    makes = UPDATES[update]()
    makes = ad.Ungated(makes) if scores is not None and scores.measures else makes
    block, scores, makes = (placed(piece, device) for piece in (block, scores, makes))
    return ad.RecurrentWrapper(block, STEPS, scores, rule, makes, causal=causal, **options)


def trained(device: torch.device, mask: str = "none", call: Any = None, train: bool = True, **loop: Any) -> Any:
    """A pass, and with `train` the gradients of everything."""
    looped = loop_of(device, **loop).train(train)
    torch.manual_seed(2)
    x, start = rows(device).requires_grad_(train), rows(device).requires_grad_(train)
    out = looped(x, start=start, mask=mask_of(mask, device), states=True, **(call(device) if call else {}))
    if train:
        (out.hidden.square().sum() + out.trace.exit_probs.square().sum()).backward()
    grads = {name: p.grad for name, p in looped.named_parameters()} if train else {}
    return out.hidden, out.states, *out.trace, x.grad, start.grad, grads


LOOPS: dict[str, Scenario] = {}
_EXECUTIONS = [{"skip": True}, {"skip": False}, {"skip": True, "checkpoint": True}]
for i, (gate, rule) in enumerate(product([*GATES, None], [*RULES, None])):
    options = _EXECUTIONS[i % 3] | {"update": [*UPDATES][i % len(UPDATES)], "mask": [*MASKS][i // 3 % 3]}
    name = f"{gate}, {rule}, " + ", ".join(map(str, options.values()))
    LOOPS[name] = partial(trained, gate=gate, rule=rule, train=i % 4 > 0, **options)


def check(scenario: Scenario) -> None:
    want = scenario(CPU)
    with stand_in():
        got = scenario(DEVICE)
    assert all(isinstance(part, Held) for part in tree_leaves(got) if isinstance(part, Tensor))
    want, got = (tree_leaves(tree_map(_known, result)) for result in (want, got))
    assert len(want) == len(got)
    for a, b in zip(want, got, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
        else:
            assert a == b


def _known(part: Any) -> Any:
    return part.detach().cpu() if isinstance(part, Tensor) else part


@pytest.mark.parametrize("name", LOOPS)
def test_loop(name: str) -> None:
    check(LOOPS[name])
