"""The Sudoku example: its puzzles against brute force, its carry, its table and a quick run."""

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from narrow import the

import adadepth as ad
from examples.figures import spread
from examples.puzzles import __main__ as command
from examples.puzzles import report, study, task
from examples.puzzles import train as training
from examples.puzzles.model import Solver
from examples.puzzles.study import Judged

GRIDS = [
    sum(rows, ())
    for top in itertools.product(itertools.permutations(range(1, 5)), repeat=2)
    if all(len({*top[0][c : c + 2], *top[1][c : c + 2]}) == 4 for c in (0, 2))
    for low in itertools.product(itertools.permutations(range(1, 5)), repeat=2)
    if all(len({row[c] for row in (*top, *low)}) == 4 for c in range(4))
    if all(len({*low[0][c : c + 2], *low[1][c : c + 2]}) == 4 for c in (0, 2))
    for rows in [(*top, *low)]
]


def agreeing(clues: tuple[int, ...]) -> set[tuple[int, ...]]:
    """All grids of 4 × 4 with these clues."""
    return {grid for grid in GRIDS if all(clue in (0, digit) for clue, digit in zip(clues, grid, strict=True))}


def test_the_solver_finds_what_brute_force_finds() -> None:
    assert len(GRIDS) == 288
    rng, counts = random.Random(0), set()
    for _ in range(20):
        clues = tuple(digit if rng.random() < 0.3 else 0 for digit in rng.choice(GRIDS))
        every = agreeing(clues)
        counts.add(len(every))
        found = task.solutions(clues, 4, 300, rng)
        assert len(found) == len(every) and set(found) == every
        assert len(task.solutions(clues, 4, 2)) == min(2, len(every))
    assert len(counts) > 5
    assert task.solutions((1, 2, 3, 0, 0, 0, 0, 4, *[0] * 8), 4, 1) == []


def test_puzzles_have_one_solution_and_the_blanks_that_were_asked_for() -> None:
    puzzles = task.make(4, (6, 10), 30, seed=0)
    for i, (clues, answer) in enumerate(zip(*(part.tolist() for part in puzzles), strict=True)):
        assert agreeing(tuple(clues)) == {tuple(answer)}
        assert answer[:4] == [1, 2, 3, 4]
        assert clues.count(0) == (6, 10)[i % 2]
    assert len(puzzles.clues.unique(dim=0)) == 30
    assert torch.equal(task.make(4, (6, 10), 30, seed=0).clues, puzzles.clues)


def test_rows_columns_and_boxes_of_six_hold_every_digit() -> None:
    for answer in task.make(6, (16,), 5, seed=0).answers.view(-1, 6, 6):
        boxes = answer.view(3, 2, 2, 3).transpose(1, 2).reshape(6, 6)
        for unit in (*answer, *answer.T, *boxes):
            assert sorted(unit.tolist()) == [1, 2, 3, 4, 5, 6]


def test_other_names_for_the_digits_change_nothing_else() -> None:
    puzzles = task.make(6, (16,), 8, seed=0)
    renamed = task.relabelled(puzzles, 6, torch.Generator().manual_seed(0))
    for clues, answer, new_clues, new_answer in zip(*puzzles, *renamed, strict=True):
        names = dict(zip(answer.tolist(), new_answer.tolist(), strict=True))
        assert sorted(names.values()) == [1, 2, 3, 4, 5, 6]
        assert [names[digit] for digit in answer.tolist()] == new_answer.tolist()
        assert [{0: 0, **names}[digit] for digit in clues.tolist()] == new_clues.tolist()
    assert not torch.equal(renamed.answers, puzzles.answers)


@pytest.fixture
def stream() -> training.Stream:
    return training.Stream(Solver(4, 3), task.make(4, (8,), 20, seed=0), lambda _: torch.arange(64) % 4, 0)


def test_a_puzzle_goes_on_from_its_state_until_it_is_done(stream: training.Stream) -> None:
    carry, model = stream.fresh(), stream.model
    bias = the(ad.LinearGate, model.looped.gate).proj.bias
    torch.nn.init.constant_(bias, -9.0)  # all would halt
    _, after, done = training.one_segment(model, carry, most=3)
    assert done.tolist() == [least <= 1 for least in carry.least.tolist()]
    once = model(carry.puzzles.clues, model.start(64), 1, 1)
    torch.testing.assert_close(after.state, once.hidden.detach())
    fresh = stream.fresh()
    renewed = after.renewed(done, fresh)
    for new, old, now in zip(*((*each.puzzles, *each[1:]) for each in (fresh, after, renewed)), strict=True):
        assert torch.equal(now[done], new[done])
        assert torch.equal(now[~done], old[~done])
    assert renewed.ran.tolist() == (~done).long().tolist()
    torch.nn.init.constant_(bias, 9.0)  # none would
    for _ in range(2):
        _, after, done = training.one_segment(model, after, most=3)
    assert done.all() and (after.ran == 3).all()


