"""`python -m examples.programs`: where the depth that each token needs is known, does adaptive depth save anything?"""

import argparse
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console

from ..options import at_least_one
from .page import page
from .plan import QUICK, Plan, judged
from .report import Seed, numbers, progress_bar, show
from .store import OtherSettings, Row
from .study import left, row_names, store_of, units
from .task import Task
from .tasks import TASKS
from .workers import Failed, Job, run

SEEDS = [20, 21, 22, 23, 24]  # settings were found on others
CAVEAT = "A quick run: it shows that everything works, and its numbers mean nothing."


class BadInput(ValueError):
    """What cannot be run; the message is one line for the user."""


def arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.programs", description=__doc__)
    parser.add_argument("--task", choices=TASKS, default="programs", help="what is learned (default: programs)")
    parser.add_argument("--seeds", type=int, nargs="+", help="one table of all (default: 20 21 22 23 24; quick: 20)")
    parser.add_argument("--steps1", type=int, metavar="N", help="steps of training at full depth (default: the task's)")
    parser.add_argument(
        "--steps2", type=int, metavar="N", help="steps with exits, for each policy (default: the task's)"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="models at a time (default: one for each core)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go, and are gone on from")
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it works")
    parsed = parser.parse_args(args)
    parsed.seeds = parsed.seeds or (SEEDS[:1] if parsed.quick else SEEDS)
    parsed.out = parsed.out or Path("out/programs-quick" if parsed.quick else "out/programs")
    return parsed


def plan_of(args: argparse.Namespace) -> Plan:
    """What the command line asks for."""
    plan = QUICK if args.quick else Plan(*TASKS[args.task].training)
    given = {"steps_1": args.steps1, "steps_2": args.steps2}
    plan = plan._replace(**{name: steps for name, steps in given.items() if steps is not None})
    at_least_one({"--steps1": plan.steps_1, "--steps2": plan.steps_2, "--processes": args.processes})
    if len(set(args.seeds)) < len(args.seeds) or not all(0 <= seed < 2**32 for seed in args.seeds):
        raise BadInput(f"--seeds expected different numbers from 0 to 2**32 - 1, got {' '.join(map(str, args.seeds))}")
    return plan


def prepare(job: Job, seeds: Sequence[int]) -> dict[int, int]:
    """Make the place where results go, and count each seed's steps that are left, before time is spent."""
    task = TASKS[job.task]
    try:
        (job.out / task.name).mkdir(parents=True, exist_ok=True)
        steps = {}
        for seed in seeds:
            store = store_of(job.out, task, seed, job.plan)
            steps[seed] = sum(left(task, unit, job.plan, store) for unit in units(task))
            found(task, job, [seed])
    except OSError as error:
        raise BadInput(f"cannot write to {job.out}: {error.strerror}") from None
    except OtherSettings as error:
        raise BadInput(str(error)) from None
    return steps


def found(task: Task, job: Job, seeds: Sequence[int]) -> dict[int, Seed]:
    """What the store has of each seed; of seeds that have something."""
    results = {}
    for seed in seeds:
        store = store_of(job.out, task, seed, job.plan)
        rows = {name: row for name in row_names(task) if (row := store.row(name)) is not None}
        if rows:
            results[seed] = Seed(rows, store.seconds() or {})
    return results


def collect(console: Console, job: Job, steps: dict[int, int], processes: int) -> None:
    """Do what is left, under a bar for each seed; a line for each row as it is complete."""
    messages, bar, nothing = run(job, list(steps), processes), progress_bar(console), float("nan")
    bars = {seed: bar.add_task(f"seed {seed}", total=left, loss=nothing, depth=nothing) for seed, left in steps.items()}
    with closing(messages), bar:
        for seed, message in messages:
            if isinstance(message, Row):
                said = f"{message.accuracy:.2%} right, {message.loss:.4f} nats, depth {message.depth:.2f}"
                console.print(f"seed {seed}, {message.name}: {said}")
            else:
                doing, loss, depth = message
                bar.update(bars[seed], description=f"seed {seed}: {doing}", advance=1, loss=loss, depth=depth)


def main(args: Sequence[str] | None = None) -> None:
    """The command line; what cannot be done is refused in one line, and what was done is shown."""
    parsed, console, ended = arguments(args), Console(), ""
    task = TASKS[parsed.task]
    try:
        job = Job(parsed.task, plan_of(parsed), parsed.out)
        steps = prepare(job, parsed.seeds)
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None
    try:
        collect(console, job, steps, parsed.processes or os.cpu_count() or 1)
    except (KeyboardInterrupt, Failed) as error:
        ended = f"error: {error}" if isinstance(error, Failed) else "Stopped"
    results = found(task, job, parsed.seeds)
    if not results:
        raise SystemExit(f"{ended} before any row was complete.")
    if ended:
        console.print(f"{ended}; this is what is complete. The same command goes on from here.")
    note = CAVEAT if parsed.quick else ""
    show(console, task, results, note)
    path = parsed.out / f"{task.name}.html"
    path.write_text(page(task, list(results.values()), judged(task, next(iter(results)), job.plan), note), "utf-8")
    numbers_path = path.with_suffix(".csv")
    numbers_path.write_text(numbers(task, results), "utf-8")
    print(f"{numbers_path}\n{path}")
    if ended.startswith("error"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
