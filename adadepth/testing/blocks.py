"""`check_block`: whether a block can be looped, on random input."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .._given import unfit
from ..attention.apart import RowPerToken
from ..loop.agreement import Case, check, untouched
from ..loop.explain import missing
from ..loop.selfcheck import mixed
from ..loop.wrapper import RecurrentWrapper
from ..masks import depth_mask

_BATCH = 3


def check_block(block: nn.Module, dim: int, *, causal: bool = True, steps: int = 3, seq: int = 9) -> None:
    """Runs a block packed and dense on random padded input of mixed depths, and compares.

    So it finds blocks that mix tokens outside their attention calls. Examples are a convolution along the sequence, a
    batch norm, positions counted by the length of the input, a router with a capacity, and noise for each row.

    A copy of the block is checked in its own dtype and to its precision, in evaluation and in training mode, with
    dropout switched off. If it is still random in training mode, only evaluation mode is compared. `check_looped`
    does the same for a wrapper on your own input.

    Arguments: `block`, as for `RecurrentWrapper`; `dim`, the width of its state; `causal`; `steps`, the greatest
    number of iterations, and `seq`, the longest row, for a block with a table of iterations or positions.
    Raises: `ValueError` that names the innermost module whose outputs first differ; for what is no block, or a block
        that needs further arguments; or what the loop itself raises.
    """
    if not isinstance(block, nn.Module):
        raise unfit("check_block expected block to be an nn.Module", block, "Give it the block to be looped.")
    if isinstance(block, RecurrentWrapper):
        raise unfit("check_block expected a block without its loop", block, "Pass looped.block, or use check_looped.")
    inner = block.block if isinstance(block, RowPerToken) else block
    if lacks := missing(inner, {}):
        raise ValueError(
            f"check_block gives the block x alone, but {type(inner).__name__} also needs {', '.join(lacks)}. Check its "
            f"loop with your own input: adadepth.check_looped(looped, x, block_kwargs={{'{lacks[0]}': ...}})."
        )
    weight = next((p for p in block.parameters() if p.is_floating_point()), torch.empty(0))
    x = torch.randn(_BATCH, seq, dim, generator=torch.Generator().manual_seed(0), device="cpu").to(weight)
    looped = RecurrentWrapper(copy.deepcopy(block), steps, causal=causal)
    for training in (False, True):
        looped.train(training)
        with untouched(looped, x.device):
            for case in _cases(x, steps):
                case.run(looped, skip=False)  # an error here is not due to packing
                check(looped, case)


def _cases(x: Tensor, steps: int) -> Iterator[Case]:
    """Padded rows of mixed depths; rows in which one token alone continues; and a single token."""
    seq = x.shape[1]
    mask = depth_mask(torch.tensor([seq, max(1, 2 * seq // 3), max(1, seq // 2)], device=x.device), seq).roll(2, 1)
    yield Case(x, mask, mixed(x, steps), {})
    lone = torch.ones_like(mask, dtype=torch.int64)
    lone[0, seq // 2] = steps
    yield Case(x, torch.ones_like(mask), lone, {})
    yield Case(x[:1, :1], mask[:1, :1], lone[:1, :1] * steps, {})
