"""Two commits on one machine: `python -m benchmarks.compare BASE skip --only '4 × 256 | 2'`.

The benchmark of the working tree runs twice, over the package of the commit BASE and over that of the working tree, in
two processes that take turns call by call, so that a slow moment of the machine meets both. It prints the times and
their ratios, and writes nothing into the repository. `make bench BASE=... ONLY=...` does the same. A benchmark that
does not time by `interleave`, such as serving and drafts, cannot be compared.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import TextIOBase
from pathlib import Path
from typing import IO, Any, Protocol, cast

from . import _measure

ROOT = Path(__file__).parent.parent
HEADER = "| | what | before, ms | after, ms | after / before |\n|---|---|---|---|---|"


class Timed(TextIOBase):
    """In a process that is compared: what the benchmark times, each with the row that it prints next."""

    def __init__(self, say: Callable[[object], None], wait: Callable[[], None]) -> None:
        self.say, self.wait = say, wait
        self.nameless: list[dict[str, float]] = []

    def interleave(
        self,
        functions: Mapping[str, Callable[[], object]],
        repeats: int = 5,
        before: Mapping[str, Callable[[], object]] | None = None,
    ) -> dict[str, float]:
        """As in `_measure`, but each call waits for this process's turn."""
        prepare = {name: partial(self.turn, (before or {}).get(name)) for name in functions}
        best = timed(functions, repeats, prepare)
        self.nameless.append(best)
        return best

    def turn(self, prepare: Callable[[], object] | None) -> None:
        """Let the other go on, and wait until it has."""
        self.say("turn")
        self.wait()
        if prepare:
            prepare()

    def write(self, text: str) -> int:
        """A row of a table names what was timed since the last."""
        if self.nameless and (row := re.match(r"\| (.*) \|", text)):
            self.say([[name_of(row[1]), name, best] for times in self.nameless for name, best in times.items()])
            self.nameless.clear()
        return len(text)


timed = _measure.interleave  # the name in _measure is replaced in a process that is compared


def name_of(row: str) -> str:
    """The cells of a row that stand before the first measured one."""
    cells = row.split(" | ")
    measured = (i for i, cell in enumerate(cells) if re.match(r"\d+\.\d|–$", cell))
    return ", ".join(cells[: next(measured, len(cells))])


def measured(benchmark: str, arguments: list[str], say: IO[str], wait: IO[str]) -> None:
    """Run a benchmark so that it takes turns and says what it timed."""

    def line(what: object) -> None:
        print(json.dumps(what), file=say, flush=True)

    def go() -> None:
        if not wait.readline():
            sys.exit("The other process ended.")

    found = Timed(line, go)
    vars(_measure).update(interleave=found.interleave, write_section=lambda name, markdown: None)
    sys.argv = [benchmark, *arguments]
    with redirect_stdout(cast(Any, found)):
        runpy.run_module(f"benchmarks.{benchmark}", run_name="__main__")
    line("end")


class Side:
    """One of the two processes, and what it has said."""

    def __init__(self, folder: Path, benchmark: str, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.compare", "--measured", benchmark, *arguments]
        alone = os.environ | {"PYTHONPATH": str(folder)}
        self.process = subprocess.Popen(
            command, cwd=folder, env=alone, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.times: list[tuple[str, str, float]] = []

    def go(self) -> bool:
        """Wait until it comes to what it times next. False if nothing is left."""
        out = cast(IO[str], self.process.stdout)
        for said in map(json.loads, out):
            if said in ("turn", "end"):
                return said == "turn"
            self.times += map(tuple, said)
        raise SystemExit(f"The benchmark ended with status {self.process.wait()}; its error stands above.")

    def let(self) -> None:
        """Let it time that."""
        into = cast(IO[str], self.process.stdin)
        into.write("go\n")
        into.flush()


class Turns(Protocol):
    """What takes turns."""

    def let(self) -> None: ...

    def go(self) -> bool: ...


def take_turns(sides: Sequence[Turns]) -> None:
    """Both reach their first call; then one goes at a time, and who goes first alternates."""
    waiting = [side for side in sides if side.go()]
    while waiting:
        for side in list(waiting):
            side.let()
            if not side.go():
                waiting.remove(side)
        waiting.reverse()


def table(before: list[tuple[str, str, float]], after: list[tuple[str, str, float]]) -> str:
    """The seconds of both in milliseconds, and their ratio, by row of the benchmark and by what it timed in it."""
    rows = [HEADER]
    for (row, name, old), (_, _, new) in zip(before, after, strict=True):
        rows.append(f"| {row} | {name} | {old * 1e3:.2f} | {new * 1e3:.2f} | {new / old:.3f} |")
    return "\n".join(rows)


@contextmanager
def trees(base: str) -> Iterator[list[Path]]:
    """Two folders, each with a package and the benchmarks of the working tree."""
    with tempfile.TemporaryDirectory() as folder:
        sides = [Path(folder, name) for name in ("before", "after")]
        for side in sides:
            shutil.copytree(ROOT / "benchmarks", side / "benchmarks")
        shutil.copytree(ROOT / "adadepth", sides[1] / "adadepth")
        archive = subprocess.run(["git", "archive", base, "adadepth"], cwd=ROOT, check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "x", "-C", str(sides[0])], check=True, input=archive.stdout)
        yield sides


def main() -> None:
    if sys.argv[1:2] == ["--measured"]:
        return measured(sys.argv[2], sys.argv[3:], sys.stdout, sys.stdin)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="a commit, branch or tag")
    parser.add_argument("benchmark", help="skip, overhead, ponder, decode or peers")
    args, arguments = parser.parse_known_args()
    with trees(args.base) as folders:
        sides = [Side(folder, args.benchmark, arguments) for folder in folders]
        try:
            take_turns(sides)
        finally:
            for side in sides:
                side.process.kill()
                side.process.communicate()
    if not sides[0].times:
        sys.exit(f"Expected a benchmark that times by `interleave`, got {args.benchmark}. Compare another.")
    print(f"{_measure.machine()}; before: {args.base}, after: the working tree\n")
    print(table(sides[0].times, sides[1].times))


if __name__ == "__main__":
    main()
