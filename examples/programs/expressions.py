"""Nested expressions over the numbers modulo 5, several in a sequence, each of another height.

They are written as a stack reads them, arguments first: a digit, or a closing bracket that applies an operator to
the two expressions that end last. A closing bracket says where the first of them ends, the second ends just before it:
`7: a-b(3, 6)`. To parse is not the task, to evaluate is. Every token is to predict the value of the expression that
ends with it; the digits, which are their own values, are not counted.

A bracket's height is the longest way down to a digit. At height h the answer is there after h iterations, and h + 1
are needed, since attention reads what an iteration began with. Two operators look at both arguments, two at one alone,
and stand only where that is the taller one, or as tall. So nothing is known of a result before its taller argument is.
MAX and MIN are not like that: a bracket that knows its shorter argument could be done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from .task import Sample, Sizes

MODULUS = 5
SWAP = [1, 0, 2, 3, 4]  # with sums it makes every permutation: there is no shorter way through a nest
VALUES = range(MODULUS)
OPERATORS = {
    "a+1": [[(a + 1) % MODULUS for b in VALUES] for a in VALUES],
    "swap(b)": [[SWAP[b] for b in VALUES] for a in VALUES],
    "a+b": [[(a + b) % MODULUS for b in VALUES] for a in VALUES],
    "a-b": [[(a - b) % MODULUS for b in VALUES] for a in VALUES],
}
TABLE = torch.tensor(list(OPERATORS.values()))
BOTH = 2  # added to the number of an operator that looks at one argument gives one that looks at both


class _Stack(NamedTuple):
    """Of each sequence: the places, values and heights of expressions that are not yet arguments, and how many."""

    places: Tensor
    values: Tensor
    heights: Tensor
    size: Tensor

    def top(self, below: int) -> tuple[Tensor, Tensor, Tensor]:
        """The place, value and height of the last expression, or of one `below` it."""
        at = (self.size - 1 - below).clamp_min(0)[:, None]
        place, value, height = (part.gather(1, at).squeeze(1) for part in self[:3])
        return place, value, height

    def push(self, pops: Tensor, *new: Tensor) -> "_Stack":
        """With `pops` fewer expressions, and a new one."""
        at = (self.size - pops)[:, None]
        places, values, heights = (part.scatter(1, at, each[:, None]) for part, each in zip(self[:3], new, strict=True))
        return _Stack(places, values, heights, self.size - pops + 1)


@final
@dataclass(frozen=True)
class Expressions:
    """Sequences of so many tokens, with heights up to `highest`.

    Where two expressions could be arguments, a bracket closes with probability `closes`. An id below 5 is a digit;
    5 + length·o + a closes operator o, whose first argument ends at a.
    """

    name: str = "expressions"
    length: int = 24
    highest: int = 4
    closes: float = 0.6
    steps: int = 5
    fixed: tuple[int, ...] = (1, 2, 3, 4, 5)
    dense: int = 3
    training: tuple[int, int] = (5000, 1500)

    @property
    def sizes(self) -> Sizes:
        """Those of a model of this task."""
        return Sizes(MODULUS + len(OPERATORS) * self.length, self.length, MODULUS)

    @property
    def introduction(self) -> str:
        """What a reader should know of the task."""
        return f"""\
A sequence is {self.length} tokens: digits, and closing brackets that apply an operator to the two expressions before
them. Every bracket predicts the value of its expression. One transformer block is applied to each token up to
{self.steps} times. A bracket of height h has its answer after h iterations, and must run one more before brackets
around it can read it."""

    def draw(self, count: int, generator: torch.Generator) -> Sample:
        """`count` random sequences.

        No bracket closes above `highest`, so a sequence holds one expression after the other, and the last may be
        unfinished.
        """
        shape = count, self.length
        digits = torch.randint(MODULUS, shape, generator=generator)
        operators = torch.randint(len(OPERATORS), shape, generator=generator)
        closes = torch.rand(shape, generator=generator) < self.closes
        empty = torch.zeros(shape, dtype=torch.int64)
        stack = _Stack(empty, empty, empty, empty[:, 0])
        tokens = []
        for place in range(self.length):
            (first, a, left), (_, b, right) = stack.top(1), stack.top(0)
            digit, operator, height = digits[:, place], operators[:, place], 1 + torch.maximum(left, right)
            shorter = ((operator == 0) & (left < right)) | ((operator == 1) & (right < left))
            operator = operator + BOTH * shorter
            close = closes[:, place] & (stack.size > 1) & (height <= self.highest)
            ids = torch.where(close, MODULUS + self.length * operator + first, digit)
            value, height = torch.where(close, TABLE[operator, a, b], digit), torch.where(close, height, 0)
            stack = stack.push(2 * close, torch.full_like(ids, place), value, height)
            tokens.append((ids, value, height))
        ids, values, heights = (torch.stack(part, 1) for part in zip(*tokens, strict=True))
        return Sample(ids, values, heights + 1, heights > 0)

    def most(self, ids: Tensor) -> Tensor:
        """One for digits; an expression of height h has at least 2h + 1 tokens."""
        place = torch.arange(ids.shape[-1]).expand_as(ids)
        return torch.where(ids < MODULUS, 1, (place // 2 + 1).clamp_max(self.steps))

    def text(self, ids: Sequence[int]) -> list[str]:
        """The tokens of one sequence."""
        return [f"{place}: {self._token(place, token)}" for place, token in enumerate(ids)]

    def _token(self, place: int, token: int) -> str:
        if token < MODULUS:
            return str(token)
        operator, first = divmod(token - MODULUS, self.length)
        return f"{list(OPERATORS)[operator]}({first}, {place - 1})"


EXPRESSIONS = Expressions()
