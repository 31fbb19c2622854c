"""Checkpoints that are there whole or not at all, whenever a run is killed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, final

from accelerate import Accelerator

PART = ".part"  # what is being written, or removed


@final
class Checkpoints:
    """The newest `keep` checkpoints of a run, in folders `step-00000100`.

    A folder is written under another name and then renamed, which happens or does not; it is removed the same way.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int) -> None:
        self.folder, self.accelerator, self.keep = folder, accelerator, keep

    def steps(self) -> list[int]:
        """The steps of training after which there is a checkpoint, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-????????"))

    def path(self, step: int) -> Path:
        """Where the checkpoint after `step` steps is."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, more: dict[str, Any]) -> None:
        """Weights, optimiser and random states of all ranks, and `more`, the first rank's, as JSON."""
        part = self.folder / f"{self.path(step).name}{PART}"
        first = self.accelerator.is_main_process
        if first:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part))
        if first:
            (part / "more.json").write_text(json.dumps(more))
        self.accelerator.wait_for_everyone()
        if first:
            _sync(part)
            os.replace(part, self.path(step))
            for old in self.steps()[: -self.keep]:
                remove(self.path(old))
        self.accelerator.wait_for_everyone()

    def load(self, step: int) -> dict[str, Any]:
        """Put back what was saved, and return `more`."""
        self.accelerator.load_state(str(self.path(step)))
        more: dict[str, Any] = json.loads((self.path(step) / "more.json").read_text())
        return more


def remove(path: Path) -> None:
    """A folder, never leaving half of it under its name."""
    gone = path.with_name(f"{path.name}.gone{PART}")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)


def replace(part: Path, path: Path) -> None:
    """A file or folder that is complete takes the place it was written for."""
    _sync(part)
    if path.is_dir():
        remove(path)
    os.replace(part, path)


def _sync(path: Path) -> None:
    """What was written reaches the disk before its name does."""
    for each in [path, *path.rglob("*")]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
