"""The dispatch key under which the attention calls of a block are caught.

No tensor has it and no mode of torch's own uses it. While it is included, for one thread, every operator
falls through it at no cost, but the one that has a kernel for it.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch

NAME = "TESTING_ONLY_GenericMode"
_KEY: Any = torch._C._parse_dispatch_key(NAME)
_KEYS = torch._C.DispatchKeySet(_KEY)


def caught() -> AbstractContextManager[Any]:
    """A context in which this thread's operators are looked for under the key."""
    return torch._C._IncludeDispatchKeyGuard(_KEY)


def uncaught() -> AbstractContextManager[Any]:
    """A context in which they are not."""
    return torch._C._ExcludeDispatchKeyGuard(_KEYS)
