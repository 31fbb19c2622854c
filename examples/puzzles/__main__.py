"""`python -m examples.puzzles`: Sudoku by a tiny recursive model that halts, against fixed numbers of segments."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from ..jobs import run_all
from ..options import at_least_one
from .report import Size
from .study import BLANKS, FIXED, FULL, QUICK, Job, Judged, Result, run


def arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.puzzles", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", choices=sorted(BLANKS), default=sorted(BLANKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="settings were chosen on seed 0 (default: 0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="models at a time, a thread each")
    parser.add_argument("--out", type=Path, default=Path("out/puzzles"), metavar="DIR", help="where results are kept")
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything, to see that it works")
    parsed = parser.parse_args(args)
    at_least_one({"--processes": parsed.processes})
    return parsed


def main(args: Sequence[str] | None = None) -> None:
    parsed, start = arguments(args), time.perf_counter()
    plans = QUICK if parsed.quick else FULL
    jobs = [
        Job(size, fixed, seed, plans[size]) for size in parsed.sizes for seed in parsed.seeds for fixed in (0, *FIXED)
    ]
    parsed.out.mkdir(parents=True, exist_ok=True)
    results: dict[int, dict[int, dict[int, Result]]] = {size: {seed: {} for seed in parsed.seeds} for size in plans}
    for job, result in run_all(run, jobs, parsed.out / "results.jsonl", parsed.processes):
        results[job.size][job.seed][job.fixed] = {name: Judged(*judged) for name, judged in result.items()}
        name = f"{job.fixed} segment{'s' * (job.fixed > 1)}" if job.fixed else "halting"
        print(f"[{time.perf_counter() - start:4.0f} s] {job.size} × {job.size}, seed {job.seed}, {name}", flush=True)
    for size in parsed.sizes:
        found = Size(size, BLANKS[size], results[size])
        print(f"\n{found.table()}\n\n{found.verdict()}")
    if parsed.quick:
        print("\nThis was a quick run: it trained for three steps, and its numbers mean nothing.")


if __name__ == "__main__":
    main()
