"""Straight-line programs over the numbers modulo 5.

A program has 24 lines. A line is a constant, as the first four are, or a function of an earlier line, named by its
number: `7: 2x(3)`. A line is one token, and every token is to predict the value of its own line. A line's level is the
length of its chain of references: a constant has level 0, what refers to level n has level n + 1. A line's answer is
there after as many iterations as its level, but attention reads what an iteration began with: a line that others refer
to must run one more, and needs level + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .task import Sample, Sizes

CONSTANTS = 4  # at the least: the first lines
MODULUS = 5
# Each a permutation of the numbers, so that all values stay equally likely; together they make every permutation.
FUNCTIONS = {
    "x+1": [1, 2, 3, 4, 0],
    "2x": [0, 2, 4, 1, 3],
    "-x": [0, 4, 3, 2, 1],
    "swap01": [1, 0, 2, 3, 4],
}
TABLE = torch.tensor(list(FUNCTIONS.values()))


@final
@dataclass(frozen=True)
class Programs:
    """Programs of so many lines, with levels up to `deepest`; all lines are counted.

    An id below 5 is a constant; 5 + lines·f + a is function f of line a.
    """

    name: str = "programs"
    lines: int = 24
    deepest: int = 6
    steps: int = 6
    fixed: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    dense: int = 4
    training: tuple[int, int] = (2500, 1500)

    @property
    def sizes(self) -> Sizes:
        """Those of a model of this task."""
        return Sizes(MODULUS + len(FUNCTIONS) * self.lines, self.lines, MODULUS)

    @property
    def introduction(self) -> str:
        """What a reader should know of the task."""
        return f"""\
A program is {self.lines} lines, each a constant or a function of an earlier line, and every line predicts its own
value. One transformer block is applied to each up to {self.steps} times. A line at the end of a chain of n references
has its answer after n iterations, and must run one more before lines that refer to it can read it."""

    def draw(self, count: int, generator: torch.Generator) -> Sample:
        """`count` random programs.

        After the constants each line draws a level, takes the deepest there can be where that is not yet possible,
        and refers to any line one level below.
        """
        shape = count, self.lines
        functions = torch.randint(len(FUNCTIONS), shape, generator=generator)
        wanted = torch.randint(1, self.deepest + 1, shape, generator=generator)
        ranked = torch.rand(*shape, self.lines, generator=generator)
        ids = torch.randint(MODULUS, shape, generator=generator)
        values, levels = ids.clone(), torch.zeros_like(ids)
        for line in range(CONSTANTS, self.lines):
            earlier = levels[:, :line]
            levels[:, line] = torch.minimum(wanted[:, line], earlier.amax(1) + 1)
            below = earlier == levels[:, line, None] - 1
            source = (ranked[:, line, :line] * below).argmax(1)
            function = functions[:, line]
            ids[:, line] = MODULUS + self.lines * function + source
            values[:, line] = TABLE[function, values.gather(1, source[:, None]).squeeze(1)]
        return Sample(ids, values, (levels + 1).clamp_max(self.steps), torch.ones_like(ids, dtype=torch.bool))

    def most(self, ids: Tensor) -> Tensor:
        """A line's chain leads through earlier lines, the last of them a constant."""
        place = torch.arange(ids.shape[-1]).expand_as(ids)
        return (place - CONSTANTS + 2).clamp(1, self.steps)

    def text(self, ids: Sequence[int]) -> list[str]:
        """The lines of one program."""
        return [f"{line}: {self._expression(token)}" for line, token in enumerate(ids)]

    def _expression(self, token: int) -> str:
        if token < MODULUS:
            return str(token)
        function, source = divmod(token - MODULUS, self.lines)
        return f"{list(FUNCTIONS)[function]}({source})"


PROGRAMS = Programs()
DEEP = Programs("deep", deepest=11, steps=12, fixed=(4, 6, 8, 12), dense=6, training=(5000, 4000))
