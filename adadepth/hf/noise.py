"""`Noise`: the random noise for sampling. A token has the same noise when it is guessed and when it is chosen."""

from collections import deque
from typing import final

import torch
from torch import Tensor


@final
class Noise:
    """Noise for the rows of a batch, drawn as `torch.multinomial` draws it: one column of new tokens after another.

    `(probabilities / noise).argmax(-1)` equals `torch.multinomial(probabilities, 1)`. A guess and the later choice of
    the same token use the same noise. So sampling gives the same text with guesses as without.

    Arguments:
        rows: the number of rows that are sampled together.
        generator: the random number generator; None: the device's default.
    """

    def __init__(self, rows: int, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self._held: list[deque[Tensor] | None] = [deque() for _ in range(rows)]  # None: the row has ended
        self._first = [0] * rows  # by row, the column of its first noise in `_held`

    def of(self, row: int, column: int, probabilities: Tensor) -> Tensor:
        """The noise of a row in a column, `(1, vocabulary)` like its probabilities."""
        held = self._held[row]
        assert held is not None, "the row has ended"
        while self._first[row] + len(held) <= column:
            self._draw(probabilities)
        return held[column - self._first[row]]

    def forget(self, row: int, columns: int) -> None:
        """Drop the noise of the first `columns` columns of a row. Their tokens have been chosen."""
        held = self._held[row]
        while held and self._first[row] < columns:
            held.popleft()
            self._first[row] += 1

    def end(self, row: int) -> None:
        """Drop the noise of a row that has ended."""
        self._held[row] = None

    def _draw(self, like: Tensor) -> None:
        column = like.new_empty(len(self._held), like.shape[-1]).exponential_(1, generator=self.generator)
        for row, held in enumerate(self._held):
            if held is not None:
                held.append(column[row : row + 1])
