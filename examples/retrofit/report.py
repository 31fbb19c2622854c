"""What a reader sees: one table, differences from the model without a loop, and a passage coloured by depth."""

from collections.abc import Mapping, Sequence
from html import escape
from statistics import mean

import torch

from adadepth import viz

from ..figures import standard_error
from .model import GATES, PLAIN
from .study import Row

COLUMNS = ("", "nats", "less LoRA", "depth", "FLOPs", "prefill", "decode")
LEGEND = (
    "nats: mean loss per held-out token. less LoRA: the difference from the same LoRA, windows and steps without a "
    "loop, with the larger of its standard errors over windows and over seeds. depth: mean iterations of the looped "
    "layers. FLOPs: 1 is one pass of the layers without a loop; the head does not count. prefill, decode: milliseconds "
    "a token, the models of the first seed in turn, LoRA merged. gates: one model, a loop with gates, and what decides "
    "its depth in use."
)

Seeds = Sequence[Mapping[str, Row]]  # of each seed its rows, by name
Times = Mapping[str, Mapping[str, float]]


def lines(seeds: Seeds, times: Times) -> list[list[str]]:
    """The cells of the table. `times` are of the models as they are used."""
    names = [name for name in seeds[0] if all(name in rows for rows in seeds)]
    return [_line(name, seeds, times) for name in names]


def _line(name: str, seeds: Seeds, times: Times) -> list[str]:
    rows = [rows[name] for rows in seeds]
    differences = [_less(row, rows[PLAIN.name]) for row, rows in zip(rows, seeds, strict=True)]
    timed = times.get(USED.get(name, name), {})
    return [
        name,
        f"{mean(row.loss for row in rows):.4f}",
        "" if name == PLAIN.name else _paired(differences),
        f"{mean(row.depth for row in rows):.2f}",
        f"{mean(row.flops for row in rows):.2f}",
        *(f"{timed[what]:.1f}" if what in timed else "" for what in ("prefill", "decode")),
    ]


def _less(row: Row, other: Row) -> list[float]:
    """The difference of each window."""
    return [a - b for a, b in zip(row.losses, other.losses, strict=True)]


def _paired(differences: Sequence[list[float]]) -> str:
    """The mean over windows `(seeds, windows)`, and the larger of its standard errors."""
    over_windows = standard_error([mean(each) for each in zip(*differences, strict=True)])
    of_seeds = [mean(each) for each in differences]
    over_seeds = standard_error(of_seeds) if len(of_seeds) > 1 else 0.0
    return f"{mean(of_seeds):+.4f} ± {max(over_windows, over_seeds):.4f}"


USED = {"gates: exits, mean 2": GATES.name}  # the row whose model is timed


def page(source: str, seeds: Seeds, times: Times, shown: tuple[list[str], list[int]], note: str) -> str:
    """One HTML file, with the passage first: its pieces of text and their depths."""
    pieces, depth = shown
    heat = viz.heat_map(pieces, torch.tensor(depth), GATES.steps)
    return viz.page(
        "A pretrained model with its middle layers looped",
        ("", "".join(f"<p>{escape(part)}</p>" for part in (note, f"Text: {source}.") if part)),
        ("A held-out passage, coloured by the iterations that each token ran", heat),
        (f"All models (seeds: {len(seeds)})", viz.table(COLUMNS, lines(seeds, times)) + f"<p>{escape(LEGEND)}</p>"),
    )
