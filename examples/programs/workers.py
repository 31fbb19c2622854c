"""Units of work in processes of their own, one thread each; what they say comes back as it is said."""

import multiprocessing
import signal
from collections.abc import Generator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import NamedTuple

import torch

from .plan import Plan
from .store import Row
from .study import Now, store_of, units, work
from .tasks import TASKS

Unit = tuple[int, str]  # a seed, and what is to be done of it


class Failed(RuntimeError):
    """A process ended before its unit was done; the message is one line for the user."""


class Job(NamedTuple):
    """What all units share: the task's name, the plan, and where results go."""

    task: str
    plan: Plan
    out: Path


def run(job: Job, seeds: Sequence[int], processes: int) -> Generator[tuple[int, Now | Row]]:
    """All units, one seed after the other as far as units need each other. Ends its processes when it is closed.

    Raises: `Failed` if a process ends.
    """
    after = units(TASKS[job.task])
    waiting, done = [(seed, name) for seed in seeds for name in after], set[Unit]()
    pool = dict(_start(job) for _ in range(processes))
    busy: dict[Connection, Unit] = {}
    try:
        while waiting or busy:
            for connection in pool.keys() - busy.keys():
                if unit := next((unit for unit in waiting if _ready(unit, after, done)), None):
                    waiting.remove(unit)
                    connection.send(unit)
                    busy[connection] = unit
            for connection in [each for each in wait(list(busy)) if isinstance(each, Connection)]:
                message = _receive(connection, pool[connection], busy[connection])
                if message is None:
                    done.add(busy.pop(connection))
                else:
                    yield busy[connection][0], message
    finally:
        for process in pool.values():
            process.terminate()
            process.join()


def _ready(unit: Unit, after: Mapping[str, set[str]], done: set[Unit]) -> bool:
    seed, name = unit
    return all((seed, before) in done for before in after[name])


def _start(job: Job) -> tuple[Connection, SpawnProcess]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(job, there))
    process.start()
    there.close()  # the worker's alone, so that its end is seen
    return here, process


def _receive(connection: Connection, process: SpawnProcess, unit: Unit) -> Now | Row | None:
    try:
        message: Now | Row | None = connection.recv()
    except EOFError:
        process.join()
        seed, name = unit
        raise Failed(f"seed {seed}, {name} ended with exit code {process.exitcode}") from None
    return message


def _work(job: Job, connection: Connection) -> None:
    """Units as they are asked for; None says that one is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    torch.set_num_threads(1)
    task = TASKS[job.task]
    while True:
        seed, name = connection.recv()
        for message in work(task, seed, name, job.plan, store_of(job.out, task, seed, job.plan)):
            connection.send(message)
        connection.send(None)
