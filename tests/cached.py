"""What the tests of the cache share."""

import pytest
import torch
from blocks_zoo import DIM
from torch import Tensor

import adadepth as ad

EXACT = ["filled", "compact"]
exact = pytest.mark.parametrize("layout", EXACT)
LAYOUTS = [*EXACT, "single"]
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def rows(batch: int, seq: int, dim: int = DIM) -> Tensor:
    return torch.randn(batch, seq, dim, dtype=torch.float64)


def left_aligned(depth: Tensor) -> Tensor:
    """(batch, seq), 0 at padding, to (batch, longest): by position among the row's real tokens."""
    kept = [row[row > 0] for row in depth]
    longest = max((len(row) for row in kept), default=0)
    return torch.stack([torch.cat([row, row.new_zeros(longest - len(row))]) for row in kept])


def assert_holds(cache: ad.KVReuseCache, depth: Tensor) -> None:
    """The cache's own account of the tokens that ran to `depth (batch, seq)`, 0 at padding."""
    depth = left_aligned(depth)
    assert cache.lengths.dtype == cache.depth.dtype == torch.int64
    assert torch.equal(cache.lengths, (depth > 0).sum(1))
    assert torch.equal(cache.depth, depth)


def assert_equal_outputs(got: ad.Output, want: ad.Output) -> None:
    assert torch.equal(got.trace.live, want.trace.live)
    for a, b in ((got.hidden, want.hidden), *zip(got.trace, want.trace, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
