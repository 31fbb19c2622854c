"""The benchmark of loop contrast: it finds the contrast that was put in, and judges it on other windows."""

import pytest
import torch

from benchmarks.loop_contrast import Result, head_in_iterations, judged, lines


def test_the_weight_and_the_iteration_are_found_and_judged_apart() -> None:
    torch.manual_seed(0)
    true, first, second = 2 * torch.randn(3, 40, 16, 256)
    each = torch.stack([first, second, (true + second) / 2], -2)  # 2 · third - second is what bytes are drawn from
    drawn = torch.multinomial(true.softmax(-1).flatten(0, 1), 1).view(40, 16)
    windows = torch.cat([torch.zeros(40, 1, dtype=torch.long), drawn], 1)
    result = judged(each, windows, 3, 5.0)
    assert (result.alone, result.earlier) == (5.0, 2) and result.weight == pytest.approx(1, abs=0.25)
    log_p = ((1 + result.weight) * each[..., 2, :] - result.weight * second).double().log_softmax(-1)
    unseen = [-log_p[i, j, drawn[i, j]].item() for i in range(1, 40, 2) for j in range(16)]
    assert result.contrast == pytest.approx(sum(unseen) / len(unseen), abs=1e-5)
    assert result.contrast < result.tempered <= result.plain


def test_the_head_is_counted_in_iterations() -> None:
    head, layer, keys = 128 * 256, 12 * 128**2, 2 * 128 * 128  # each byte with 128 keys and values
    assert head_in_iterations(128) == pytest.approx(head / (layer + keys))


def test_the_table_compares_at_equal_flops() -> None:
    seed = {depth: Result(2.0, 3.0 / depth, 0.9, 0.7, 1.0, 1) for depth in (2, 3, 4)}
    *_, two, three, four = lines([seed], 0.25)
    assert two == "| 2 | 2.0000 | 1.5000 | 0.9000 | 0.7000 | +0.8000 | +0.6750 |"  # 0.75 · 1.5 + 0.25 · 1 - 0.7
    assert (three.count("+"), four.count("+")) == (2, 1)
