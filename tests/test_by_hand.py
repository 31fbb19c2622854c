"""The loops by hand that benchmarks/peers.py measures compute what adadepth computes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import adadepth as ad
from benchmarks import _by_hand, _packages, peers
from benchmarks._blocks import Layer, stack
from benchmarks._work import SMALL, Sizes

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


def test_the_benchmark_of_peers_fills_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    tables = peers.measure(Sizes(8, 2, 8, 3, 4), 1)
    rows = [line.strip("| ").split(" | ") for line in tables.splitlines() if line.startswith("| 2 plain")]
    assert len(rows) == 8
    assert all(float(row[4]) < 1e-12 for row in rows)
    assert [row[3] for row in rows if row[1] == "adadepth, packed"] == ["1.00"] * 3


def test_the_benchmark_of_packages_measures_the_same_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("x_transformers")
    found: list[dict[str, str]] = []
    monkeypatch.setattr(_packages, "table", lambda block, calls, errors, repeats: found.append(errors))
    monkeypatch.setattr(_packages, "decode_table", lambda block, ways, given, errors, repeats: found.append(errors))
    _packages.looped_training(SMALL, 1)
    _packages.looped_decode(SMALL, 1)
    training, decode = found
    assert set(training.values()) == {"–", "0e+00 between these two"}
    assert float(decode["adadepth, packed"]) < 1e-12
    assert float(decode["x-transformers"]) > 1e-3
