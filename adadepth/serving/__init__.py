"""Serving: `DepthBatch` runs tokens of different iterations in one call of the block. It needs torch only."""

from .batch import DepthBatch as DepthBatch
from .batch import Failed as Failed
from .batch import Ran as Ran
