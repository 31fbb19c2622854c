"""The reads of a pass from the device: each waits until all earlier work is done, so there should be few."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

Check = Callable[[list[float]], None]


@final
class Reads:
    """The reads of one pass. Values that are only checked are read together with the next values that are needed."""

    def __init__(self) -> None:
        self._later: list[tuple[Tensor, Check]] = []

    def later(self, values: Tensor, check: Check) -> None:
        """Have `check` called with the values `(n,)`, at the next read or at the end."""
        self._later.append((values, check))

    def counts(self, values: Tensor) -> list[int]:
        """Integers `(n,)` below 2**24, as a list.

        Raises: what a waiting check raises.
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
        """Run the checks that still wait.

        Raises: what a check raises.
        """
        if self._later:
            self.counts(self._later[0][0].new_zeros(0))
