"""The dispatch key by which the attention calls of a block are caught.

No tensor has this key, and no mode of torch uses it. While it is included, for one thread, every operator falls
through it at no cost, except the one that has a kernel for it.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch

NAME = "TESTING_ONLY_GenericMode"
_KEY: Any = torch._C._parse_dispatch_key(NAME)
_KEYS = torch._C.DispatchKeySet(_KEY)


def caught() -> AbstractContextManager[Any]:
    """A context in which the key is included for this thread: attention calls are caught."""
    return torch._C._IncludeDispatchKeyGuard(_KEY)


def uncaught() -> AbstractContextManager[Any]:
    """A context in which the key is excluded: attention calls run as usual."""
    return torch._C._ExcludeDispatchKeyGuard(_KEYS)
