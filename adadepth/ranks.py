"""What the ranks that train one model must agree on when every token has its own depth.

Without torch.distributed, `any_rank` and `gather` change nothing. With it, every rank of the group must call them, in
the same order. `group` is a process group; None means all ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn


def any_rank(flag: bool, group: Any = None) -> bool:
    """Whether the flag is True on any rank: `looped.agree = ad.ranks.any_rank`.

    All ranks then run as many iterations as the rank that needs the most. So ranks without active tokens still take
    part in the collectives of sharded weights (FSDP), and a gate that runs on one rank has a gradient on all. The cost
    is one all-reduce of one number between iterations, for which the host waits. With `skip=False` and without a
    cache, all ranks run every iteration anyway, and need not agree.
    """
    if not _ranks():
        return flag
    flags = torch.tensor(int(flag), dtype=torch.int32, device=_device(group))
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return bool(flags)


def gather(rows: Shaped[Tensor, "batch *rest"], group: Any = None) -> Shaped[Tensor, "all_batches *rest"]:
    """The rows of all ranks, in the order of the ranks, with gradients: for a loss over the global batch.

    Every rank then computes the same loss. DDP and FSDP average its gradients over ranks. The result is the gradient
    of one process that has the whole batch.

    Shapes: `rows (batch, ...)` to `(all_batches, ...)`; ranks may have different numbers of rows. The gradient of a
    rank's rows is summed over all ranks.
    """
    return _Gather.apply(rows, group) if _ranks() else rows  # type: ignore[no-untyped-call]


def anchor(loss: Float[Tensor, ""], module: nn.Module) -> Float[Tensor, ""]:
    """The same loss, which also gives a gradient of 0 to the parameters of `module` that were not used.

    DDP waits for a gradient of every parameter, and a gate that scored no token has none. Nothing is multiplied by 0,
    so a NaN does not spread. Parameters that need no gradient are not changed.

    Shapes: `loss ()` to the same.
    """
    weights = [_local(parameter) for parameter in module.parameters() if parameter.requires_grad]
    anchored: Tensor = _Anchor.apply(loss, *weights)  # type: ignore[no-untyped-call]
    return anchored


class _Gather(torch.autograd.Function):
    """torch's own are deprecated or private."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.sizes = group, _sizes(len(rows), group)
        # A collective needs equal shapes: gloo ends the process if they differ, and NCCL hangs.
        padded = rows.new_zeros(max(ctx.sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in ctx.sizes]
        dist.all_gather(everyone, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(everyone, ctx.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad.split(ctx.sizes)[dist.get_rank(ctx.group)], None


class _Anchor(torch.autograd.Function):
    """Zeros without memory of their own: they are added to all gradients at the start of the backward pass."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *weights: Tensor) -> Tensor:
        ctx.like = [(weight.shape, weight.new_zeros(())) for weight in weights]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(zero.expand(shape) for shape, zero in ctx.like)


def _sizes(size: int, group: Any) -> list[int]:
    """The sizes on all ranks."""
    own = torch.tensor([size], device=_device(group))
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group=group)
    return torch.cat(sizes).tolist()


def _ranks() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device(group: Any) -> torch.device:
    """Where the group can reduce: on the CPU if it can, which spares a transfer."""
    cpu, accelerator = torch.device("cpu"), torch.accelerator.current_accelerator()
    return cpu if accelerator is None or "cpu:" in dist.get_backend_config(group) else accelerator


def _local(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter that is sharded."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
