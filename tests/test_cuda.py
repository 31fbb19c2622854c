"""What only a GPU can show: the catch, the packing and autocast on CUDA. Skipped elsewhere."""

import copy

import pytest
import torch
from torch import nn

import adadepth as ad

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DIM = 64


def loops(dtype: torch.dtype) -> tuple[ad.RecurrentWrapper, ad.RecurrentWrapper]:
    layer = nn.TransformerEncoderLayer(DIM, 4, 128, 0.0, batch_first=True, norm_first=True)
    gate = ad.PerIterationMLPGate(DIM, 4, bias=0.0)
    packed = ad.RecurrentWrapper(ad.CausalEncoder(layer), 4, gate, ad.Threshold(0.5), ad.Interpolate())
    packed = packed.to("cuda", dtype)
    dense = copy.deepcopy(packed)
    dense.skip = False
    return packed, dense


def rows(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 50, DIM, device="cuda", dtype=dtype), torch.rand(3, 50, device="cuda") > 0.2


def test_packed_equals_dense_with_gradients() -> None:
    x, mask = rows(torch.float64)
    results = []
    for loop in loops(torch.float64):
        out = loop(x, mask=mask)
        out.hidden.sum().backward()
        results.append([out.hidden, *out.trace, *(p.grad for p in loop.parameters())])
    assert len(out.trace.depth.unique()) > 2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_autocast_keeps_the_state_and_the_scores_wide() -> None:
    x, mask = rows(torch.float32)
    for loop in loops(torch.float32):
        with torch.autocast("cuda", torch.bfloat16):
            out = loop(x, mask=mask)
        assert out.hidden.dtype == out.trace.scores.dtype == torch.float32
        assert bool(out.hidden.isfinite().all())


def test_dense_compiles() -> None:
    _, dense = loops(torch.float32)
    x, mask = rows(torch.float32)
    dense.eval()
    torch.testing.assert_close(torch.compile(dense, fullgraph=True)(x, mask=mask).hidden, dense(x, mask=mask).hidden)
