"""Seeds in processes of their own, one thread each; what they say comes back as it is said."""

import multiprocessing
import signal
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from .study import Now, Plan, Row, study


class Failed(RuntimeError):
    """A seed's process ended before it was done; the message is one line for the user."""


def run(seeds: Sequence[int], plan: Plan, processes: int) -> Generator[tuple[int, Now | Row]]:
    """All seeds, at most so many at a time. Ends its processes when it is closed."""
    context = multiprocessing.get_context("spawn")
    waiting = list(seeds)
    running: dict[Connection, tuple[int, SpawnProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(waiting[0], plan, there))
                process.start()
                there.close()  # the worker's alone, so that its end is seen
                running[here] = waiting.pop(0), process
            ready = wait(list(running))
            for connection in [each for each in running if each in ready]:
                seed, process = running[connection]
                try:
                    yield seed, connection.recv()
                except EOFError:
                    del running[connection]
                    process.join()
                    if process.exitcode:
                        raise Failed(f"seed {seed} ended with exit code {process.exitcode}") from None
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def _work(seed: int, plan: Plan, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    torch.set_num_threads(1)
    for message in study(seed, plan):
        connection.send(message)
