"""`check_block`: whether a block mixes tokens anywhere that counting attention calls cannot see."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..loop.wrapper import RecurrentWrapper
from ..masks import depth_mask

_BATCH, _SEQ, _STEPS = 3, 9, 3


def check_block(block: nn.Module, dim: int, *, causal: bool = True) -> None:
    """Run a block packed and dense on random padded input of mixed depth, and compare.

    A convolution along the sequence, a batch norm, positions counted by the length of the input or a
    router with a capacity mix tokens where no attention call shows it. Evaluation and training mode
    are both checked, on a float64 copy with dropout switched off; what is still random in training
    mode is checked in evaluation mode alone.

    Arguments: `block`, as for `RecurrentWrapper`; `dim`, the width of its state; `causal`.
    Raises: `ValueError`, naming the innermost module whose output differs first; or what the loop
    itself raises of the block.
    """
    block = _still(copy.deepcopy(block).double())
    x = torch.randn(_BATCH, _SEQ, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    device = next((p.device for p in block.parameters()), x.device)
    x, mask = x.to(device), depth_mask(torch.tensor([_SEQ, 6, 4]), _SEQ).roll(2, 1).to(device)
    depth = (1 + torch.arange(_SEQ, device=device) % _STEPS).expand(_BATCH, _SEQ)
    for training in (False, True):
        block.train(training)
        given = {"mask": mask, "min_depth": depth, "max_depth": depth}
        packed, dense, again = (_run(block, causal, skip, x, given) for skip in (True, False, False))
        if training and not torch.equal(dense, again):
            return
        off = _off(packed, dense)
        if not off <= 1e-9:
            mode = "training" if training else "evaluation"
            raise ValueError(
                f"{type(block).__name__} mixes tokens outside its attention calls: in {mode} mode packed and dense "
                f"execution differ by {off:.1e} relative, first in {_culprit(block, causal, x, mask)}. A looped block "
                "may mix tokens in attention only, and must read positions from adadepth.positions() or view.positions."
            )


def _still(block: nn.Module) -> nn.Module:
    for module in block.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return block


def _run(block: nn.Module, causal: bool, skip: bool, x: Tensor, given: dict[str, Any]) -> Tensor:
    # A copy, since a batch norm remembers what it saw.
    looped = RecurrentWrapper(copy.deepcopy(block), _STEPS, causal=causal, skip=skip)
    with torch.no_grad():
        return looped.train(block.training)(x, **given).hidden


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def _culprit(block: nn.Module, causal: bool, x: Tensor, mask: Tensor) -> str:
    """The first module to finish whose output differs token by token in a single iteration."""
    seen: dict[bool, list[tuple[str, Tensor]]] = {}
    for skip in (True, False):
        copied = copy.deepcopy(block)
        outputs: list[tuple[str, Tensor]] = []
        for name, module in copied.named_modules():
            label = f"{name or 'the block itself'} ({type(module).__name__})"
            module.register_forward_hook(lambda _m, _args, out, label=label, to=outputs: to.append((label, out)))
        looped = RecurrentWrapper(copied, 1, causal=causal, skip=skip)
        with torch.no_grad():
            looped.train(block.training)(x, mask=mask)
        seen[skip] = outputs
    for (label, packed), (_, dense) in zip(seen[True], seen[False], strict=False):
        if isinstance(packed, Tensor) and isinstance(dense, Tensor) and not _alike(packed, dense, mask):
            return label
    return "its own forward, at a later iteration"


def _alike(packed: Tensor, dense: Tensor, mask: Tensor) -> bool:
    """Whether one module's outputs agree token by token, whichever axis the tokens are on."""
    for axis in range(1, dense.dim()):
        in_rows = (dense.shape[0], dense.shape[axis]) == mask.shape
        if in_rows and (packed.shape[0], packed.shape[axis]) == (1, int(mask.sum())):
            return _off(packed.movedim(axis, 1)[0], dense.movedim(axis, 1)[mask]) <= 1e-9
    return True  # no axis holds the tokens
