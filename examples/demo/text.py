"""Real text as bytes: where it comes from, what is held out, and windows of it."""

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Tests are not prose and `encodings` are tables, near copies of each other: held out, they would be known already.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
EVERY = 16  # of the library's files, one in this many is held out
TENTH = 10  # of any other text, the last part of this size
CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f") | {127})


class BadInput(ValueError):
    """What cannot be trained on; the message is one line for the user."""


class Text(NamedTuple):
    """Bytes to train on and bytes held out, each `(n,)` uint8, and in words where they come from."""

    train: Tensor
    held_out: Tensor
    source: str


def stdlib_files() -> tuple[list[Path], list[Path]]:
    """Python's standard library: the files to train on and those held out, whole files, always the same."""
    paths: list[Path] = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(set(folders) - LEFT_OUT)
        paths += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    held_out = paths[EVERY - 1 :: EVERY]
    return [path for i, path in enumerate(paths) if (i + 1) % EVERY], held_out


def stdlib_text(window: int) -> Text:
    """The sources and documentation strings of the standard library, which every machine has."""
    train, held_out = ([_read(path) for path in paths] for paths in stdlib_files())
    if not train or not held_out:
        raise BadInput("this Python has no library sources to train on; give a text of your own: --text FILE")
    source = f"Python's standard library, {len(train)} files, {len(held_out)} more held out"
    return _text(b"".join(train), b"".join(held_out), source, window)


def file_text(paths: Sequence[Path], window: int) -> Text:
    """Any files, one after the other, with the last tenth of the whole held out."""
    data = b"".join(_read(path) for path in paths)
    cut = len(data) - len(data) // TENTH
    source = f"{', '.join(path.name for path in paths)}, the last tenth held out"
    return _text(data[:cut], data[cut:], source, window)


def random_windows(data: Tensor, count: int, window: int, generator: torch.Generator) -> Tensor:
    """Random windows and the byte after each: `(count, window + 1)` int64."""
    starts = torch.randint(len(data) - window, (count, 1), generator=generator)
    return data[starts + torch.arange(window + 1)].long()


def even_windows(data: Tensor, count: int, window: int) -> Tensor:
    """At most `count` windows that do not overlap, spread over the data: `(n, window + 1)` int64."""
    there = (len(data) - 1) // window
    starts = torch.arange(min(count, there)) * there // min(count, there) * window
    return data[starts.unsqueeze(1) + torch.arange(window + 1)].long()


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    strange = len(data) - len(data.translate(None, CONTROL))
    if strange > len(data) // 1000:
        raise BadInput(f"{path} is not text: {strange:,} of its {len(data):,} bytes are control characters")
    return data


def _text(train: bytes, held_out: bytes, source: str, window: int) -> Text:
    total, least = len(train) + len(held_out), TENTH * (2 * window + 1)
    if total == 0:
        raise BadInput("the text is empty")
    if min(len(train), len(held_out)) <= 2 * window:  # one window has no spread
        raise BadInput(
            f"the text is too short: {total:,} bytes, expected at least {least:,}, so that the part held out fills two "
            f"windows of {window} bytes"
        )
    return Text(_bytes(train), _bytes(held_out), source)


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
