"""The trainings of one demonstration, side by side in processes of one thread each.

Fixed depths are trained separately, from the same weights on the same batches. The adaptive model and the deepest
fixed one share their first stage, which is trained once.
"""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adadepth.diagnostics import Measured, Score, measure

from . import known
from .exits import policy
from .model import AdaptiveLM, Shape
from .text import Text
from .train import Progress, Recipe, Training, nll

BATCH = 32
EXITS = "exits"
TRUNK = "first stage"


class Setup(NamedTuple):
    """What all jobs have in common. `folder` holds the text, and gets what the jobs make."""

    shape: Shape
    recipe: Recipe
    seed: int
    policy: str
    folder: Path

    @property
    def deepest(self) -> str:
        return fixed_name(self.shape.steps)


class Trained(NamedTuple):
    """A model in eval mode, how it came there, and for a fixed depth its losses on the held-out windows."""

    model: AdaptiveLM
    history: list[Progress]
    measured: Measured | None


class Shared(NamedTuple):
    """What a process has of the others: where it tells its progress, and whether it is to stop."""

    progress: Any
    stop: Any


_shared: list[Shared] = []


def fixed_name(depth: int) -> str:
    return f"fixed {depth}"


def score_with(model: AdaptiveLM) -> Score:
    """For adadepth's diagnostics: losses and depths of windows `(rows, window + 1)`."""

    def score(windows: Tensor, **depths: Any) -> tuple[Tensor, Tensor]:
        prediction = model(windows[:, :-1], **depths)
        return nll(prediction.logits, windows[:, 1:]), prediction.trace.depth

    return score


def train_all(setup: Setup, text: Text, windows: Tensor, workers: int) -> Iterator[tuple[str, Progress]]:
    """Run all jobs, and yield what they tell; each leaves a file that `load` reads.

    An interrupt makes the jobs that run end early, with what they have, and is raised again once they have.
    """
    torch.save((text, windows), setup.folder / "text.pt")
    context = get_context("spawn")
    shared = Shared(context.Queue(), context.Event())
    todo = [TRUNK, *(fixed_name(depth) for depth in range(setup.shape.steps - 1, 0, -1)), *known.NAMES]
    with ProcessPoolExecutor(workers, context, _start, shared) as pool:
        try:
            yield from _run_all(setup, todo, workers, pool, shared)
        finally:
            shared.stop.set()


def _run_all(
    setup: Setup, todo: list[str], workers: int, pool: ProcessPoolExecutor, shared: Shared
) -> Iterator[tuple[str, Progress]]:
    running: dict[Future[None], str] = {}
    interrupted = False
    while todo or running:
        try:
            while todo and len(running) < workers:
                name = todo.pop(0)
                with _deaf():  # this may start a process
                    running[pool.submit(_run, setup, name)] = name
            done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            while not shared.progress.empty():
                yield shared.progress.get()
            for job in done:
                name = running.pop(job)
                job.result()
                if name == TRUNK and not interrupted:
                    todo[:0] = [EXITS, setup.deepest]
        except KeyboardInterrupt:
            interrupted = True
            todo.clear()
            shared.stop.set()
    if interrupted:
        raise KeyboardInterrupt


def load(setup: Setup) -> dict[str, Trained]:
    """What the jobs that ended left, by name."""
    names = [EXITS, TRUNK, *(fixed_name(depth) for depth in range(1, setup.shape.steps + 1))]
    paths = {name: _path(setup, name) for name in names}
    return {name: torch.load(path, weights_only=False) for name, path in paths.items() if path.exists()}


@contextmanager
def _deaf() -> Iterator[None]:
    """An interrupt waits for a moment, and never reaches processes that are started in it: they inherit the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(progress: Any, stop: Any) -> None:
    torch.set_num_threads(1)
    _shared[:] = [Shared(progress, stop)]


def load_known(setup: Setup) -> dict[str, known.Known]:
    """What was trained on programs to the end, by name."""
    paths = {name: _path(setup, name) for name in known.NAMES}
    return {name: torch.load(path, weights_only=False) for name, path in paths.items() if path.exists()}


def _run(setup: Setup, name: str) -> None:
    if name in known.NAMES:
        return _run_known(setup, name)
    text, windows = torch.load(setup.folder / "text.pt", weights_only=False)
    training, recipe, history = Training(setup.shape, setup.recipe, setup.seed), setup.recipe, list[Progress]()
    if name in (EXITS, setup.deepest):
        training.resume(setup.folder / "trunk.pt")
        history += torch.load(_path(setup, TRUNK), weights_only=False).history
    depth = None if name == EXITS else setup.shape.steps if name == TRUNK else int(name.split()[-1])
    step = _step(training, text.train, setup, depth)
    last = recipe.first if name == TRUNK else recipe.steps
    while training.step < last and not _shared[0].stop.is_set():
        history.append(step())
        if training.step % 5 == 0 or training.step == last:
            _shared[0].progress.put((name, history[-1]))
    if name == TRUNK:
        training.save(setup.folder / "trunk.pt")
    model = training.model.eval()
    fixed = depth is not None and name != TRUNK and not _shared[0].stop.is_set()
    measured = measure(score_with(model), windows.split(BATCH), min_depth=depth, max_depth=depth) if fixed else None
    torch.save(Trained(model, history, measured), _path(setup, name))


def _run_known(setup: Setup, name: str) -> None:
    model, history, steps = known.begin(setup.seed), list[Progress](), setup.recipe.programs
    for now in known.train(name, steps, setup.seed, model):
        history.append(now)
        if now.step % 5 == 0 or now.step == sum(steps):
            _shared[0].progress.put((name, now))
        if _shared[0].stop.is_set():
            return
    torch.save(known.Known(history, known.judge(name, setup.seed, model)), _path(setup, name))


def _step(training: Training, data: Tensor, setup: Setup, depth: int | None) -> Callable[[], Progress]:
    if depth is not None:
        return lambda: training.fixed(data, depth)
    exits = policy(setup.policy)
    training.begin(exits, data)
    return lambda: training.adaptive(data, exits)


def _path(setup: Setup, name: str) -> Path:
    return setup.folder / f"{name.replace(',', '').replace(' ', '-')}.pt"
