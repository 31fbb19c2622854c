"""Text as windows of tokens: what is trained on, what thresholds are fitted on, and what models are judged on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
EVERY = 4  # of the repository's files, one in this many is held out
TENTH = 10  # of any other text, the last part of this size


class BadInput(ValueError):
    """What cannot be run; the message is one line for the user."""


class Prose(NamedTuple):
    """Texts to train on and texts held out, and in words where they come from."""

    train: list[str]
    held_out: list[str]
    source: str


class Windows(NamedTuple):
    """Windows of tokens, each `(n, window)` int64. `fitted` and `judged` are held out, spread over one text."""

    train: Tensor
    fitted: Tensor
    judged: Tensor


def repository() -> Prose:
    """The prose of this repository, in whole files."""
    paths = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    texts = [path.read_text("utf-8") for path in paths]
    train = [text for i, text in enumerate(texts) if (i + 1) % EVERY]
    held_out = texts[EVERY - 1 :: EVERY]
    return Prose(train, held_out, f"this repository's documentation, {len(train)} files, {len(held_out)} more held out")


def files(paths: Sequence[Path]) -> Prose:
    """Any files, one after the other, with the last tenth of the whole held out."""
    try:
        whole = "\n".join(path.read_text("utf-8") for path in paths)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the text: {error}") from None
    cut = len(whole) - len(whole) // TENTH
    source = f"{', '.join(path.name for path in paths)}, the last tenth held out"
    return Prose([whole[:cut]], [whole[cut:]], source)


def windows_of(prose: Prose, tokenizer: Any, window: int, fitted: int, judged: int) -> Windows:
    """All windows to train on, and of what is held out `fitted` and `judged` of them, evenly spread."""
    train, held_out = (_windows(texts, tokenizer, window) for texts in (prose.train, prose.held_out))
    if len(train) < 2 or len(held_out) < fitted + judged:
        raise BadInput(
            f"the text is too short: expected at least 2 windows of {window} tokens to train on and {fitted + judged} "
            f"held out, got {len(train)} and {len(held_out)}"
        )
    chosen = held_out[torch.arange(fitted + judged) * len(held_out) // (fitted + judged)]
    to_fit = torch.zeros(len(chosen), dtype=torch.bool)
    to_fit[torch.arange(fitted) * len(chosen) // fitted] = True
    return Windows(train, chosen[to_fit], chosen[~to_fit])


def _windows(texts: Sequence[str], tokenizer: Any, window: int) -> Tensor:
    """All whole windows of the texts, one text after the other."""
    ids = torch.tensor([id for text in texts for id in tokenizer(text)["input_ids"]])
    return ids[: len(ids) // window * window].view(-1, window)
