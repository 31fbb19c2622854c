"""One model: trained, then judged on held-out puzzles. What is done is kept in a file, so that a run can be resumed."""

import json
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .model import Solver
from .task import Puzzles, make
from .train import Stream, always, explore, train

SEGMENTS = 8  # the most
FIXED = (1, 2, 4, 8)
BLANKS = {4: (6, 8, 10), 6: (12, 16, 20)}


class Plan(NamedTuple):
    """Steps of training, puzzles to train on, held-out puzzles, and passes that are timed."""

    steps: int
    puzzles: int
    judged: int
    timed: int = 5


FULL = {4: Plan(1000, 6000, 600), 6: Plan(2400, 12000, 600)}
QUICK = {4: Plan(3, 20, 12, 1), 6: Plan(3, 20, 12, 1)}


class Job(NamedTuple):
    """A model to train: `fixed` segments for every puzzle, or 0 for halting."""

    size: int
    fixed: int
    seed: int
    plan: Plan


class Judged(NamedTuple):
    """Held-out puzzles: the share that is solved, mean segments and milliseconds a puzzle; two also by blanks."""

    solved: float
    segments: float
    milliseconds: float
    solved_by_blanks: list[float]
    segments_by_blanks: list[float]


Result = dict[str, Judged]  # by how the segments were chosen: "halting", or their number


def run(job: Job) -> Result:
    """Train the model of a job, and judge it; a model that halts also with its segments held."""
    torch.set_num_threads(1)
    puzzles = make(job.size, BLANKS[job.size], job.plan.judged + job.plan.puzzles, job.seed)
    held_out, others = puzzles.at(slice(job.plan.judged)), puzzles.at(slice(job.plan.judged, None))
    torch.manual_seed(job.seed)
    model, most = Solver(job.size, SEGMENTS), job.fixed or SEGMENTS
    stream = Stream(model, others, partial(always if job.fixed else explore, most), job.seed)
    train(model, stream, most, job.plan.steps)
    if job.fixed:
        return {str(job.fixed): judge(model, held_out, job.fixed, job.fixed, job.plan.timed)}
    held = {str(k): judge(model, held_out, k, k, job.plan.timed) for k in FIXED}
    return {"halting": judge(model, held_out, 1, SEGMENTS, job.plan.timed), **held}


@torch.inference_mode()
def judge(model: Solver, puzzles: Puzzles, least: int, most: int, timed: int) -> Judged:
    """All puzzles in one batch."""
    model.eval()
    seconds = []
    for _ in range(timed):
        start = time.perf_counter()
        out = model(puzzles.clues, model.start(len(puzzles.clues)), least, most)
        seconds.append(time.perf_counter() - start)
    solved = (model.logits(out).argmax(-1) + 1 == puzzles.answers).all(1).double()
    segments = out.trace.depth[:, 0].double()
    blanks = (puzzles.clues == 0).sum(1)

    def by_blanks(values: Tensor) -> list[float]:
        return [values[blanks == number].mean().item() for number in blanks.unique()]

    per_puzzle = 1000 * median(seconds) / len(blanks)
    return Judged(solved.mean().item(), segments.mean().item(), per_puzzle, by_blanks(solved), by_blanks(segments))


def run_all(jobs: list[Job], kept: Path, processes: int) -> Iterator[tuple[Job, Result]]:
    """The results of jobs, as they are done; those in the file are not run again."""
    done = read(kept)
    yield from ((job, done[job]) for job in jobs if job in done)
    for job, result in _run([job for job in jobs if job not in done], processes):
        with kept.open("a") as file:
            file.write(json.dumps([job, result]) + "\n")
        yield job, result


def _run(jobs: list[Job], processes: int) -> Iterator[tuple[Job, Result]]:
    if processes == 1:
        yield from map(_named, jobs)
        return
    with get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(_named, jobs)


def _named(job: Job) -> tuple[Job, Result]:
    return job, run(job)


def read(kept: Path) -> dict[Job, Result]:
    """What a file holds; nothing if there is none."""
    lines = kept.read_text().splitlines() if kept.exists() else []
    return dict(_parsed(*json.loads(line)) for line in lines)


def _parsed(job: list[Any], result: dict[str, Any]) -> tuple[Job, Result]:
    size, fixed, seed, plan = job
    return Job(size, fixed, seed, Plan(*plan)), {name: Judged(*judged) for name, judged in result.items()}
