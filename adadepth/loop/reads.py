"""What a pass reads of the device: each read waits until all that came before has run, so there are few."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

Check = Callable[[list[float]], None]


@final
class Reads:
    """The reads of one pass. What is only checked is read together with what is needed next."""

    def __init__(self) -> None:
        self._later: list[tuple[Tensor, Check]] = []

    def later(self, values: Tensor, check: Check) -> None:
        """See that `check` is called with some values `(n,)`, with the next read or at the end."""
        self._later.append((values, check))

    def counts(self, values: Tensor) -> list[int]:
        """Integers `(n,)` as such, below 2**24.

        Raises: what a check raises that was due.
        """
        if not self._later:
            return values.tolist()
        later, self._later = self._later, []
        read = torch.cat([values.float(), *(each.float() for each, _ in later)]).tolist()
        start = len(values)
        for each, check in later:
            check(read[start : start + len(each)])
            start += len(each)
        return [int(value) for value in read[: len(values)]]

    def rest(self) -> None:
        """Check what is still due.

        Raises: what a check raises.
        """
        if self._later:
            self.counts(self._later[0][0].new_zeros(0))
