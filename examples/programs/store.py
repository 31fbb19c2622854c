"""Results of one seed in a folder, each in a file of its own, so that an interrupted study goes on where it was."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor


class OtherSettings(ValueError):
    """What is there was made with other settings; the message is one line for the user."""


class Row(NamedTuple):
    """A line of the table: a model and its exits on the sequences it is judged on.

    `accuracy` and `loss`, in nats, are those of the tokens that count; `depth` and `flops` are means over all tokens.
    `rank` is Spearman's correlation of needed and used depth, None where all tokens go equally deep; `tau` the
    threshold, where one was fitted. `right[n - 1]` is the accuracy of tokens that need n iterations, None where there
    are none. `matrix[n - 1][u - 1]` counts those that needed n and used u; `shown` are the depths of the first
    sequences.
    """

    name: str
    accuracy: float
    loss: float
    depth: float
    flops: float
    rank: float | None
    tau: float | None
    right: list[float | None]
    matrix: list[list[int]]
    shown: list[list[int]]


@final
class Store:
    """Rows, weights and times of one seed, with the settings they were made with.

    Raises: `OtherSettings` for a file of others.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings))

    def row(self, name: str) -> Row | None:
        """The row of this name, None if it is not there yet."""
        found = self._read(self._file(name, ".json"), "row")
        return None if found is None else Row(**found)

    def keep_row(self, row: Row) -> None:
        """Write a row."""
        self._write(self._file(row.name, ".json"), "row", row._asdict())

    def seconds(self) -> dict[str, float] | None:
        """Seconds per 1,000 sequences of each row that is timed."""
        found: dict[str, float] | None = self._read(self.folder / "seconds.json", "seconds")
        return found

    def keep_seconds(self, seconds: Mapping[str, float]) -> None:
        """Write the times."""
        self._write(self.folder / "seconds.json", "seconds", dict(seconds))

    def weights(self, name: str) -> dict[str, Tensor] | None:
        """The weights of a model that was trained."""
        path = self._file(name, ".pt")
        if not path.exists():
            return None
        found = torch.load(path)
        self._check(path, json.loads(found["settings"]))
        weights: dict[str, Tensor] = found["weights"]
        return weights

    def keep_weights(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Write the weights of a model."""
        path, part = self._file(name, ".pt"), self._file(name, ".part")
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save({"settings": json.dumps(self.settings), "weights": dict(weights)}, part)
        part.replace(path)

    def _file(self, name: str, ending: str) -> Path:
        return self.folder / (re.sub(r"\W+", "-", name.lower()).strip("-") + ending)

    def _read(self, path: Path, what: str) -> Any:
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        self._check(path, found["settings"])
        return found[what]

    def _write(self, path: Path, what: str, content: object) -> None:
        """Whole or not at all: what is interrupted is not read later."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"settings": self.settings, what: content}, indent=1), encoding="utf-8")
        part.replace(path)

    def _check(self, path: Path, found: Mapping[str, Any]) -> None:
        for key in [*self.settings, *found]:
            mine, its = self.settings.get(key), found.get(key)
            if mine != its:
                raise OtherSettings(
                    f"{path} was made with {key} {its}, this run has {mine}. Give it another --out, or remove the file."
                )
