"""Mask utilities, depths without learning, and selection, each against its definition."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adadepth as ad

pytestmark = pytest.mark.shapes

MASKS = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6)


def _depth(row: list[bool]) -> int:
    depth = 0
    for entry in row:
        if not entry:
            break
        depth += 1
    return depth


@settings(max_examples=60)
@given(MASKS)
def test_mask_utilities_by_definition(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    depths = [_depth(row) for row in rows]
    assert ad.mask_depth(mask).tolist() == depths
    monotonic = ad.make_monotonic(mask)
    assert monotonic.tolist() == [[i < depth for i in range(4)] for depth in depths]
    assert ad.is_monotonic(monotonic)
    assert ad.is_monotonic(mask) == (monotonic.tolist() == rows)
    assert ad.depth_mask(torch.tensor(depths), 4).tolist() == monotonic.tolist()
    real = [depth for depth in depths if depth]
    assert ad.live_share(monotonic) == (sum(real) / (4 * len(real)) if real else 0.0)


@pytest.mark.parametrize("draw", [ad.uniform_depths, ad.geometric_depths])
@pytest.mark.parametrize("mean", [1.0, 1.3, 2.0, 2.9, 4.0])
def test_drawn_depths_have_the_mean_and_repeat(draw: Callable[..., torch.Tensor], mean: float) -> None:
    first, second = (draw((200, 100), 4, mean, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.int64
    assert 1 <= int(first.min()) <= int(first.max()) <= 4
    assert abs(float(first.double().mean()) - mean) < 0.03


def test_uniform_loses_equally_many_and_geometric_equal_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    live = ad.depth_mask(ad.uniform_depths((100_000,), 4, 2.8, generator), 4).double().mean(0)
    assert torch.allclose(live.diff(), live.diff().mean(), atol=0.01)
    live = ad.depth_mask(ad.geometric_depths((100_000,), 4, 2.8, generator), 4).double().mean(0)
    assert torch.allclose(live[1:] / live[:-1], live[1:2], atol=0.01)


@pytest.mark.parametrize("mean", [0.9, 4.1, math.nan])
def test_a_mean_depth_out_of_reach_is_refused(mean: float) -> None:
    with pytest.raises(ValueError, match=r"^uniform_depths expected") as error:
        ad.uniform_depths((2,), 4, mean)
    assert str(error.value) == f"uniform_depths expected a mean depth from 1 to steps=4, got {mean}."


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(-50, 50), st.booleans()), min_size=1, max_size=30), st.integers(1, 20))
def test_bottom_and_top_k_by_sorting(entries: list[tuple[int, bool]], twentieths: int) -> None:
    values = torch.tensor([float(v) for v, _ in entries], requires_grad=True)
    valid = torch.tensor([v for _, v in entries])
    real = sorted(float(v) for v, ok in entries if ok)
    count = -(-twentieths * len(real) // 20)
    k = twentieths / 20
    assert ad.bottom_k(values, k, valid).tolist() == real[:count]
    assert ad.top_k(values, k, valid).tolist() == real[::-1][:count]
    (gradient,) = torch.autograd.grad(ad.bottom_k(values, k, valid).sum(), values)
    assert gradient.sum() == count
    assert not gradient[~valid].any()


def test_selection_without_validity_counts_all_of_any_shape() -> None:
    values = torch.arange(30.0).flip(0).view(5, 6)
    assert ad.bottom_k(values, 0.1).tolist() == [0.0, 1.0, 2.0]
    assert ad.top_k(values, 1.0).numel() == 30
    assert ad.bottom_k(values[:0], 0.5).numel() == 0


@pytest.mark.parametrize("k", [1e-10, 5e-324, 0.1])
@pytest.mark.parametrize("size", [1, 5, 10])
def test_any_share_chooses_at_least_one_valid_value(k: float, size: int) -> None:
    values = torch.arange(float(size + 1))
    valid = values > 0
    assert ad.bottom_k(values, k, valid).tolist() == [1.0]
    assert ad.top_k(values, k, valid).tolist() == [float(size)]
    assert ad.bottom_k(values, k, values < 0).numel() == 0


@pytest.mark.parametrize("k", [0.0, -0.1, 1.01, math.nan])
def test_a_share_outside_zero_to_one_is_refused(k: float) -> None:
    with pytest.raises(ValueError, match="bottom_k") as error:
        ad.bottom_k(torch.ones(3), k)
    assert str(error.value) == f"bottom_k expected k, the share to choose, in (0, 1], got {k}."


@pytest.mark.plain
def test_a_validity_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k") as error:
        ad.top_k(torch.ones(3), 0.5, torch.ones(3))
    assert str(error.value) == ("top_k expected valid of shape (3,) and dtype torch.bool, got (3,) torch.float32.")


@pytest.mark.plain
def test_thresholds_per_row() -> None:
    scores = torch.full((2, 3, 1), 0.5)
    remaining, positions = torch.ones(2, 3), torch.arange(3).expand(2, 3)
    tau = torch.tensor([[0.4], [0.6]])
    for rule in (ad.Threshold(tau), ad.SurvivalThreshold(tau)):
        assert rule(scores, remaining, positions).tolist() == [[1.0] * 3, [0.0] * 3]
    with pytest.raises(ValueError, match="expected tau to be a number or a tensor") as error:
        ad.Threshold(torch.ones(3))
    assert (
        str(error.value)
        == "Threshold expected tau to be a number or a tensor of shape (batch, 1) or (batch, seq), got shape (3,)."
    )
    with pytest.raises(ValueError, match="got NaN"):
        ad.SurvivalThreshold(torch.tensor(math.nan))
    with pytest.raises(ValueError, match="expected tau to be a number, got nan"):
        ad.Threshold(math.nan)


def test_repr_is_the_call() -> None:
    rule = ad.Lookahead(ad.SurvivalThreshold(0.05))
    assert repr(rule) == "Lookahead(rule=SurvivalThreshold(tau=0.05))"
    assert repr(eval(repr(rule), vars(ad))) == repr(rule)
