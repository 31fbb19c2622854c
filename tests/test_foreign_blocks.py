"""Blocks that others wrote: looped as they are, or behind one expression; and those that cannot be, with the reason.

A block whose package is not installed is skipped. All run once these are there, without their own wish for a torch:
`pip install --no-deps timm x-transformers litgpt torchtune diffusers open-clip-torch openai-whisper vit-pytorch`, then
what they import; torchvision and torchao may be absent.
"""

from typing import Any

import pytest
import torch
from foreign_zoo import (
    BATCH,
    BLOCKS,
    DIM,
    DROPOUT,
    REFUSED,
    SEQ,
    Foreign,
    Given,
    Glued,
    timm,
)
from torch import Tensor, nn

import adadepth as ad

# packages warn of their own affairs, some at import
pytestmark = [pytest.mark.shapes, pytest.mark.filterwarnings("ignore")]
STEPS = 3


def looped(case: Foreign, block: nn.Module) -> ad.RecurrentWrapper:
    gate, glued = ad.PerIterationMLPGate(DIM, STEPS, bias=0.0), block if case.glue is None else Glued(block, case.glue)
    return ad.RecurrentWrapper(glued, STEPS, gate, ad.Threshold(0.5), ad.Interpolate(), causal=case.causal).eval()


def made(case: Foreign) -> nn.Module:
    block = case.make().eval()
    for parameter in block.parameters():  # adaptive norms start at zero, where nothing is to be seen
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return block


def padded() -> tuple[Tensor, Tensor]:
    """Rows and their mask: whole, padded at its left and padded at its right."""
    x, mask = torch.randn(BATCH, SEQ, DIM), torch.ones(BATCH, SEQ, dtype=torch.bool)
    mask[1, :2] = mask[2, 4:] = False
    return x, mask


def of_row(given: Any, row: int, real: Tensor) -> Any:
    """What a block is given for the real tokens of one row."""
    if isinstance(given, dict):
        return {name: of_row(value, row, real) for name, value in given.items()}
    if isinstance(given, tuple):
        return tuple(of_row(value, row, real) for value in given)
    if not isinstance(given, Tensor) or not given.dim():
        return given
    given = given if len(given) == 1 else given[row : row + 1]
    return given if given.shape[1] == 1 else given[:, real]


def by_hand(case: Foreign, block: nn.Module, x: Tensor, mask: Tensor, given: Given) -> Tensor:
    """The real tokens after `STEPS` plain calls of the block, row by row and without adadepth."""
    states = []
    for row, real in enumerate(mask):
        h = x[row : row + 1, real]
        for _ in range(STEPS):
            h = (case.alone or nn.Module.__call__)(block, h, **of_row(given, row, real))
        states.append(h[0])
    return torch.cat(states)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_others_is_looped(name: str) -> None:
    case = BLOCKS[name]
    block = made(case)
    (x, mask), given, loop = padded(), case.given(BATCH, SEQ), looped(case, block)
    ad.check_looped(loop, x, mask, block_kwargs=given)
    assert 0 < loop(x, mask=mask, block_kwargs=given).trace.live[..., 1:].sum() < STEPS * mask.sum()  # tokens leave
    loop.gate, loop.rule, loop.update = None, None, ad.Replace()
    ours, theirs = loop(x, mask=mask, block_kwargs=given).hidden[mask], by_hand(case, block, x, mask, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    used = [parameter for parameter in block.parameters() if parameter.requires_grad]
    grads = (torch.autograd.grad(out.square().sum(), used, allow_unused=True) for out in (ours, theirs))
    torch.testing.assert_close(*map(largest_is_one, grads), rtol=1e-3, atol=1e-3)


def largest_is_one(grads: tuple[Tensor | None, ...]) -> list[Tensor]:
    there = [grad for grad in grads if grad is not None]
    return [grad / max(grad.abs().max() for grad in there) for grad in there]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_looped_is_refused_with_the_reason(name: str) -> None:
    case, reason = REFUSED[name]
    (x, mask), loop = padded(), looped(case, made(case))
    with pytest.raises(ValueError, match=reason):
        ad.check_looped(loop, x, mask, block_kwargs=case.given(BATCH, SEQ))


class PathPerRow(nn.Module):
    """Stochastic depth with one draw for each row of the batch, wherever its tokens stand."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.keep = 1 - drop

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(64) < self.keep  # as many as a batch has at most: the same number in every execution
        return x * (kept[ad.rows()] / self.keep).unsqueeze(-1) if self.training else x


def test_noise_of_each_sample_is_refused_in_training_and_drawn_by_row_behind_two_lines() -> None:
    case = Foreign("timm", timm("Block", drop_path=0.5), causal=False)
    block, (x, mask) = made(case), padded()
    loop = looped(case, block)
    ad.check_looped(loop, x, mask)
    with pytest.raises(ValueError, match=r"draws noise .* in drop_path1 \(DropPath\)"):
        ad.check_looped(loop.train(), x, mask)

    block.drop_path1, block.drop_path2 = PathPerRow(0.5), PathPerRow(0.5)
    ad.check_looped(loop.train(), x, mask)
    depth, drawn = torch.randint(1, STEPS + 1, mask.shape), []
    for loop.skip in (True, False):
        torch.manual_seed(1)
        drawn.append(loop(x, mask=mask, min_depth=depth, max_depth=depth).hidden[mask])
    torch.testing.assert_close(*drawn)
    assert not torch.allclose(loop(x, mask=mask, min_depth=depth, max_depth=depth).hidden[mask], drawn[0])


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_inside_attention_is_no_shared_noise(name: str) -> None:
    loop = looped(DROPOUT[name], made(DROPOUT[name])).train()
    (x, mask), given = padded(), DROPOUT[name].given(BATCH, SEQ)
    ad.check_looped(loop, x, mask, block_kwargs=given)
    out = [loop(x, mask=mask, block_kwargs=given).hidden[mask] for _ in range(2)]
    assert not torch.equal(*out)  # there is dropout
