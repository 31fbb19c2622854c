"""The layers of an adapted Hugging Face model, compiled in place one by one as trainers do it."""

import copy
from typing import Any

import pytest
import torch
from hf_zoo import IDS, LABELS, MASK, logits, spread
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from adadepth.hf import AdaptiveCache

pytestmark = [
    pytest.mark.plain,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]
SIZES = (9, 7, 8)


def cached(model: Any, cuts: tuple[int, ...]) -> Tensor:
    """The logits of a prompt and of what follows it, with a cache."""
    cache, parts = AdaptiveCache(), []
    for start, stop in zip((0, *cuts), (*cuts, 9), strict=True):
        with torch.no_grad():
            out = model(IDS[:, start:stop], attention_mask=MASK[:, :stop], past_key_values=cache)
        parts.append(out.logits[MASK[:, start:stop].bool()])
    return torch.cat(parts)


def gradients(model: Any, size: int) -> Tensor:
    model.zero_grad()
    model(IDS[:, :size], attention_mask=MASK[:, :size], labels=LABELS[:, :size]).loss.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize(
    ("kind", "span"), [("llama", None), pytest.param("gpt_neox", slice(1, 3), marks=pytest.mark.every)]
)
def test_compiled_layers_give_what_eager_ones_give(kind: str, span: slice | None) -> None:
    torch._dynamo.reset()
    slow = spread(kind, span)
    fast: Any = copy.deepcopy(slow)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in fast.anatomy.of(fast.base).layers:
        layer.compile(backend=counter, dynamic=True, fullgraph=True)
    graphs = []
    for size, cuts in zip(SIZES, ((4, 5, 6), (5, 6, 7), (3, 4, 5)), strict=True):
        torch.testing.assert_close(cached(fast, cuts), cached(slow, cuts), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients(fast, size), gradients(slow, size), rtol=1e-10, atol=1e-10)
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[2] <= 6  # one more where in a later pass a single token runs
    slow.loop.skip = fast.loop.skip = False
    torch.testing.assert_close(logits(fast), logits(slow), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        depths = [model(IDS, attention_mask=MASK).trace.depth for model in (slow, fast)]
    assert torch.equal(*depths)
