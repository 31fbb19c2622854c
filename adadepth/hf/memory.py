"""How many rows, and how many tokens in each, fit into a given number of bytes."""

import re
from typing import Any, NamedTuple

from transformers import LogitsProcessorList

from ..cache.kv_reuse import LayoutName
from .anatomy import text_config
from .cache import AdaptiveCache
from .engine import Engine, Refused
from .inputs import learned_positions
from .noise import Noise
from .requests import Request

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_MOST_ROWS = 256


class Wanted(NamedTuple):
    """The rows and the capacity that the user chose; None: not chosen. There are at most `requests` requests."""

    rows: int | None
    capacity: int | None
    requests: int | None = None


def bytes_of(memory: int | str) -> int:
    """The number of bytes in `memory`: a number, or text such as `"2GiB"`.

    Raises: `ValueError` for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B?", str(memory).strip())
    if found is None:
        raise ValueError(f"memory expected bytes, such as 2000000, '500MB' or '2GiB', got {memory!r}.")
    return int(float(found[1]) * _UNITS[found[2] or ""])


class Cost(NamedTuple):
    """What the caches of an engine need for each token, if the capacity of a row is a multiple of `page` tokens."""

    each: int
    page: int


def cost_of(model: Any, layout: LayoutName = "filled") -> Cost:
    """The bytes of a token, measured by running one at the greatest depth.

    These are the keys and values of each iteration of the loop and of each layer outside the loop, and the depths.
    Raises: `ValueError` for a model that cannot be served, and whatever the token's pass raises.
    """
    cache = AdaptiveCache(layout, 1)
    engine = Engine(model, 1, 1, cache)
    engine.add(Request([0], 1, LogitsProcessorList(), False, Noise(1), min_depth=model.loop.steps))
    while not (events := engine.step()):
        pass
    if isinstance(events[0], Refused):
        raise events[0].error
    parts = [(part.nbytes, part._depth.shape[1]) for part in cache.parts.values() if part.steps is not None]
    return Cost(sum(nbytes // slots for nbytes, slots in parts), max(slots for _, slots in parts))


def fitting(model: Any, memory: int | str, wanted: Wanted, usual: int, layout: LayoutName) -> tuple[int, int]:
    """Rows and capacity whose caches need at most `memory` bytes. `usual` is the capacity if neither is chosen.

    If only rows are chosen, the capacity follows from them. Otherwise rows follow from the capacity, at most 256.
    Raises: `ValueError` if the memory is too small.
    """
    (each, page), limit = cost_of(model, layout), learned_positions(model.base, model.anatomy)
    tokens, rows, capacity = bytes_of(memory) // each, wanted.rows, wanted.capacity
    if rows is not None and capacity is None:
        most = getattr(text_config(model.base.config), "max_position_embeddings", None)
        capacity = tokens // rows // page * page
        capacity = min(capacity, most or capacity)
    else:
        capacity = usual if capacity is None else capacity
        capacity = min(capacity, limit or capacity)
    row = -(-capacity // page) * page  # what is allocated for each
    if rows is None:
        rows = min(tokens // row, wanted.requests or _MOST_ROWS, _MOST_ROWS)
    if rows < 1 or capacity < 1 or rows * row > tokens:
        raise ValueError(
            f"memory={memory!r} has room for {tokens} tokens of {each} bytes, got rows={rows} of capacity={capacity}. "
            "Pass more memory, or fewer rows or a smaller capacity."
        )
    return rows, capacity
