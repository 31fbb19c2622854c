"""Attention of sequences of any lengths over keys and values in pages, in one call.

PyTorch's kernel for it, `torch.nn.attention.varlen.varlen_attn`, runs on GPUs in half precision. For other devices,
`written_out` computes the same.
"""

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .how import How

HALF = (torch.float16, torch.bfloat16)


class Sequences(NamedTuple):
    """Queries cut into sequences, each of which attends to the slots of some pages; all int32.

    Shapes:
        starts: `(n + 1,)`; the queries of sequence i are those from `starts[i]` on, before `starts[i + 1]`.
        used: `(n,)`, how many slots the last query of each sequence reads, from the first slot on. The query before
            it reads one less.
        pages: `(n, pages of a sequence)`, the numbers of the pages that hold its slots.
        longest: the greatest number of queries of a sequence.
    """

    starts: Tensor
    used: Tensor
    pages: Tensor
    longest: int


def serves(q: Tensor, k: Tensor, v: Tensor, how: How) -> bool:
    """Whether `attend` can compute this call: no gradients, and on a GPU only what the kernel supports."""
    plain = how.softcap is None and how.sinks is None and not how.dropout_p and not q.requires_grad
    if not plain or not (how.enable_gqa or q.shape[1] == k.shape[1]):
        return False
    return q.device.type != "cuda" or (q.dtype in HALF and _fits(q.shape[-1], v.shape[-1]) and _has_kernel(q.device))


def _fits(size: int, value_size: int) -> bool:
    """Whether the kernel supports heads of this size."""
    return size == value_size and size % 8 == 0 and size <= 256


def attend(q: Tensor, k: Tensor, v: Tensor, of: Sequences, how: How) -> Tensor:
    """Causal attention of sequences of queries.

    Shapes: `q (T, heads, head_dim)`; `k` and `v (pages, slots of a page, kv_heads, head_dim)`; the result is like `q`,
    with the head dimension of `v`.
    """
    if q.device.type != "cuda":
        return written_out(q, k, v, of, how)
    # A single query that reads all used slots needs no mask; the kernel then computes the heads of a group together.
    all_used = of.longest == 1 and how.window is None
    sides = (-1, -1) if all_used else (-1 if how.window is None else how.window - 1, 0)
    out: Tensor = _varlen().varlen_attn(
        q,
        k,
        v,
        of.starts,
        of.starts if _wants_offsets() else None,
        of.longest,
        of.pages.shape[1] * k.shape[1],  # an upper bound, so that it is the same for each token
        scale=how.scale,
        window_size=sides,
        enable_gqa=how.enable_gqa,
        seqused_k=of.used,
        block_table=of.pages,
        num_splits=1,  # more are wrong with pages (pytorch issue 194167), and make a row's result depend on the batch
    )
    return out


def written_out(q: Tensor, k: Tensor, v: Tensor, of: Sequences, how: How) -> Tensor:
    """What `attend` computes, in plain operators, with all scores `(T, heads, slots)` held in memory."""
    queries = torch.arange(len(q), dtype=torch.int32, device=q.device)
    which = torch.searchsorted(of.starts, queries, right=True) - 1
    behind = of.starts.index_select(0, which + 1) - 1 - queries
    sees = (of.used.index_select(0, which) - behind).unsqueeze(1)
    k, v = (_slots_of(t, of.pages.index_select(0, which)) for t in (k, v))
    slots = torch.arange(k.shape[1], device=q.device)
    seen = slots < sees
    if how.window is not None:
        seen &= slots >= sees - how.window
    scale = q.shape[-1] ** -0.5 if how.scale is None else how.scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("tkgd,tskd->tkgs", q.unflatten(1, (k.shape[2], -1)).to(dtype) * scale, k.to(dtype))
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    v = v.to(dtype).masked_fill(~seen[:, :, None, None], 0)  # values that are not read may be NaN or inf
    return torch.einsum("tkgs,tskd->tkgd", weights, v).flatten(1, 2).to(q.dtype)


def _slots_of(paged: Tensor, pages: Tensor) -> Tensor:
    """The slots of some pages `(T, pages)`, `(T, slots, kv_heads, head_dim)`."""
    return paged.index_select(0, pages.flatten()).unflatten(0, pages.shape).flatten(1, 2)


def _varlen() -> Any:
    """PyTorch's module, which older versions do not have."""
    from torch.nn.attention import varlen

    return varlen


def _wants_offsets() -> bool:
    """Whether to pass offsets of keys: FlashAttention 2 requires them, though pages replace them; newer ones refuse."""
    return getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)() in (None, "FA2")


@cache
def _has_kernel(device: torch.device) -> bool:
    """Whether this torch and this GPU have the kernel with pages."""
    try:
        known = inspect.signature(_varlen().varlen_attn).parameters
    except ImportError:
        return False
    ours = {"seqused_k", "block_table", "num_splits", "enable_gqa", "window_size"} <= known.keys()
    return ours and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
