"""How many requests, and how long ones, fit into a budget of bytes."""

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
    """What is known of rows and capacity before the budget is; at most `requests` come."""

    rows: int | None
    capacity: int | None
    requests: int | None = None


def bytes_of(memory: int | str) -> int:
    """A number of bytes, given as such or as `"2GiB"`.

    Raises: `ValueError` for what is neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B?", str(memory).strip())
    if found is None:
        raise ValueError(f"memory expected bytes, such as 2000000, '500MB' or '2GiB', got {memory!r}.")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def bytes_per_token(model: Any, layout: LayoutName = "filled") -> int:
    """What all caches of an engine take for each token of each row, seen of one token; the most where it depends.

    That is: keys and values of every layer of the loop, for each iteration, of every layer outside it once, and depths.
    Raises: `ValueError` for a model that cannot be served; what fails in its pass.
    """
    engine = Engine(model, 1, 1, AdaptiveCache(layout, 1))
    engine.add(Request([0], 1, LogitsProcessorList(), False, Noise(1), min_depth=model.loop.steps))
    while not (events := engine.step()):
        pass
    if isinstance(events[0], Refused):
        raise events[0].error
    return engine.nbytes


def fitting(model: Any, memory: int | str, wanted: Wanted, usual: int, layout: LayoutName) -> tuple[int, int]:
    """Rows and capacity whose caches take at most so many bytes; `usual` is the capacity where neither is known.

    Rows are derived from the capacity, at most 256 of them, or, if only rows are known, the capacity from these.
    Raises: `ValueError` for a budget that is too small.
    """
    each, limit = bytes_per_token(model, layout), learned_positions(model.base, model.anatomy)
    tokens, rows, capacity = bytes_of(memory) // each, wanted.rows, wanted.capacity
    if rows is None:
        capacity = min(capacity or usual, limit or capacity or usual)
        rows = min(tokens // capacity, wanted.requests or _MOST_ROWS, _MOST_ROWS)
    elif capacity is None:
        known = getattr(text_config(model.base.config), "max_position_embeddings", None)
        capacity = min(tokens // rows, known or tokens)
    if rows < 1 or capacity < 1 or rows * min(capacity, limit or capacity) > tokens:
        raise ValueError(
            f"memory={memory!r} has room for {tokens} tokens of {each} bytes, got rows={rows} of capacity={capacity}. "
            "Pass more memory, or fewer rows or a smaller capacity."
        )
    return rows, capacity
