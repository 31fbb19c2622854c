"""One model: trained, then judged on held-out puzzles."""

import time
from functools import partial
from statistics import median
from typing import NamedTuple

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
