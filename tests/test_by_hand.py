"""The loops by hand that benchmarks/peers.py measures compute what adadepth computes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import adadepth as ad
from benchmarks import _by_hand
from benchmarks._blocks import Layer, stack

DEPTH = torch.tensor([[1, 3, 2, 1, 2, 3], [2, 1, 1, 1, 1, 1]])


def case() -> tuple[list[Layer], ad.RecurrentWrapper, Tensor]:
    block = stack(2, 8, 2).double()
    layers = [layer for layer in block.children() if isinstance(layer, Layer)]
    return layers, ad.RecurrentWrapper(block, 3), torch.randn(2, 6, 8, dtype=torch.float64)


@pytest.mark.parametrize("loop", [_by_hand.by_where, _by_hand.by_gather])
def test_loops_by_hand_are_the_definition(loop: Callable[..., Tensor]) -> None:
    layers, wrapper, x = case()
    x.requires_grad_()
    want = _by_hand.definition(layers, x, DEPTH)
    got, ours = loop(layers, x, DEPTH), wrapper(x, min_depth=DEPTH, max_depth=DEPTH).hidden
    for hidden in (got, ours):
        torch.testing.assert_close(hidden, want, rtol=1e-10, atol=1e-12)
    slopes = [torch.autograd.grad(hidden.sin().sum(), x)[0] for hidden in (want, got)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-9, atol=1e-11)


def test_decoding_by_hand_is_the_definition() -> None:
    layers, _, x = case()
    depth = torch.cat([torch.full((2, 2), 3), DEPTH[:, 2:]], 1)
    decoder = _by_hand.Decoder(layers, 3, 2, 6, x)
    with torch.no_grad():
        parts = [decoder(x[:, :2], depth[:, :2]), *(decoder(x[:, t : t + 1], depth[:, t : t + 1]) for t in range(2, 6))]
        want = _by_hand.definition(layers, x, depth)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-10, atol=1e-12)
