"""Straight-line programs over the numbers modulo 5.

A program has 24 lines. A line is a constant, as the first four are, or a function of an earlier line, named by its
number: `7: 2x(3)`. A line is one token, and every token is to predict the value of its own line. A line's level is
the length of its chain of references: a constant has level 0, what refers to level n has level n + 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LINES = 24
CONSTANTS = 4  # at the least: the first lines
DEEPEST = 6  # level
MODULUS = 5
# Each a permutation of the numbers, so that all values stay equally likely; together they make every permutation.
FUNCTIONS = {
    "x+1": [1, 2, 3, 4, 0],
    "2x": [0, 2, 4, 1, 3],
    "-x": [0, 4, 3, 2, 1],
    "swap01": [1, 0, 2, 3, 4],
}
VOCABULARY = MODULUS + len(FUNCTIONS) * LINES
TABLE = torch.tensor(list(FUNCTIONS.values()))


class Programs(NamedTuple):
    """Programs as token ids, and what is true of their lines; each `(programs, 24)` int64.

    An id below 5 is a constant; 5 + 24·f + a is function f of line a.
    """

    ids: Tensor
    values: Tensor
    levels: Tensor

    def needed(self, steps: int) -> Tensor:
        """The iterations each line needs in a loop of `steps`: level + 1 at most.

        A line's answer is there after `level` iterations, but an iteration shows others what it began with. To be
        seen by those who refer to it, a line stays for one more.
        """
        return (self.levels + 1).clamp_max(steps)


def draw(count: int, generator: torch.Generator) -> Programs:
    """`count` random programs.

    After the constants each line draws a level from 1 to 6, takes the deepest there can be where that is not yet
    possible, and refers to any line one level below.
    """
    functions = torch.randint(len(FUNCTIONS), (count, LINES), generator=generator)
    wanted = torch.randint(1, DEEPEST + 1, (count, LINES), generator=generator)
    ranked = torch.rand(count, LINES, LINES, generator=generator)
    ids = torch.randint(MODULUS, (count, LINES), generator=generator)
    values, levels = ids.clone(), torch.zeros_like(ids)
    for line in range(CONSTANTS, LINES):
        earlier = levels[:, :line]
        levels[:, line] = torch.minimum(wanted[:, line], earlier.amax(1) + 1)
        below = earlier == levels[:, line, None] - 1
        source = (ranked[:, line, :line] * below).argmax(1)
        function = functions[:, line]
        ids[:, line] = MODULUS + LINES * function + source
        values[:, line] = TABLE[function, values.gather(1, source[:, None]).squeeze(1)]
    return Programs(ids, values, levels)


def text(ids: Sequence[int]) -> list[str]:
    """The lines of one program as one writes them."""
    return [f"{line}: {_expression(token)}" for line, token in enumerate(ids)]


def _expression(token: int) -> str:
    if token < MODULUS:
        return str(token)
    function, source = divmod(token - MODULUS, LINES)
    return f"{list(FUNCTIONS)[function]}({source})"
