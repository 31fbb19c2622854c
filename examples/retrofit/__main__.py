"""`python -m examples.retrofit`: does a pretrained model gain if its middle layers are looped, and do gates help?"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..jobs import run_all
from ..options import at_least_one
from .model import ARMS, GATES
from .prepare import prepare
from .report import COLUMNS, LEGEND, Seeds, Times, lines, page
from .study import Job, Row, run, seconds
from .text import BadInput, files, repository
from .train import QUICK, Plan

SEEDS = [1, 2, 3]  # settings were chosen on seed 0
CAVEAT = "A quick run: two steps of training show that everything works, and the numbers mean nothing."


def arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.retrofit", description=__doc__)
    parser.add_argument("--model", help="a causal language model by name or path (default: SmolLM2-135M)")
    parser.add_argument("--layers", type=int, nargs=2, help="those to loop: the first, and one past the last")
    parser.add_argument("--text", type=Path, nargs="+", help="files to train on (default: the docs of this repository)")
    parser.add_argument("--seeds", type=int, nargs="+", help="one table of all (default: 1 2 3; quick: 1)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of training (default: 100)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="models at a time, a thread each")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results are kept, and are gone on from")
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it works")
    parsed = parser.parse_args(args)
    at_least_one({"--steps": parsed.steps, "--processes": parsed.processes})
    parsed.seeds = parsed.seeds or (SEEDS[:1] if parsed.quick else SEEDS)
    parsed.out = parsed.out or Path("out/retrofit-quick" if parsed.quick else "out/retrofit")
    return parsed


def main(args: Sequence[str] | None = None) -> None:
    """The command line; what cannot be run is refused in one line."""
    parsed, console, start = arguments(args), Console(highlight=False), time.perf_counter()
    plan = QUICK if parsed.quick else Plan()
    if parsed.steps:
        plan = plan._replace(steps=parsed.steps)
    try:
        prose = files(parsed.text) if parsed.text else repository()
        parsed.out.mkdir(parents=True, exist_ok=True)
        prepared = prepare(parsed.out, parsed.model, prose, plan, parsed.layers)
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None
    jobs = [
        Job(arm, seed, parsed.model, prepared.layers, plan, str(parsed.out), prepared.mark)
        for seed in parsed.seeds
        for arm in range(len(ARMS))
    ]
    console.print(
        f"Text: {prose.source}. Looped: layers {prepared.layers[0]} to {prepared.layers[1] - 1}.", soft_wrap=True
    )
    console.print(
        f"{len(jobs)} models to train, {plan.steps} steps each; a line follows for each that is done.", soft_wrap=True
    )
    found: dict[int, dict[int, dict[str, Any]]] = {seed: {} for seed in parsed.seeds}
    for job, result in run_all(run, jobs, parsed.out / "results.jsonl", parsed.processes):
        found[job.seed][job.arm] = result
        scale = "" if result["opened"] is None else f", scale of the loop {result['opened']:.3f}"
        said = f"[{time.perf_counter() - start:.0f} s] seed {job.seed}, {ARMS[job.arm].name}{scale}"
        console.print(said, markup=False, soft_wrap=True)
    note = CAVEAT if parsed.quick else ""
    rows = [{row[0]: Row(*row) for arm in sorted(seed) for row in seed[arm]["rows"]} for seed in found.values()]
    console.print("Now the times of the first seed's models.")
    ((_, times),) = run_all(seconds, [jobs[: len(ARMS)]], parsed.out / "seconds.jsonl", 1)
    show(console, rows, times)
    path = parsed.out / "retrofit.html"
    shown = (prepared.pieces, found[parsed.seeds[0]][ARMS.index(GATES)]["shown"])
    path.write_text(page(prose.source, rows, times, shown, note), "utf-8")
    console.print(f"The same with a passage coloured by depth: {path}", soft_wrap=True)
    if note:
        console.print(note, soft_wrap=True)


def show(console: Console, seeds: Seeds, times: Times) -> None:
    """The table."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for line in lines(seeds, times):
        table.add_row(*(cell.replace(" ±", "\n±") for cell in line))
    console.print(table)
    console.print(LEGEND)


if __name__ == "__main__":
    main()
