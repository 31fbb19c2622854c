"""Draw the figures of docs/when-depth-helps.md from the tables of the docs: `python -m tools.figures`."""

import re
from pathlib import Path

import torch

from adadepth import viz

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "when-depth-helps.md"
WORST = 12  # per cent wrong
GATELESS = ("trained at", "at most")
# Of the expressions; the others lie on one another.
CHOSEN = ("guided gates, early", "3 distinct layers", "prior, KL")
TEXT = {name: name for name in ("router-shallow", "router", "router-deep")} | {
    "guided": "guided gates",
    "survival": "survival gates",
    "criterion": "KL criterion",
}


def main() -> None:
    """Write them into docs/images."""
    for name, drawn in figures().items():
        (DOCS / "images" / name).write_text(drawn, "utf-8")


def figures() -> dict[str, str]:
    """SVG by the name of its file."""
    page, text = PAGE.read_text("utf-8"), (DOCS / "adaponderlm.md").read_text("utf-8")
    return {
        "programs.svg": _programs(table(page, "thousand FLOPs per token")),
        "expressions.svg": _programs(_chosen(table(page, "mean of brackets"))),
        "needed.svg": _needed(table(page, "used 1")),
        "text.svg": _text(table(text, "minus best fixed depths")),
    }


def table(page: str, column: str) -> list[list[str]]:
    """The rows of the first table of a Markdown page that has this column; cells without marks and units."""
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and column in line) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[re.sub(r"[*`×]| ±.*", "", cell).strip() for cell in line.split("|")[1:-1]] for line in lines[start:end]]


def _chosen(rows: list[list[str]]) -> list[list[str]]:
    """Those to show, without the column that the other table does not have."""
    return [[*row[:3], *row[4:]] for row in rows if row[0] in CHOSEN or row[0].startswith(GATELESS)]


def _programs(rows: list[list[str]]) -> str:
    """Those that are nearly always right, and the models whose depth needs no gate."""
    places = {name: (float(cost), 100 - float(right)) for name, right, _, cost, *_ in rows}
    near = {name: place for name, place in places.items() if place[1] < WORST and "needed" not in name}
    points = {name: place for name, place in near.items() if not name.startswith(GATELESS)}
    lines = {}
    for start, said in zip(GATELESS, ("one fixed depth each", "at most one depth, by place"), strict=True):
        at = tuple(zip(*(place for name, place in places.items() if name.startswith(start)), strict=True))
        lines[said] = (at[0], at[1])
    return viz.svg(viz.plot_frontier(points, lines, x="thousand FLOPs per token", y="wrong, %"))


def _needed(rows: list[list[str]]) -> str:
    shares = torch.tensor([[round(float(share or 0)) for share in row[1:]] for row in rows])  # of 100 tokens
    depths = torch.arange(1, len(shares) + 1)
    needed, used = torch.cartesian_prod(depths, depths).unbind(1)
    each = shares.flatten()
    return viz.svg(viz.plot_needed(needed.repeat_interleave(each), used.repeat_interleave(each), len(shares)))


def _text(rows: list[list[str]]) -> str:
    places = {name.partition(",")[0]: (float(cost), float(loss)) for name, loss, _, cost, *_ in rows}
    lines = {}
    for kind, said in (("fixed", "one fixed depth"), ("told", "one fixed depth, told the letters")):
        at = tuple(zip(*(place for name, place in places.items() if re.fullmatch(rf"{kind}-[2-4]", name)), strict=True))
        lines[said] = (at[0], at[1])
    points = {said: places[name] for name, said in TEXT.items()}
    return viz.svg(viz.plot_frontier(points, lines, x="FLOPs, in passes of one iteration", y="loss, nats per byte"))


if __name__ == "__main__":
    main()
