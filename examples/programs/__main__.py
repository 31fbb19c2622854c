"""`python -m examples.programs`: on programs whose lines need a known depth, does used depth follow needed depth?"""

import argparse
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console

from .page import page
from .report import by_policy, progress_bar, show
from .study import Plan, Row, judged
from .workers import Failed, run

QUICK = Plan(steps_1=4, steps_2=4, judged=32, fitted=16)


class BadInput(ValueError):
    """What cannot be run; the message is one line for the user."""


def arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.programs", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default: 0 1 2)")
    parser.add_argument("--steps1", type=int, metavar="N", help="steps of training at full depth (default: 2500)")
    parser.add_argument("--steps2", type=int, metavar="N", help="steps with exits, for each policy (default: 1500)")
    parser.add_argument("--processes", type=int, metavar="N", help="seeds at a time (default: one for each core)")
    parser.add_argument("--out", type=Path, default=Path("out/programs"), metavar="DIR", help="where the page goes")
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything, to see that it works")
    return parser.parse_args(args)


def plan_of(args: argparse.Namespace) -> Plan:
    """What the command line asks for."""
    plan = QUICK if args.quick else Plan()
    given = {"steps_1": args.steps1, "steps_2": args.steps2}
    plan = plan._replace(**{name: steps for name, steps in given.items() if steps is not None})
    for option, number in (("--steps1", plan.steps_1), ("--steps2", plan.steps_2), ("--processes", args.processes)):
        if number is not None and number < 1:
            raise BadInput(f"{option} expected at least 1, got {number}")
    if len(set(args.seeds)) < len(args.seeds) or not all(0 <= seed < 2**32 for seed in args.seeds):
        raise BadInput(f"--seeds expected different numbers from 0 to 2**32 - 1, got {' '.join(map(str, args.seeds))}")
    return plan


def collect(console: Console, results: dict[int, list[Row]], plan: Plan, processes: int) -> None:
    """Run the seeds of `results` under progress bars, and add each row as it is complete."""
    messages, bar, nothing = run(list(results), plan, processes), progress_bar(console), float("nan")
    bars = {seed: bar.add_task(f"seed {seed}", total=plan.total, loss=nothing, depth=nothing) for seed in results}
    with closing(messages), bar:
        for seed, message in messages:
            if isinstance(message, Row):
                results[seed].append(message)
            else:
                doing, done, loss, depth = message
                bar.update(bars[seed], description=f"seed {seed}: {doing}", completed=done, loss=loss, depth=depth)


def prepare(out: Path) -> None:
    """Make the place where the page goes, before the time is spent."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot write to {out}: {error.strerror}") from None


def main(args: Sequence[str] | None = None) -> None:
    """The command line; what cannot be done is refused in one line, and what was done is shown."""
    parsed, console, ended = arguments(args), Console(), ""
    try:
        plan = plan_of(parsed)
        prepare(parsed.out)
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None
    results: dict[int, list[Row]] = {seed: [] for seed in parsed.seeds}
    try:
        collect(console, results, plan, parsed.processes or os.cpu_count() or 1)
    except (KeyboardInterrupt, Failed) as error:
        ended = f"error: {error}" if isinstance(error, Failed) else "Stopped"
    results = {seed: rows for seed, rows in results.items() if rows}
    if not results:
        raise SystemExit(f"{ended} before any policy was complete.")
    if ended:
        console.print(f"{ended}; this is what is complete.")
    show(console, results)
    path = parsed.out / "programs.html"
    path.write_text(page(by_policy(results), judged(next(iter(results)), plan)), encoding="utf-8")
    print(path)
    if ended.startswith("error"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
