"""Pictures are read back as a reader or a browser would, and compared with what they were made of."""

import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from narrow import the
from rich.console import Console
from torch import Tensor

from adadepth import viz
from adadepth.viz import colours

pytestmark = pytest.mark.shapes

ROOT = Path(__file__).parent.parent
VOID = {"meta", "br", "img"}


class Reader(HTMLParser):
    """Which text stands in which elements; every element must be closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, list[tuple[str, dict[str, str | None]]]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(self.tags[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text.append((data, list(self.open)))

    def within(self, tag: str) -> str:
        """All text inside elements of that name."""
        return "".join(data for data, inside in self.text if tag in [name for name, _ in inside])


def rows_of(html: str) -> list[list[tuple[str, str, str]]]:
    """Of each row of a heat map, its characters, each with the class of its colour and its tooltip."""
    rows: dict[int, list[tuple[str, str, str]]] = {}
    for data, inside in Reader(html).text:
        names = [name for name, _ in inside]
        if "span" in names and "p" not in names:
            span = inside[names.index("span")][1]
            box = id(inside[len(names) - 1 - names[::-1].index("div")][1])
            rows.setdefault(box, []).extend((char, the(str, span["class"]), the(str, span["title"])) for char in data)
    return list(rows.values())


def seen(text: str) -> str:
    """What a reader is to see of a text."""
    pictures = {chr(i): chr(0x2400 + i) for i in range(32)} | {"\x7f": "\u2421", "\n": "\n", "\t": "\t"}
    return "".join(
        "\ufffd" if 0x80 <= ord(char) < 0xA0 or 0xD800 <= ord(char) < 0xE000 else pictures.get(char, char)
        for char in text
    )


def contrast(a: str, b: str) -> float:
    """Source: WCAG 2.2, relative luminance and contrast ratio."""
    low, high = sorted(luminance(colour) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


WORDS = st.text(st.characters(), max_size=5) | st.sampled_from(["\n", "\t", "\r\n", "<script>", "&amp;", '"', "\x00"])
LINES = st.lists(st.tuples(WORDS, st.integers(0, 5)), max_size=12)


@settings(max_examples=60)
@given(LINES, st.booleans())
@example([("<script>alert(1)</script>\n", 2), ("&lt;", 2), ("\n", 2), ("'\"", 5), ("gone", 0)], False)
def test_a_heat_map_holds_the_text_and_each_characters_depth(line: list[tuple[str, int]], known: bool) -> None:
    depth = torch.tensor([deep for _, deep in line], dtype=torch.int64)
    nll = 0.25 * torch.arange(len(line)) if known else None
    html = viz.heat_map([text for text, _ in line], depth, 5, nll=nll)
    found = [of for row in rows_of(html) for of in row]
    ending = [f", NLL {0.25 * i:.2f} nats" if known else "" for i in range(len(line))]
    assert found == [
        (char, f"d{deep}", f"depth {deep}{ending[i]}")
        for i, (text, deep) in enumerate(line)
        if deep
        for char in seen(text)
    ]
    html.encode()


def test_neighbours_of_one_depth_share_a_span_unless_each_has_an_nll() -> None:
    depth = torch.tensor([1, 1, 3, 0, 3, 2])
    assert viz.heat_map("ab\nc-d", depth, 3).count("<span") - 3 == 3
    assert viz.heat_map("ab\nc-d", depth, 3, nll=torch.zeros(6)).count("<span") - 3 == 5


def test_rows_of_a_batch_stand_apart_and_padding_is_left_out() -> None:
    depth = torch.tensor([[1, 2, 4], [0, 0, 3]])
    html = viz.heat_map([["one", " two", "\n"], ["<pad>", "<pad>", "deep"]], depth, 4)
    assert ["".join(char for char, *_ in row) for row in rows_of(html)] == ["one two\n", "deep"]
    assert Reader(html).within("p") == "Iterations run: 1 2 3 4, 2.50 on average"
    assert Reader(viz.heat_map([[], []], torch.zeros(2, 0).long(), 2)).within("p") == "Iterations run: 1 2"


def test_the_legend_shows_each_depth_on_its_colour_and_every_colour_is_read_by_day_and_night() -> None:
    for steps in (1, 2, 4, 16):
        html = viz.heat_map("a", torch.tensor([1]), steps)
        inside = [(data, elements) for data, elements in Reader(html).text if "p" in [name for name, _ in elements]]
        swatches = {of[-1][1]["class"]: data for data, of in inside if of[-1][0] == "span"}
        assert swatches == {f"d{i}": str(i) for i in range(1, steps + 1)}
        ink = the(re.Match, re.search(r"\.adadepth span\{[^}]*color:light-dark\((.*?),(.*?)\)", html)).groups()
        grounds = re.findall(rf"\.of{steps} \.(d\d+){{background:light-dark\((.*?),(.*?)\)}}", html)
        assert [name for name, *_ in grounds] == list(swatches)
        for _, *pair in grounds:
            assert min(contrast(*both) for both in zip(ink, pair, strict=True)) >= 4.5
        for (_, *shallow), (_, *deep) in pairwise(grounds):  # a scale in grey as well
            assert luminance(deep[0]) < luminance(shallow[0])
            assert luminance(deep[1]) > luminance(shallow[1])
            assert steps > 4 or min(contrast(*both) for both in zip(shallow, deep, strict=True)) >= 1.3


def test_words_and_lines_are_read_by_day_and_night() -> None:
    for ground in (colours.CARD, colours.PAPER):
        for colour, least in {colours.INK: 4.5, colours.MUTED: 4.5, **dict.fromkeys(colours.SERIES, 3)}.items():
            assert min(contrast(colour, ground), contrast(colours.night(colour), colours.night(ground))) >= least
    for colour, lab in {"#ff0000": (0.62796, 0.22486, 0.12585), "#ffffff": (1.0, 0.0, 0.0)}.items():  # published values
        assert colours._oklab(colour) == pytest.approx(lab, abs=1e-4)
        assert colours._hex(*lab) == colour


def test_the_terminal_shows_the_same_text_and_depths() -> None:
    depth = torch.tensor([[0, 1, 4], [2, 3, 4]])
    text = viz.terminal([["<pad>", "[b]one", " two"], ["and", "\x1b", "\n"]], depth, 4)
    assert text.plain == "[b]one two\nand\u241b\n"
    shown = [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]
    ink, grounds = colours.night(colours.INK), [colours.night(colours.depth_colour(i, 4)) for i in range(1, 5)]
    assert shown == [
        ("[b]one", f"{ink} on {grounds[0]}"),
        (" two", f"bold {ink} on {grounds[3]}"),
        ("and", f"{ink} on {grounds[1]}"),
        ("\u241b", f"bold {ink} on {grounds[2]}"),
        ("\n", f"bold {ink} on {grounds[3]}"),
    ]


def test_a_terminal_without_colours_shows_the_deeper_half_in_bold() -> None:
    console = Console(force_terminal=True, no_color=True, width=40, legacy_windows=False)
    with console.capture() as shown:
        console.print(viz.terminal(["easy ", "hard"], torch.tensor([2, 3]), 4))
    assert shown.get() == "easy \x1b[1mhard\x1b[0m\n"


def bytes_of(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


@settings(max_examples=60)
@given(st.text("a \né世\U0001f600", max_size=20))
def test_pieces_of_bytes_join_to_the_text_and_a_character_is_its_last_bytes(text: str) -> None:
    ids = torch.tensor(list(text.encode()), dtype=torch.int64)
    expected = [part for char in text for part in [""] * (len(char.encode()) - 1) + [char]]
    assert viz.pieces(bytes_of, ids) == expected


def test_pieces_keep_the_space_that_a_first_word_loses_and_a_last_character_cut_short() -> None:
    words = ["▁the", "▁cat", "s", "▁the"]
    decode = lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")  # noqa: E731
    assert viz.pieces(decode, [0, 1, 2, 3]) == ["the", " cat", "s", " the"]
    assert viz.pieces(bytes_of, list("aé".encode()[:2])) == ["a", "\ufffd"]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3), max_size=12))
@example([1, 0, 2, 1])
def test_pieces_join_to_the_text_around_tokens_that_have_none(ids: list[int]) -> None:
    words = ["", "▁a", "▁b", "s"]  # the first is a special token that is left out

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    found = viz.pieces(decode, ids)
    assert "".join(found) == decode(ids)
    assert [part for part, i in zip(found, ids, strict=True) if i == 0] == [""] * ids.count(0)


def drawn(steps: int = 4, size: int = 300) -> tuple[Tensor, Tensor]:
    """Depths, some of them padding, and an NLL for each that is NaN at padding."""
    depth = torch.randint(0, steps + 1, (3, size // 3))
    depth[depth == 2] = 1  # nobody leaves after the second
    return depth, torch.where(depth > 0, torch.rand(depth.shape), torch.nan)


def heights(bars: Any) -> list[float]:
    return [bar.get_height() for bar in bars]


def numbers(line: Any) -> tuple[list[float], list[float]]:
    return list(line.get_xdata()), list(line.get_ydata())


def test_exits_are_counted_as_one_would_by_hand() -> None:
    depth, nll = drawn()
    above, below = viz.plot_exits(depth, 4, nll=nll).axes
    real = [(deep, loss) for deep, loss in zip(depth.flatten().tolist(), nll.flatten().tolist(), strict=True) if deep]
    share = [100 * sum(deep == i for deep, _ in real) / len(real) for i in range(1, 5)]
    run, left = above.containers[:2]
    assert heights(run) == pytest.approx([100 * sum(deep >= i for deep, _ in real) / len(real) for i in range(1, 5)])
    assert heights(left) == pytest.approx(share)
    assert [text.get_text() for text in above.texts] == [f"{value:.1f}" for value in share]
    of = {i: [loss for deep, loss in real if deep == i] for i in range(1, 5)}
    mean = [sum(losses) / len(losses) if losses else float("nan") for losses in of.values()]
    assert heights(below.containers[0]) == pytest.approx(mean, nan_ok=True, rel=1e-6)
    assert [text.get_text() for text in below.texts] == [f"{value:.2f}" if value == value else "" for value in mean]
    painted = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in left]
    assert painted == [colours.depth_colour(i, 4) for i in range(1, 5)]
    assert len(viz.plot_exits(depth, 4).axes) == 1
    assert not viz.plot_exits(torch.arange(1, 20), 19).axes[0].texts


def test_needed_against_used_counts_every_pair() -> None:
    needed, used = drawn()[0], drawn()[0]
    axis = viz.plot_needed(needed, used, 4).axes[0]
    pairs = Counter((u, n) for n, u in zip(needed.flatten().tolist(), used.flatten().tolist(), strict=True) if n and u)
    assert {text.get_position(): int(text.get_text()) for text in axis.texts} == pairs
    patches: list[Any] = list(axis.patches)
    cells = {(round(c.get_x() + 0.47), round(c.get_y() + 0.47)): c for c in patches}
    assert len(cells) == 16
    for (uses, needs), cell in cells.items():
        count, row = pairs[uses, needs], sum(n for (_, other), n in pairs.items() if other == needs)
        expected = colours.scale(count / row) if count else colours.CARD
        assert matplotlib.colors.to_hex(cell.get_facecolor()) == expected
        assert (cell.get_linewidth() > 1) == (uses == needs)


@pytest.mark.plain  # the annotations name no unsigned dtype
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_depths_of_a_small_dtype_are_counted_as_any(dtype: torch.dtype) -> None:
    needed, used = torch.tensor([16, 3, 12]), torch.tensor([16, 9, 15])
    nll = torch.ones(3)
    draws: list[Callable[[torch.dtype], Figure]] = [
        lambda kind: viz.plot_needed(needed.to(kind), used.to(kind), 16),
        lambda kind: viz.plot_exits(used.to(kind), 16, nll=nll),
    ]
    for draw in draws:
        cells = []
        for kind in (dtype, torch.int64):
            patches: list[Any] = [patch for axis in draw(kind).axes for patch in axis.patches]
            cells.append([(patch.get_xy(), patch.get_height(), patch.get_facecolor()) for patch in patches])
        assert str(cells[0]) == str(cells[1])  # a mean may be NaN


PANELS = {"loss": {"training": ([0, 1, 2], [3.0, 2.5, 2.25]), "held out": ([0, 2], [3.5, 2.5])}}
PANELS["mean depth"] = {"held out": ([0, 2], [4.0, 3.0])}


def test_curves_are_the_numbers_given_and_a_name_keeps_its_colour() -> None:
    figure = viz.plot_curves(PANELS, "step", {1: "exits begin"})
    found = {
        axis.get_ylabel(): {
            line.get_label(): numbers(line) for line in axis.lines if not str(line.get_label()).startswith("_")
        }
        for axis in figure.axes
    }
    assert found == PANELS
    lines = [line for axis in figure.axes for line in axis.lines]
    looks = [(str(line.get_label()), line.get_color(), line.get_linestyle()) for line in lines]
    named = {look for look in looks if not look[0].startswith("_")}
    assert len(named) == len({colour for _, colour, _ in named}) == len({dashes for *_, dashes in named}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training", "held out"]
    assert [numbers(line)[0][0] for line in lines if line.get_linestyle() == ":"] == [1, 1]
    assert [text.get_text() for text in figure.axes[0].texts] == ["exits begin"]
    assert (figure.axes[1].get_xlabel(), figure.axes[1].get_ylabel()) == ("step", "mean depth")


@pytest.mark.parametrize("name", ["_fixed", "", "a $_b$"])
def test_a_legend_has_every_name(name: str) -> None:
    curves: dict[str, tuple[list[int], list[float]]] = {name: ([0, 1], [3.0, 2.0]), "other": ([0, 1], [2.0, 2.0])}
    for figure in (viz.plot_curves({"loss": curves, "depth": curves}), viz.plot_frontier({"a": (1, 2.0)}, curves)):
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [name, "other"]
        drawn, lines = [line.get_color() for line in legend.get_lines()], figure.axes[0].lines
        assert drawn == [line.get_color() for line in lines]
        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(text) for text in legend.get_texts() if text.get_text()]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


NAMES = (
    *("learned", "router", "forced 3", "KL of predictions", "convergence", "max probability", "entropy"),
    *("uniform pruning", "geometric pruning", "oracle"),
)
CLOUDS: dict[str, Callable[[int], tuple[float, float]]] = {
    "all at one place": lambda i: (2.5, 1.6),
    "one mean depth": lambda i: (2.96, 1.62 + 0.002 * i),
    "along a line": lambda i: (1.7 + 0.1 * i, 1.62 + 0.004 * i),
    "anywhere": lambda i: (2 + (7 * i) % 10 / 5, 1.6 + (3 * i) % 10 / 50),
}
FIXED = {
    "fixed depth": ([1, 2, 3, 4], [2.7, 1.65, 1.63, 1.61]),
    "costs $5 and $6": ([1, 2], [1.9, 1.7]),
}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ten_policies_are_named_without_one_name_over_another(cloud: str) -> None:
    points = {name: CLOUDS[cloud](i) for i, name in enumerate(NAMES)}
    figure = viz.plot_frontier(points, FIXED)
    axis = figure.axes[0]
    offsets: Any = axis.collections[0].get_offsets()
    assert [tuple(at) for at in offsets.tolist()] == list(points.values())
    assert {line.get_label(): numbers(line) for line in axis.lines} == FIXED
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(FIXED)
    assert {text.get_text(): the(Annotation, text).xy for text in axis.texts} == points
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axis.texts]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(axis.bbox.contains(*corner) for box in boxes for corner in box.corners())
    corners = [corner for line in FIXED.values() for corner in zip(*line, strict=True)]
    marks = axis.transData.transform([*points.values(), *corners])
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    gap = viz.plot_frontier(points, FIXED | {"with a gap": ([1, 2, 3], [1.7, float("nan"), 1.62])})
    assert [text.get_text() for text in gap.axes[0].texts] == list(NAMES)
    low, high = axis.get_ylim()
    assert low < min(1.61, *(y for _, y in points.values()))
    assert max(y for _, y in points.values()) < high < 2.7  # the line comes in from above


def test_a_name_is_nearest_to_its_own_point_and_off_the_corners_of_lines() -> None:
    points = {"learned": (2.96, 1.632), "router": (2.885, 1.6244), "KL": (2.99, 1.6361), "uniform": (1, 1.75)}
    lines: dict[str, tuple[list[float], list[float]]] = {
        "fixed": ([1, 2, 3, 4], [1.71, 1.648, 1.6296, 1.6177]),
        "where its name would be": ([1.25], [1.75]),
    }
    figure = viz.plot_frontier(points, lines)
    figure.draw_without_rendering()
    axis = figure.axes[0]
    marks = dict(zip(points, axis.transData.transform(list(points.values())).tolist(), strict=True))
    corners = [axis.transData.transform(corner) for line in lines.values() for corner in zip(*line, strict=True)]
    for text in axis.texts:
        box = Text.get_window_extent(text)
        away = {
            name: math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))
            for name, (x, y) in marks.items()
        }
        assert min(away, key=away.__getitem__) == text.get_text()
        assert not any(box.contains(*corner) for corner in corners)


def figures() -> list[Figure]:
    torch.manual_seed(0)
    depth, nll = drawn()
    return [
        viz.plot_exits(depth, 4, nll=nll),
        viz.plot_curves(PANELS),
        viz.plot_frontier({'<b> "fast" & #good': (1, 2.0)}, FIXED),
        viz.plot_needed(depth, depth.roll(1), 4),
    ]


@pytest.fixture(scope="module")
def pictures() -> list[str]:
    return [viz.svg(figure) for figure in figures()]


def test_a_figure_is_the_same_svg_every_time(pictures: list[str]) -> None:
    assert pictures == [viz.svg(figure) for figure in figures()]


def test_svgs_stand_alone_and_side_by_side(pictures: list[str]) -> None:
    ids = [name for picture in pictures for name in re.findall(r' id="([^"]*)"', picture)]
    assert len(ids) == len(set(ids)) > 10
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.attrib["width"] == "100%"
        assert "viewBox" in root.attrib
        assert "height" not in root.attrib
        own = set(re.findall(r' id="([^"]*)"', picture))
        assert set(re.findall(r'url\(#(.*?)\)|href="#(.*?)"', picture)) <= {(i, "") for i in own} | {
            ("", i) for i in own
        }
        styles = re.findall(r'style="(.*?)"', picture)
        assert any("light-dark(#14161a,#eceff5)" in style for style in styles)
        assert not [style for style in styles if re.search(r"(?<!light-dark\()(?<!,)#[0-9a-f]", style)]
        assert "<style" not in picture
    words = "".join(ElementTree.fromstring(pictures[2]).itertext())
    assert '<b> "fast" & #good' in words
    assert "costs $5 and $6" in words


def test_a_figure_with_an_image_stands_alone() -> None:
    figure = Figure()
    figure.subplots().imshow([[0.0, 1.0], [1.0, 0.0]])
    picture = viz.svg(figure)
    (image,) = ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}image")
    assert image.attrib["href"].startswith("data:image/png;base64,")


def test_a_page_holds_everything_and_asks_nothing_of_the_network(pictures: list[str]) -> None:
    heat = viz.heat_map("if a < b:\n", torch.ones(10).long(), 2)
    table = viz.table(["policy <p>", "loss"], [["a & b", 1.23456], ["c", "–"]])
    html = viz.page("depth & <more>", ("Text <b>", heat), ("", "<p>" + table), ("Plots", "".join(pictures)))
    reader = Reader(html.replace("<p><div", "<div"))
    assert reader.within("title") == reader.within("h1") == "depth & <more>"
    assert reader.within("h2") == "Text <b>Plots"
    assert ("html", {"lang": "en"}) in reader.tags
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in reader.tags
    assert Counter(tag for tag, _ in reader.tags)["svg"] == 4
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in reader.tags}
    asked = re.findall(r"https?://[^\"' ]*|src=|@import|url\([^#]|href=\"[^#]", html)
    assert asked == ["http://www.w3.org/2000/svg"] * 4


def test_a_table_escapes_and_puts_numbers_right() -> None:
    rows: list[list[str | int | float]] = [
        ["1 pass <a>", 1, 1.71, "–", "0.31 s"],
        ["x", 12, 1.6, "+0.0016 ± 0.0014", "2 s"],
    ]
    reader = Reader(viz.table(["model", "n", "loss", "against", "time"], rows))
    cells = [
        (data, "class" in inside[-1][1]) for data, inside in reader.text if inside and inside[-1][0] in ("td", "th")
    ]
    assert cells == [
        *[("model", False), ("n", True), ("loss", True), ("against", True), ("time", True)],
        *[("1 pass <a>", False), ("1", True), ("1.7100", True), ("–", True), ("0.31 s", True)],
        *[("x", False), ("12", True), ("1.6000", True), ("+0.0016 ± 0.0014", True), ("2 s", True)],
    ]
    assert Reader(viz.table(["nothing"], [])).within("th") == "nothing"


DEPTH = torch.tensor([1, 2])
ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "too many tokens": (
        lambda: viz.heat_map(["a", "b", "c"], DEPTH, 2),
        "heat_map expected as many tokens as depths, 2, got 3. Only tokens that ran have a depth; the newest token of "
        "a generation has none.",
    ),
    "too few rows": (
        lambda: viz.terminal([["a"]], torch.ones(2, 1).long(), 2),
        "terminal expected the tokens of 2 rows, one for each row of depths, got 1.",
    ),
    "three axes": (
        lambda: viz.heat_map("a", torch.ones(1, 1, 1).long(), 2),
        "heat_map expected depths of shape (seq,) or (batch, seq), got (1, 1, 1).",
    ),
    "too deep": (
        lambda: viz.heat_map("ab", torch.tensor([1, 5]), 4),
        "heat_map expected depths from 0 (padding) to steps=4, got 1 to 5. steps is that of the loop.",
    ),
    "below none": (
        lambda: viz.plot_exits(torch.tensor([-1, 2]), 4),
        "plot_exits expected depths from 0 (padding) to steps=4, got -1 to 2. steps is that of the loop.",
    ),
    "only padding": (
        lambda: viz.plot_exits(torch.zeros(3).long(), 4),
        "plot_exits expected at least one token of depth 1 or more, got 3, all padding.",
    ),
    "never both": (
        lambda: viz.plot_needed(torch.tensor([0, 1]), torch.tensor([1, 0]), 4),
        "plot_needed expected at least one token of depth 1 or more, got 2, all padding.",
    ),
    "a curve": (
        lambda: viz.plot_curves({"loss": {"training": ([1, 2], [3.0])}}),
        "plot_curves expected as many x as y for 'training', got 2 and 1.",
    ),
    "no panel": (
        lambda: viz.plot_curves({}),
        "plot_curves expected at least one panel, {label: {name: (xs, ys)}}, got none.",
    ),
    "a line": (
        lambda: viz.plot_frontier({"a": (1, 2)}, {"fixed": ([1], [])}),
        "plot_frontier expected as many x as y for 'fixed', got 1 and 0.",
    ),
    "a diverged policy": (
        lambda: viz.plot_frontier({"a": (1, 2), "b": (2, float("nan"))}),
        "plot_frontier expected finite costs and losses, got (2, nan) for 'b'. Leave it out.",
    ),
    "no point": (
        lambda: viz.plot_frontier({}),
        "plot_frontier expected at least one named point, {name: (cost, loss)}, got none.",
    ),
    "a short row": (
        lambda: viz.table(["a", "b"], [["1", "2"], ["1"]]),
        "table expected 2 cells in each row, one for each column, got 1 in row 1.",
    ),
}
PLAIN = {
    "ids": (
        lambda: viz.heat_map([0, 7], DEPTH, 2),  # type: ignore[list-item]
        "heat_map expected pieces of text, got int 0. Make them of ids by adadepth.viz.pieces(tokenizer.decode, ids).",
    ),
    "real depths": (
        lambda: viz.plot_exits(torch.ones(2), 2),
        "plot_exits expected integer depths, as trace.depth has them, got torch.float32.",
    ),
    "an nll too many": (
        lambda: viz.heat_map("ab", DEPTH, 2, nll=torch.zeros(3)),
        "heat_map expected nll of the shape of the depths, (2,), got (3,).",
    ),
    "used too short": (
        lambda: viz.plot_needed(DEPTH, DEPTH[:1], 2),
        "plot_needed expected used of the shape of the depths, (2,), got (1,).",
    ),
}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(pytest.param(*case, id=name) for name, case in ERRORS.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.plain) for name, case in PLAIN.items()),
    ],
)
def test_an_error_says_what_was_expected(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call()
    assert str(error.value) == message


@pytest.mark.plain
def test_optional_packages_are_imported_only_where_they_draw() -> None:
    code = """
import sys, torch, adadepth
assert "adadepth.viz" not in sys.modules
from adadepth import viz
viz.page("a", ("b", viz.heat_map("ab", torch.tensor([1, 2]), 2) + viz.table(["c"], [[1.0]])))
assert not {"matplotlib", "rich"} & set(sys.modules), "HTML needs nothing"
class Missing:
    def find_spec(name, path=None, target=None):
        if name in ("matplotlib", "rich"):
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Missing)
for draw in (lambda: viz.plot_curves({"loss": {}}), lambda: viz.terminal("a", torch.tensor([1]), 1)):
    try:
        draw()
    except ImportError as error:
        print(error)
sys.meta_path.pop(0)
import matplotlib
before = matplotlib.rcParams.copy()  # its backend is not asked for: that would import pyplot
viz.svg(viz.plot_exits(torch.tensor([1]), 1))
assert before == matplotlib.rcParams.copy() and "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    install = "{} is not installed. Install it with: pip install 'adadepth[viz]'\n"
    assert done.stdout == install.format("matplotlib") + install.format("rich")
