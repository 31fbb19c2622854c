"""Serving: tokens of many iterations in one call of the block; `DepthBatch` (torch only)."""

from .batch import DepthBatch as DepthBatch
from .batch import Failed as Failed
from .batch import Ran as Ran
