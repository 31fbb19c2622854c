"""`check_looped`: compares packed execution, dense execution and decoding of a wrapper on the user's own input."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._given import unfit
from .._modes import evaluating
from .._nested import each
from .._types import HiddenRows, MaskRows
from ..cache.kv_reuse import KVReuseCache
from ..loop.agreement import EXACT, Case, altered, check_some_mode, coarsest, draws_noise, off, untouched
from ..loop.arguments import check_alone, check_rows
from ..loop.selfcheck import mixed, shortened
from ..loop.whole_rows import check_whole_rows
from ..loop.wrapper import RecurrentWrapper
from ..rules import TrainingOnly


def check_looped(looped: RecurrentWrapper, x: HiddenRows, mask: MaskRows | None = None, **call: Any) -> None:
    """Runs a wrapper packed, dense and with a cache on your own input, and compares.

    Packed and dense execution are compared at mixed depths, and at the depths that the wrapper's rule decides. If the
    wrapper is causal, one pass is also compared with a prompt and later tokens with a cache, in evaluation mode; and
    its rule, if it is not `TrainingOnly`, must decide about tokens without the others of their row. The check runs in
    the wrapper's current mode, without dropout, in its own dtype and to its precision. What draws random numbers is not
    compared. It does not change the wrapper.

    Arguments: `looped`; `x`, `mask` and `call`, as you will call it: a batch of real size, `start=`, `block_kwargs=`,
    `min_depth=` and `max_depth=`.
    Raises: `ValueError` that names what differs; if `looped` is no wrapper; or what the loop raises.
    """
    if not isinstance(looped, RecurrentWrapper):
        raise unfit(
            "check_looped expected an adadepth.RecurrentWrapper",
            looped,
            "For a block without its loop, use check_block(block, dim).",
        )
    check_rows(x, mask, call.get("start"))
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    more = {name: value for name, value in call.items() if name in ("start", "block_kwargs")}
    with untouched(looped, x.device):
        altered(looped, skip=False, self_check=False)(x, mask=mask, **call)  # an error here is not due to packing
        check_some_mode(looped, Case(x, shortened(real), mixed(x, looped.steps), more))
        check_whole_rows(looped, Case(x, real, mixed(x, looped.steps), more))
        depth = altered(looped, skip=True, self_check=False)(x, mask=mask, **call).trace.depth
        check_some_mode(looped, Case(x, real, depth, more))
        if looped.causal:
            if not isinstance(looped.rule, TrainingOnly):
                check_alone(looped.rule)
            with evaluating(looped):
                _check_cache(looped, Case(x, real, mixed(x, looped.steps), more))


def _check_cache(looped: RecurrentWrapper, case: Case) -> None:
    if draws_noise(looped, case):
        return
    whole, cache = case.run(looped, skip=True).hidden, KVReuseCache()
    parts = [part.run(looped, cache=cache).hidden for part in _pieces(case)]
    dtype = coarsest(looped, case.x)
    if (far := off(torch.cat(parts, 1), whole, case.mask, dtype)) > EXACT[dtype]:
        raise ValueError(
            f"{type(looped.block).__name__} gives another result with a cache than without: a prompt and later tokens "
            f"differ from one pass by {far:.1e} relative. Positions must come from adadepth.positions() or "
            "view.positions, and tokens may depend on each other only through attention."
        )


def _pieces(case: Case) -> Iterator[Case]:
    """The first half of the columns, then one, then one, then the rest."""
    seq = case.x.shape[1]
    bounds = sorted({0, seq // 2, min(seq, seq // 2 + 1), min(seq, seq // 2 + 2), seq})
    for first, last in pairwise(bounds):

        def cut(tensor: Tensor, columns: slice = slice(first, last)) -> Tensor:
            return tensor[:, columns] if tensor.shape[1] == seq else tensor

        yield Case(cut(case.x), cut(case.mask), cut(case.depth), each(case.more, cut))
