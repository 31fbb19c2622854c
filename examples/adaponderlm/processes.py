"""Commands run side by side, in order of what waits for them, with a bar for each that runs."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

SECONDS = 0.5  # between two looks at what runs
LOG = "log.txt"


class Now(NamedTuple):
    """How far a command is: `done` of `total`, and what it says of itself."""

    done: int
    total: int
    said: str = ""


@dataclass
class Job:
    """A command that is to be run once, by its `name`, in `folder`, where its output goes to `log.txt`.

    `finished` says whether there is nothing to do; `now`, how far it is; `after`, the name of what must be finished
    before; `weight`, about how long it takes, in any unit.
    """

    name: str
    command: Sequence[str]
    folder: Path
    finished: Callable[[], bool]
    now: Callable[[], Now]
    after: str | None = None
    weight: float = 1.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)


def run_all(jobs: Sequence[Job], processes: int, console: Console) -> dict[str, str]:
    """Run what is not finished, `processes` at a time; returns what failed, by name, and its last words.

    What others wait for goes first, then what takes long. On an interrupt everything that runs is ended.
    """
    by_name = {job.name: job for job in jobs}
    waiting = sorted((job for job in jobs if not job.finished()), key=lambda job: -_urgency(job, jobs))
    running: list[Job] = []
    failed: dict[str, str] = {}
    with _bars(console, len(jobs), len(jobs) - len(waiting)) as bars, _ended(running):
        while waiting or running:
            for job in [job for job in waiting if job.after in failed]:
                waiting.remove(job)
                failed[job.name] = f"needs {job.after}"
            ready = [job for job in waiting if job.after is None or by_name[job.after].finished()]
            for job in ready[: processes - len(running)]:
                waiting.remove(job)
                running.append(_start(job))
            if not running and not ready and waiting:
                raise ValueError(f"{waiting[0].name} waits for {waiting[0].after}, which does not come")
            time.sleep(SECONDS if running else 0)
            for job in running:
                bars.show(job)
            for job in list(running):
                if job.process is None or (code := job.process.poll()) is None:
                    continue
                running.remove(job)
                if code or not job.finished():
                    failed[job.name] = _last_words(job)
                bars.end(job, failed.get(job.name))
    return failed


def _urgency(job: Job, jobs: Sequence[Job]) -> float:
    """How much work hangs on it: its own and that of the longest chain behind it, with what others need far first."""
    behind = [other for other in jobs if other.after == job.name]
    return job.weight + sum(_urgency(other, jobs) for other in behind)


def _start(job: Job) -> Job:
    job.folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (job.folder / LOG).open("ab") as log:
        job.process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    return job


def _last_words(job: Job) -> str:
    lines = (job.folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    code = None if job.process is None else job.process.returncode
    return f"{lines[-1].strip()} (exit status {code}; all of it is in {job.folder / LOG})"


@contextmanager
def _ended(running: list[Job]) -> Iterator[None]:
    """Nothing that was started outlives the block."""
    try:
        yield
    finally:
        started = [job.process for job in running if job.process is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


@final
class _Bars:
    def __init__(self, progress: Progress, total: TaskID) -> None:
        self.progress, self.total = progress, total
        self.tasks: dict[str, TaskID] = {}

    def show(self, job: Job) -> None:
        now = job.now()
        if job.name not in self.tasks:
            self.tasks[job.name] = self.progress.add_task(job.name, said="")
        self.progress.update(self.tasks[job.name], completed=now.done, total=now.total, said=now.said)

    def end(self, job: Job, failure: str | None) -> None:
        task = self.tasks.pop(job.name, None)
        if task is not None:
            self.progress.remove_task(task)
        self.progress.advance(self.total)
        said = job.now().said if failure is None else f"failed: {failure}"
        self.progress.console.print(f"{job.name}: {said or 'done'}", soft_wrap=True)


@contextmanager
def _bars(console: Console, total: int, done: int) -> Iterator[_Bars]:
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.completed}/{task.total}")
    with Progress(*columns, TextColumn("{task.fields[said]}"), TimeElapsedColumn(), console=console) as progress:
        yield _Bars(progress, progress.add_task("all", total=total, completed=done, said=""))


def python(file: str, *arguments: str) -> list[str]:
    """The command that runs one of our files."""
    return [sys.executable, str(Path(__file__).parent / file), *arguments]
