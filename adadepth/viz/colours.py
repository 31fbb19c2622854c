"""The colours of all pictures, for a light page; `night` makes those for a dark page.

They are chosen in OKLab, in which equal steps look equal. The scale is even in lightness, so it can be read in grey
and by colour-blind readers too.
"""

import math

PAPER, CARD, RULE, MUTED, INK = "#f6f7f9", "#ffffff", "#d9dce1", "#5b616b", "#14161a"
SERIES = ("#0072b2", "#bd4f00", "#00795a", "#a33b7d", "#6a5acd", "#6b6b00")

_LINEAR_TO_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_LMS_TO_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)
_LAB_TO_LMS = (
    (1.0, 0.3963377774, 0.2158037573),
    (1.0, -0.1055613458, -0.0638541728),
    (1.0, -0.0894841775, -1.2914855480),
)
_LMS_TO_LINEAR = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)


def scale(share: float) -> str:
    """The colour of `share` in [0, 1]: from pale yellow over green to blue, evenly darker. `INK` is readable on all."""
    angle, chroma = math.radians(100 + 150 * share), 0.05 + 0.08 * share
    return _hex(0.965 - 0.3 * share, chroma * math.cos(angle), chroma * math.sin(angle))


def depth_colour(depth: int, steps: int) -> str:
    """The colour of a token that ran `depth` of `steps` iterations."""
    return scale((depth - 1) / max(steps - 1, 1))


def night(colour: str) -> str:
    """The same hue for a dark page, with lightness inverted: white becomes nearly black."""
    lightness, a, b = _oklab(colour)
    return _hex(min(1.14 - 0.94 * lightness, 1.0), a, b)


def both(colour: str) -> str:
    """A CSS colour that follows the `color-scheme` of the page around it."""
    return f"light-dark({colour},{night(colour)})"


def _oklab(colour: str) -> list[float]:
    """Source: Ottosson 2020, "A perceptual color space for image processing"."""
    coded = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in coded]
    return _times(_LMS_TO_LAB, [lms ** (1 / 3) for lms in _times(_LINEAR_TO_LMS, linear)])


def _hex(*lab: float) -> str:
    linear = [min(max(c, 0.0), 1.0) for c in _times(_LMS_TO_LINEAR, [lms**3 for lms in _times(_LAB_TO_LMS, lab)])]
    coded = [12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in linear]
    return "#" + "".join(f"{round(255 * c):02x}" for c in coded)


def _times(matrix: tuple[tuple[float, ...], ...], vector: list[float] | tuple[float, ...]) -> list[float]:
    return [sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix]
