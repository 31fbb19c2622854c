"""Jobs in processes of their own, one thread each; what is done is kept in a file, so that a run can be resumed."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")


def run_all(run: Callable[[Job], Any], jobs: Sequence[Job], kept: Path, processes: int) -> Iterator[tuple[Job, Any]]:
    """Each job and its result as JSON has it, as they are done; those in the file `kept` are not run again.

    Arguments: `run`, which other processes can import; `jobs`, which JSON can write, no two alike.
    """
    done = read(kept)
    yield from ((job, done[key(job)]) for job in jobs if key(job) in done)
    for job, result in _run(run, [job for job in jobs if key(job) not in done], processes):
        line = json.dumps([job, result])
        with kept.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        yield job, json.loads(line)[1]


def read(kept: Path) -> dict[str, Any]:
    """What a file holds, by job; nothing if there is none."""
    lines = kept.read_text("utf-8").splitlines() if kept.exists() else []
    return {key(job): result for job, result in map(json.loads, lines)}


def key(job: object) -> str:
    """A job as JSON."""
    return json.dumps(job)


def _run(run: Callable[[Job], Any], jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Any]]:
    one = partial(_one, run)
    if processes == 1:
        yield from map(one, jobs)
        return
    with get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(one, jobs)
        pool.close()  # so that each process ends by itself, and clears up what it holds
        pool.join()


def _one(run: Callable[[Job], Any], job: Job) -> tuple[Job, Any]:
    torch.set_num_threads(1)
    return job, run(job)
