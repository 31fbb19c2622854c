"""The noise by which tokens are sampled: one for each place of a text, whoever asks for it first."""

from collections import deque
from typing import final

import torch
from torch import Tensor


@final
class Noise:
    """Noise for the texts of a batch, as `torch.multinomial` would draw it, column of new tokens after column.

    `(probabilities / noise).argmax(-1)` is what `torch.multinomial(probabilities, 1)` gives; so a place whose token is
    guessed first and chosen later has the same noise both times, and the texts are those of sampling without guesses.

    Arguments:
        rows: how many texts are sampled together.
        generator: None: the device's own.
    """

    def __init__(self, rows: int, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self._held: list[deque[Tensor] | None] = [deque() for _ in range(rows)]  # None: the text has ended
        self._first = [0] * rows  # the column of what is held first

    def of(self, row: int, column: int, probabilities: Tensor) -> Tensor:
        """The noise of the text `row` in a column, `(1, vocabulary)` as its probabilities are."""
        held = self._held[row]
        assert held is not None, "the text has ended"
        while self._first[row] + len(held) <= column:
            self._draw(probabilities)
        return held[column - self._first[row]]

    def forget(self, row: int, columns: int) -> None:
        """The first columns of a text are chosen."""
        held = self._held[row]
        while held and self._first[row] < columns:
            held.popleft()
            self._first[row] += 1

    def end(self, row: int) -> None:
        """The text has ended."""
        self._held[row] = None

    def _draw(self, like: Tensor) -> None:
        column = like.new_empty(len(self._held), like.shape[-1]).exponential_(1, generator=self.generator)
        for row, held in enumerate(self._held):
            if held is not None:
                held.append(column[row : row + 1])
