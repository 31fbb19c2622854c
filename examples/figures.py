"""What several examples compute alike: the share of a learning rate, and a mean with its standard error."""

import math
from collections.abc import Sequence
from statistics import mean, stdev


def cosine(step: int, steps: int, warm: int) -> float:
    """The share of the learning rate: a linear warm-up over `warm` steps, then a cosine to a tenth."""
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / (steps - warm))


def standard_error(values: Sequence[float]) -> float:
    """That of the mean of at least two values."""
    return stdev(values) / math.sqrt(len(values))


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and its standard error if there are several, in the format `form`."""
    if len(values) == 1:
        return f"{values[0]:+{form}}"
    return f"{mean(values):+{form}} ± {standard_error(values):{form}}"
