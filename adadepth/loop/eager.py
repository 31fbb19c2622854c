"""Runs a loop whose shapes depend on the data in eager mode, while Dynamo compiles the code around it."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch

_WHY = (
    "RecurrentWrapper runs in eager with skip=True (the default), with a cache or with checkpoint=True: what it runs "
    "depends on the data. For one graph (fullgraph=True) build it with skip=False and checkpoint=False, and without a "
    "cache."
)
_disabled: list[Callable[..., Any]] = []  # made at the first call, because it imports Dynamo


def uncompiled(looped: Any, x: Any, **options: Any) -> Any:
    """`looped(x, **options)`, called by compiled code, but run in eager mode.

    Raises: `ValueError` if it is called by `torch.export`, which has no code to run in eager.
    """
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        raise ValueError(_WHY)
    if not _disabled:
        torch._dynamo.graph_break(msg=_WHY)
        more = {"reason": _WHY} if "reason" in signature(torch.compiler.disable).parameters else {}
        _disabled.append(torch.compiler.disable(_forward, **more))
    return _disabled[0](looped, x, **options)


def _forward(looped: Any, x: Any, **options: Any) -> Any:
    return looped.forward(x, **options)


def in_eager() -> AbstractContextManager[Any]:
    """A context in which compiled parts run in eager mode.

    Dynamo does not trace under a dispatch mode, and would never again try to compile code that it met there.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    context: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return context
