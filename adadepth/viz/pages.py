"""A self-contained HTML page, light or dark like the reader's system, and readable on a narrow screen."""

import re
from collections.abc import Sequence
from html import escape

from .colours import CARD, INK, MUTED, PAPER, RULE, both

Cell = str | int | float

_NUMBER = re.compile(r"[^A-Za-z]*\d[^A-Za-z]*[a-z]{0,2}|[–—-]?")  # 3.6×, +0.002 ± 0.001, 0.31 s; or nothing
_STYLE = f"""
:root{{color-scheme:light dark;background:{both(PAPER)};color:{both(INK)}}}
body{{max-width:960px;margin:0 auto;padding:1.5rem 1rem 3rem;font:1rem/1.55 system-ui,sans-serif;\
overflow-wrap:break-word}}
h1{{margin:0 0 1rem;font-size:1.7rem;line-height:1.25}}
h2{{margin:2.2rem 0 .6rem;font-size:1.2rem}}
p{{margin:.5rem 0;max-width:75ch}}
svg{{box-sizing:border-box;width:max(50% - .75rem,min(100%,26rem));margin:.4rem .5rem .4rem 0;vertical-align:top;\
border:1px solid {both(RULE)};border-radius:6px;background:{both(CARD)}}}
.table{{overflow-x:auto;margin:.6rem 0}}
table{{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}}
th,td{{padding:.3rem .8rem .3rem 0;text-align:left;border-bottom:1px solid {both(RULE)}}}
td:first-child{{min-width:7rem}}
th{{color:{both(MUTED)};font-weight:600;vertical-align:bottom}}
.number{{padding:.3rem 0 .3rem 1.3rem;text-align:right;white-space:nowrap}}
@media(max-width:480px){{table{{font-size:.78rem}}td:first-child{{min-width:4.5rem}}th{{white-space:normal}}\
th,td{{padding-right:.3rem}}.number{{padding-left:.45rem;white-space:normal}}}}
"""


def page(title: str, *sections: tuple[str, str]) -> str:
    """A complete HTML document. It loads nothing from the network and runs no script.

    Arguments: `title`, plain text; `sections`, each a heading in plain text, "" for none, and a fragment of HTML
    from `heat_map`, `svg`, `table`, or your own. Figures that follow each other are side by side if there is room.
    """
    parts = [f"<h2>{escape(heading)}</h2>\n{html}" if heading else html for heading, html in sections]
    body = "\n".join(f"<section>\n{part}\n</section>" for part in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table in HTML, with plain text in each cell. Numbers are aligned right. On a narrow screen it scrolls.

    Arguments: `columns`, the headings; `rows`, each with one cell for each column. A float is written with four
    decimals; for another format, pass text.
    Raises: `ValueError` if a row does not have one cell for each column.
    """
    for i, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(
                f"table expected {len(columns)} cells in each row, one for each column, got {len(row)} in row {i}."
            )
    texts = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    numbers = [all(_NUMBER.fullmatch(text) for text in column) for column in zip(*texts, strict=True)]
    head = _cells("th", columns, numbers or [False] * len(columns))
    body = "\n".join(_cells("td", row, numbers) for row in texts)
    return f'<div class="table"><table>\n<thead>\n{head}\n</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n'


def _cells(tag: str, texts: Sequence[str], numbers: Sequence[bool]) -> str:
    opened = (f'<{tag} class="number">' if number else f"<{tag}>" for number in numbers)
    return "<tr>" + "".join(f"{a}{escape(text)}</{tag}>" for a, text in zip(opened, texts, strict=True)) + "</tr>"
