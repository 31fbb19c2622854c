"""`check_looped`: whether a wrapper does packed, in rows and with a cache the same, on the user's own input."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._modes import evaluating
from .._types import HiddenRows, MaskRows
from ..cache.kv_reuse import KVReuseCache
from ..loop.agreement import EXACT, Case, altered, check, coarsest, off, untouched
from ..loop.blocks import each
from ..loop.selfcheck import mixed, shortened
from ..loop.wrapper import RecurrentWrapper


def check_looped(looped: RecurrentWrapper, x: HiddenRows, mask: MaskRows | None = None, **call: Any) -> None:
    """Run a wrapper in every execution on an input of yours, and compare.

    With skipping against without it, at mixed depths and at those that its rule chooses; where it is causal, also
    one pass against a prompt and later tokens with a cache. In the mode that the wrapper is in, dropout off, in its
    own dtype and to the precision of that. Nothing of the wrapper is changed.

    Arguments: `looped`; `x`, `mask` and `call`, as you will call it: a batch of real size, `start=`, `block_kwargs=`,
    `min_depth=` and `max_depth=`.
    Raises: `ValueError`, naming what differs, or what the loop raises.
    """
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    more = {name: value for name, value in call.items() if name in ("start", "block_kwargs")}
    with untouched(looped, x.device):
        altered(looped, skip=False, self_check=False)(x, mask=mask, **call)  # what fails in rows fails for everyone
        _check(looped, Case(x, shortened(real), mixed(x, looped.steps), more))
        depth = altered(looped, skip=True, self_check=False)(x, mask=mask, **call).trace.depth
        _check(looped, Case(x, real, depth, more))
        if looped.causal:
            with evaluating(looped):
                _check_cache(looped, Case(x, real, mixed(x, looped.steps), more))


def _check(looped: RecurrentWrapper, case: Case) -> None:
    """In its own mode; where that is random, in evaluation mode."""
    if not check(looped, case) and looped.training:
        with evaluating(looped):
            check(looped, case)


def _check_cache(looped: RecurrentWrapper, case: Case) -> None:
    whole, cache = case.run(looped, skip=True).hidden, KVReuseCache()
    parts = [part.run(looped, cache=cache).hidden for part in _pieces(case)]
    dtype = coarsest(looped, case.x)
    if (far := off(torch.cat(parts, 1), whole, case.mask, dtype)) > EXACT[dtype]:
        raise ValueError(
            f"{type(looped.block).__name__} gives with a cache another result than without: a prompt and then later "
            f"tokens differ from one pass by {far:.1e} relative. Positions must come from adadepth.positions() or "
            "view.positions, and no token may depend on a later one but through attention."
        )


def _pieces(case: Case) -> Iterator[Case]:
    """Half of the columns, then one, then one, then the rest."""
    seq = case.x.shape[1]
    bounds = sorted({0, seq // 2, min(seq, seq // 2 + 1), min(seq, seq // 2 + 2), seq})
    for first, last in pairwise(bounds):

        def cut(tensor: Tensor, columns: slice = slice(first, last)) -> Tensor:
            return tensor[:, columns] if tensor.shape[1] == seq else tensor

        yield Case(cut(case.x), cut(case.mask), cut(case.depth), each(case.more, cut))
