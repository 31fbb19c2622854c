"""Packed tokens under flex attention: the same as by definition, whatever runs, and a mask that says what is seen."""

from typing import Any

import pytest
import torch
from blocks_zoo import BLOCKS
from cases import Case, assert_same, by_definition, cases, examples, of_its_own, setting
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import adadepth as ad
from adadepth.attention import flex

# In eager each new shape is traced.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
SOME = "attention", "encoder layer", "window", "encoder", "softcap and sinks"
KINDS = [kind for kind in BLOCKS if kind not in ("pointwise", "encoder layer, norm first", "stack")]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One for each mask that was made."""
    made, intervals = list[None](), flex.intervals

    def counted(first: Tensor, last: Tensor, slots: int) -> BlockMask:
        made.append(None)
        return intervals(first, last, slots)

    monkeypatch.setattr(flex, "intervals", counted)
    monkeypatch.setattr(ad.RecurrentWrapper, "self_check", False)
    return made


@examples(3, 6)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in SOME else [pytest.mark.every]) for kind in KINDS]
)
def test_it_is_the_definition(kind: str, seen: list[None], examples: int) -> None:
    @of_its_own(kind, examples)
    @given(case=cases(causal=[True]))
    def check(case: Case) -> None:
        s = setting(BLOCKS[kind], case, torch.float64)
        want = by_definition(BLOCKS[kind], case, s)
        assume(len(want.live.sum(-1)[want.live[..., 0]].unique()) > 1)
        loop = ad.RecurrentWrapper(**s.pieces).eval()
        loop.one_call = True
        with torch.no_grad():
            out = loop(s.x, **s.arguments)
        assert_same(
            {"live": out.trace.live, "hidden": out.hidden}, {"live": want.live, "hidden": want.hidden}, 1e-10, 1e-13
        )

    check()
    assert bool(seen) == (kind != "softcap and sinks")  # flex attention has no sinks


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 4), width=st.integers(1, 200), share=st.floats(0.05, 1.0), window=st.sampled_from([0, 1, 70])
)
def test_a_mask_of_intervals_holds_what_they_say_and_no_block_more(
    rows: int, width: int, share: float, window: int
) -> None:
    live = torch.rand(rows, width, generator=torch.Generator().manual_seed(rows * width)) <= share
    assume(bool(live.any()))
    row, position = live.nonzero().unbind(1)
    last = row * width + position
    first = torch.maximum(row * width, last - window + 1) if window else row * width
    mask = flex.intervals(first, last, rows * width)
    slots = torch.arange(rows * width)
    want = (slots >= first[:, None]) & (slots <= last[:, None])
    size = flex.BLOCK
    padded = torch.nn.functional.pad(want, (0, -want.shape[1] % size, 0, -want.shape[0] % size))
    blocks = padded.unflatten(0, (-1, size)).unflatten(2, (-1, size)).transpose(1, 2)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks.flatten(2).any(-1))
    # A block that is taken for whole is: all queries and slots in it that there are.
    there = torch.nn.functional.pad(torch.ones_like(want), (0, -want.shape[1] % size, 0, -want.shape[0] % size))
    whole = (padded | ~there).unflatten(0, (-1, size)).unflatten(2, (-1, size)).transpose(1, 2).flatten(2).all(-1)
    assert mask.full_kv_num_blocks is not None
    assert torch.equal(mask.full_kv_num_blocks[0, 0].long(), whole.sum(-1))
    query, slot = torch.meshgrid(torch.arange(len(row)), slots, indexing="ij")
    assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), query, slot), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has no backward pass on a CPU")
def test_gradients_are_those_of_grouped_rows() -> None:
    case = Case(7, 3, 64, 4, True, "linear", "threshold", "interpolate", "ragged", "none", "none", False)
    grads = []
    for flexible in (False, True):
        s = setting(BLOCKS["view"], case, torch.float32)
        loop = ad.RecurrentWrapper(**s.pieces).cuda()
        loop.one_call = flexible
        given: Any = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in s.arguments.items()}
        loop(s.x.cuda(), **given).hidden.square().sum().backward()
        grads.append([p.grad for p in loop.parameters() if p.grad is not None])
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
