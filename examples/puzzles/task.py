"""Sudoku: puzzles with one solution, made by rejection, and batches of them under random digits.

Every puzzle is made with the first row of its solution in order, and batches relabel the digits at random. So different
puzzles are different under all labels, and held-out puzzles never occur in training.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BOXES = {4: (2, 2), 6: (2, 3)}  # rows and columns of a box, by the size of the grid
Grid = tuple[int, ...]  # row by row; digits from 1, and 0 for a blank


class Puzzles(NamedTuple):
    """Digits `(batch, cells)` int64: 0 where a clue is blank, never in an answer."""

    clues: Tensor
    answers: Tensor

    def at(self, rows: Tensor | slice) -> "Puzzles":
        """Some of them."""
        return Puzzles(self.clues[rows], self.answers[rows])


def units(size: int) -> list[list[int]]:
    """Of each cell: its row, its column and its box."""
    high, wide = BOXES[size]
    places = [divmod(cell, size) for cell in range(size * size)]
    return [[row, column, row // high * high + column // wide] for row, column in places]


def solutions(grid: Sequence[int], size: int, most: int, rng: random.Random | None = None) -> list[Grid]:
    """The first `most` grids that fill the blanks of `grid`; with `rng` digits are tried in a random order."""
    cells, every, blanks = list(grid), 2 ** (size + 1) - 2, [i for i, digit in enumerate(grid) if not digit]
    own = units(size)
    used = [[0] * size for _ in range(3)]  # digits as bits, of every row, column and box
    for cell, digit in enumerate(cells):
        for kind, unit in enumerate(own[cell]):
            used[kind][unit] |= 1 << digit
    found: list[Grid] = []

    def free(cell: int) -> int:
        row, column, box = own[cell]
        return every & ~(used[0][row] | used[1][column] | used[2][box])

    def place(cell: int, digit: int) -> None:
        cells[cell] ^= digit
        for kind, unit in enumerate(own[cell]):
            used[kind][unit] ^= 1 << digit

    def fill() -> None:
        if not blanks:
            found.append(tuple(cells))
            return
        at = min(range(len(blanks)), key=lambda i: free(blanks[i]).bit_count())  # the fewest choices first
        cell = blanks.pop(at)
        digits = [digit for digit in range(1, size + 1) if free(cell) >> digit & 1]
        if rng is not None:
            rng.shuffle(digits)
        for digit in digits:
            place(cell, digit)
            fill()
            place(cell, digit)
            if len(found) == most:
                break
        blanks.insert(at, cell)

    fill()
    return found


def make(size: int, blanks: Sequence[int], number: int, seed: int) -> Puzzles:
    """`number` different puzzles, with each number of `blanks` in turn; each has one solution."""
    rng, clues = random.Random(seed), dict[Grid, Grid]()
    while len(clues) < number:
        (answer,) = solutions([*range(1, size + 1), *[0] * (size * size - size)], size, 1, rng)
        hidden = set(rng.sample(range(size * size), blanks[len(clues) % len(blanks)]))
        puzzle = tuple(0 if cell in hidden else digit for cell, digit in enumerate(answer))
        if len(solutions(puzzle, size, 2)) == 1:
            clues[puzzle] = answer
    return Puzzles(torch.tensor([*clues]), torch.tensor([*clues.values()]))


def relabelled(puzzles: Puzzles, size: int, generator: torch.Generator) -> Puzzles:
    """The same puzzles, the digits of each under random names."""
    names = torch.rand(len(puzzles.clues), size, generator=generator).argsort(1) + 1
    names = torch.nn.functional.pad(names, (1, 0))  # a blank stays one
    return Puzzles(names.gather(1, puzzles.clues), names.gather(1, puzzles.answers))
