"""The figures of the docs are drawn from the tables that stand beside them."""

import re

import pytest

pytest.importorskip("matplotlib")

from tools import figures

DRAWN = figures.figures()


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_says_what_its_table_says(name: str) -> None:
    """Words and places; the rest of an SVG depends on matplotlib's version."""
    kept, drawn = seen((figures.DOCS / "images" / name).read_text()), seen(DRAWN[name])
    assert kept[0] == drawn[0]
    assert kept[1] == pytest.approx(drawn[1], abs=1.0)


def seen(svg: str) -> tuple[list[str], list[float]]:
    words = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    return words, [float(place) for pair in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', svg) for place in pair]


def test_a_table_is_read_without_its_marks() -> None:
    page = "|  | right |\n|---|---|\n| **a gate** | 99.96 ± 0.02 |\n| `b`, late | 3.40× |\n\nText."
    assert figures.table(page, "right") == [["a gate", "99.96"], ["b, late", "3.40"]]
