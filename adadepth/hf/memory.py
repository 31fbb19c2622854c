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


def bytes_per_token(model: Any, layout: LayoutName = "filled") -> int:
    """Bytes that the caches of an engine need for each token, measured by running one token at the greatest depth.

    These are the keys and values of each iteration of the loop and of each layer outside the loop, and the depths.
    Raises: `ValueError` for a model that cannot be served, and whatever the token's pass raises.
    """
    engine = Engine(model, 1, 1, AdaptiveCache(layout, 1))
    engine.add(Request([0], 1, LogitsProcessorList(), False, Noise(1), min_depth=model.loop.steps))
    while not (events := engine.step()):
        pass
    if isinstance(events[0], Refused):
        raise events[0].error
    return engine.nbytes


def fitting(model: Any, memory: int | str, wanted: Wanted, usual: int, layout: LayoutName) -> tuple[int, int]:
    """Rows and capacity whose caches need at most `memory` bytes. `usual` is the capacity if neither is chosen.

    If only rows are chosen, the capacity follows from them. Otherwise rows follow from the capacity, at most 256.
    Raises: `ValueError` if the memory is too small.
    """
    each, limit = bytes_per_token(model, layout), learned_positions(model.base, model.anatomy)
    tokens, rows, capacity = bytes_of(memory) // each, wanted.rows, wanted.capacity
    if rows is None:
        capacity = min(capacity or usual, limit or capacity or usual)
        rows = min(tokens // capacity, wanted.requests or _MOST_ROWS, _MOST_ROWS)
    elif capacity is None:
        most = getattr(text_config(model.base.config), "max_position_embeddings", None)
        capacity = min(tokens // rows, most or tokens)
    if rows < 1 or capacity < 1 or rows * min(capacity, limit or capacity) > tokens:
        raise ValueError(
            f"memory={memory!r} has room for {tokens} tokens of {each} bytes, got rows={rows} of capacity={capacity}. "
            "Pass more memory, or fewer rows or a smaller capacity."
        )
    return rows, capacity
