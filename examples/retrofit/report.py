"""What a reader sees: one table, differences from the model without a loop, and a passage coloured by depth."""

from collections.abc import Mapping, Sequence
from html import escape
from statistics import mean

import torch

from adadepth import viz

from ..figures import spread
from .model import GATES, PLAIN
from .study import Row

COLUMNS = ("", "nats", "less LoRA", "depth", "FLOPs", "prefill", "decode")
LEGEND = (
    "nats: mean loss per held-out token. less LoRA: the difference from the same LoRA, windows and steps without a "
    "loop, paired over seeds, with its standard error. depth: mean iterations of the looped layers. FLOPs: 1 is one "
    "pass of the model without a loop. prefill, decode: milliseconds a token, the models of the first seed in turn, "
    "LoRA merged. gates: one model, a loop with gates, and what decides its depth in use."
)

Seeds = Sequence[Mapping[str, Row]]  # of each seed its rows, by name
Times = Mapping[str, Mapping[str, float]]


def lines(seeds: Seeds, times: Times) -> list[list[str]]:
    """The cells of the table. `times` are of the models as they are used."""
    names = [name for name in seeds[0] if all(name in rows for rows in seeds)]
    return [_line(name, seeds, times) for name in names]


def _line(name: str, seeds: Seeds, times: Times) -> list[str]:
    rows = [rows[name] for rows in seeds]
    differences = [row.loss - rows[PLAIN.name].loss for row, rows in zip(rows, seeds, strict=True)]
    timed = times.get(USED.get(name, name), {})
    return [
        name,
        f"{mean(row.loss for row in rows):.4f}",
        "" if name == PLAIN.name else spread(differences, ".4f"),
        f"{mean(row.depth for row in rows):.2f}",
        f"{mean(row.flops for row in rows):.2f}",
        *(f"{timed[what]:.1f}" if what in timed else "" for what in ("prefill", "decode")),
    ]


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
