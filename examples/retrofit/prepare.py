"""What all models share: windows of tokens, and which layers are looped. Made once, and kept in the folder."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adadepth import viz

from .model import RANK, even_layers, load, tokenizer_of
from .text import Prose, Windows, windows_of
from .train import AGAIN, EARLIER, OPEN, RATES, Plan


class Prepared(NamedTuple):
    """The windows, the looped layers (the first, and one past the last), and the pieces of the window that is shown.

    `mark` differs for other text, another model and other settings: results of one mark belong together.
    """

    windows: Windows
    layers: tuple[int, int]
    pieces: list[str]
    mark: str


def prepare(out: Path, base: str | None, prose: Prose, plan: Plan, layers: Sequence[int] | None) -> Prepared:
    """Read it from the folder, or make it and keep it there."""
    asked = json.dumps([base, prose, plan, layers, RATES, OPEN, EARLIER, AGAIN, RANK])
    kept = read(out)
    if kept is not None and kept[0] == asked:
        return kept[1]
    tokenizer = tokenizer_of(base)
    windows = windows_of(prose, tokenizer, plan.window, plan.fitted, plan.judged)
    first, last = layers or even_layers(load(base), windows.train[:2])
    mark = hashlib.sha256(asked.encode()).hexdigest()[:12]
    made = Prepared(windows, (first, last), viz.pieces(tokenizer.decode, windows.judged[0]), mark)
    torch.save({"asked": asked, "windows": tuple(windows), "rest": made[1:]}, out / "prepared.pt")
    return made


def read(out: Path) -> tuple[str, Prepared] | None:
    """What is kept in the folder, and of what it was made."""
    path = out / "prepared.pt"
    if not path.exists():
        return None
    kept: dict[str, Any] = torch.load(path)
    return kept["asked"], Prepared(Windows(*kept["windows"]), *kept["rest"])
