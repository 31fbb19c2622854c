"""`make bench BASE=...`: two processes take turns, and what they timed stands side by side."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import _measure, compare

ONE = """
from benchmarks._measure import interleave, write_section

def main():
    print("| what | one, ms |", "|---|---|", sep="\\n")
    best = interleave({"a": lambda: None, "b": lambda: None}, 2)
    print(f"| small | {best['a']:.2f} |")
    interleave({"c": lambda: None}, 1, {"c": lambda: print("prepared")})
    print("| large | 2.50 |")
    write_section("one", "must not be written")

main()
"""


def test_a_benchmark_says_what_it_timed_and_waits_for_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.py").write_text(ONE)
    monkeypatch.setattr("benchmarks.__path__", [*sys.modules["benchmarks"].__path__, str(tmp_path)])
    monkeypatch.setattr(sys, "argv", [])
    for name in ("interleave", "write_section"):
        monkeypatch.setattr(_measure, name, getattr(_measure, name))
    before, said = _measure.RESULTS.read_text(), io.StringIO()
    compare.measured("one", ["--only", "x"], said, io.StringIO("go\n" * 8))
    assert sys.argv == ["one", "--only", "x"]
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    named = [[entry[:2] for entry in line] for line in lines if isinstance(line, list)]
    assert named == [[["small", "a"], ["small", "b"]], [["large", "c"]]]
    assert [line for line in lines if isinstance(line, str)] == ["turn"] * 8 + ["end"]
    assert _measure.RESULTS.read_text() == before
    with pytest.raises(SystemExit, match=r"^The other process ended\.$"):
        compare.measured("one", [], io.StringIO(), io.StringIO("go\n"))


class Scripted:
    """A side that is timed `calls` times."""

    def __init__(self, name: str, calls: int, log: Callable[[str], None]) -> None:
        self.name, self.calls, self.log = name, calls, log

    def let(self) -> None:
        self.log(self.name)
        self.calls -= 1

    def go(self) -> bool:
        return self.calls > 0


def test_who_goes_first_alternates() -> None:
    order: list[str] = []
    compare.take_turns([Scripted("before", 3, order.append), Scripted("after", 3, order.append)])
    assert order == ["before", "after", "after", "before", "before", "after"]


def test_the_table_has_a_ratio_for_each() -> None:
    before, after = [("small", "a", 0.002), ("small", "b", 0.001)], [("small", "a", 0.001), ("small", "b", 0.0015)]
    assert compare.table(before, after).splitlines()[2:] == [
        "| small | a | 2.00 | 1.00 | 0.500 |",
        "| small | b | 1.00 | 1.50 | 1.500 |",
    ]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("4 × 256 | 2 | 1 × 128 | forward | even | 1.00 (live 1.00, ≤ 1.10) | –", "4 × 256, 2, 1 × 128, forward, even"),
        ("a block | – | 1.003", "a block"),
        ("only words", "only words"),
    ],
)
def test_a_row_is_named_by_what_stands_before_its_numbers(row: str, name: str) -> None:
    assert compare.name_of(row) == name
