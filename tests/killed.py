"""A training that is killed, and started again, over and over.

`python tests/killed.py FOLDER KILLS SEED key=value ...` trains in processes of its own: once undisturbed, then killed
at `KILLS` random moments, then at chosen places of a checkpoint. What came of it is FOLDER/killed.json.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from narrow import the
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from examples.adaponderlm import checkpoints, train, trainer

torch.set_num_threads(1)
# Where a process ends, at the n-th call, and what it then leaves half done.
PLACES = [
    (dcp, "save", 2, "step-00000002.part"),
    (checkpoints, "_sync", 3, "step-00000001.part"),
    (os, "replace", 3, "step-00000002.part"),
    (shutil, "rmtree", 5, "step-00000001.gone.part"),
    (trainer, "replace", 2, "model.part"),
]


def start(work: Callable[[], None]) -> int:
    """A process that has imported everything, and nothing more."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        with open(os.devnull, "w") as quiet:
            os.dup2(quiet.fileno(), 1)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """The exit status, or less a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def curve(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def left(out: Path) -> dict[str, Any]:
    """What a kill left: the steps of checkpoints, what was half done, and whether every checkpoint is whole."""
    folders = sorted((out / "checkpoints").glob("step-????????"))
    return {
        "steps": [int(path.name[5:]) for path in folders],
        "parts": [path.name for path in out.rglob("*.part")],
        "whole": ended(start(lambda: all_read(folders))) == 0,
    }


def all_read(folders: list[Path]) -> None:
    for path in folders:
        read(path)


def read(path: Path) -> None:
    there = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    with checkpoints._alone():
        tensors = {name: the(TensorStorageMetadata, about) for name, about in there.items()}
        dcp.load({name: torch.empty(about.size) for name, about in tensors.items()}, checkpoint_id=path)
    json.loads((path / checkpoints.MORE).read_text())
    torch.load(path / "random-0.pt")


def die_at(holder: Any, name: str, count: int) -> None:
    calls, real = 0, getattr(holder, name)

    def called(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(holder, name, called)


def dies(holder: Any, name: str, count: int, work: Callable[[], None]) -> None:
    die_at(holder, name, count)
    work()


def main(folder: Path, kills: int, seed: int, values: list[str]) -> None:
    def trains(out: str) -> Callable[[], None]:
        return lambda: train.main(["--config", "tiny.yaml", *values, f"out={folder / out}"])

    assert ended(start(trains("warm"))) == 0  # tokens are in the cache now
    began = time.perf_counter()
    assert ended(start(trains("whole"))) == 0
    seconds, moments = time.perf_counter() - began, random.Random(seed)
    curves, out = {}, folder / "random"
    found: list[dict[str, Any]] = []
    while len(found) < kills:
        pid = start(trains("random"))
        time.sleep(moments.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        if (status := ended(pid)) == -signal.SIGKILL:
            found.append(left(out))
        else:  # it came to its end first, which only its status can say
            assert status == 0, status
            curves[f"before kill {len(found)}"] = curve(out)
            shutil.rmtree(out)
    assert ended(start(trains("random"))) == 0
    curves["random"] = curve(out)
    for holder, function, count, part in PLACES:
        name = f"{function}, {part}"
        assert ended(start(partial(dies, holder, function, count, trains(name)))) == -signal.SIGKILL
        found.append(left(folder / name))
        assert found[-1]["parts"] == [part], found[-1]
        assert ended(start(trains(name))) == 0
        curves[name] = curve(folder / name)
    said = {"whole": curve(folder / "whole"), "curves": curves, "kills": found, "seconds": seconds}
    (folder / "killed.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