def test_exploration_asks_a_few_puzzles_for_more_segments() -> None:
    drawn = torch.stack([training.explore(8, torch.Generator().manual_seed(seed)) for seed in range(50)])
    assert 0.07 < (drawn > 1).double().mean() < 0.13
    assert drawn.unique().tolist() == list(range(1, 9))
    assert (training.always(4, torch.Generator()) == 4).all()


def test_what_is_judged() -> None:
    puzzles, model = task.make(4, (6, 10), 8, seed=0), Solver(4, 3)
    perfect = torch.nn.functional.one_hot(puzzles.answers - 1, 4).double()
    perfect[:2, 0] = perfect[:2, 0].flip(-1)  # one with 6 blanks and one with 10
    model.logits = lambda out: perfect  # type: ignore[method-assign]
    judged = study.judge(model, puzzles, 2, 2, timed=1)
    assert judged.solved == 0.75 and judged.solved_by_blanks == [0.75, 0.75]
    assert judged.segments == 2.0 and judged.segments_by_blanks == [2.0, 2.0]
    assert judged.milliseconds > 0


def test_the_segments_that_fixed_numbers_need() -> None:
    points = [(1.0, 0.5), (2.0, 0.7), (4.0, 0.9)]
    assert [report.needed(share, points) for share in (0.4, 0.7)] == [1.0, 2.0]
    assert report.needed(0.8, points) == pytest.approx(3.0)
    assert math.isnan(report.needed(0.95, points))
    assert spread([1.0], ".1f") == "+1.0"
    assert spread([1.0, 3.0], ".1f") == "+2.0 ± 1.0"


def judged(solved: float, segments: float) -> Judged:
    return Judged(solved, segments, 1.0, [solved] * 3, [segments] * 3)


def test_seeds_are_compared_in_pairs() -> None:
    fixed = dict(zip(study.FIXED, (0.5, 0.7, 0.9, 0.9), strict=True))
    results: dict[int, dict[int, study.Result]] = {}
    for seed in (1, 2):
        results[seed] = {k: {str(k): judged(share + seed / 100, k)} for k, share in fixed.items()}
        held = {str(k): judged(0.815, k + 1.5) for k in fixed}
        results[seed][0] = {"halting": judged(0.8 + seed / 100, 1.5 * seed), **held}
    size = report.Size(4, (6, 8, 10), results)
    lines = size.verdict().splitlines()
    assert lines[1] == "against 2, trained so: solved +10.0 ± 0.0 points, segments +12.5 ± 37.5 %"
    equal, other = "at an equal share solved, against fixed, trained so: ", "against the same weights held: "
    assert lines[-2] == equal + "segments -25.0 ± 25.0 %"
    assert lines[-1].endswith(other + "segments -40.0 %; in 1 of 2 seeds no fixed number solves as many")
    head, first, *_ = size.table().splitlines()
    assert head.split("  ")[0] == "4 × 4"
    assert first.split() == ["halting", "81.5", "2.25", "1.00", "81.5", "81.5", "81.5"]
    results[2][0]["halting"] = judged(1.0, 2.0)
    lines = report.Size(4, (6, 8, 10), results).verdict().splitlines()
    assert lines[-2] == equal + "segments -50.0 %; in 1 of 2 seeds no fixed number solves as many"


def test_a_quick_run_is_kept_and_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--quick", "--sizes", "4", "--processes", "1", "--out", str(tmp_path / "new")]
    command.main(args)
    progress, *tables = capsys.readouterr().out.split("\n\n")
    assert [line.split("] ")[1] for line in progress.splitlines()][:2] == [
        "4 × 4, seed 0, halting",
        "4 × 4, seed 0, 1 segment",
    ]
    columns = ["solved %", "segments", "ms a puzzle", "6 blanks %", "8 blanks %", "10 blanks %"]
    assert tables[0].splitlines()[0] == "4 × 4".ljust(26) + "".join(f"{column:>13}" for column in columns)
    assert len(tables[0].splitlines()) == 1 + 1 + 2 * len(study.FIXED) + 1
    assert tables[-1] == "This was a quick run: it trained for three steps, and its numbers mean nothing.\n"
    monkeypatch.setattr(command, "run", None)  # nothing is run again
    command.main(args)
    assert capsys.readouterr().out.split("\n\n")[1:] == tables
