"""What the study needs to know of a task: sizes, samples, and how a sequence is written."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """How many ids there are, how long a sequence is, and how many answers there are."""

    vocabulary: int
    length: int
    answers: int


class Sample(NamedTuple):
    """Sequences, and what is true of their tokens; each `(sequences, length)`, int64 but for `counted`, bool.

    Every token has an answer, `values`. `needed` are the iterations a token needs. Accuracy and loss are those of the
    tokens that are `counted`; the others have answers that need no reasoning.
    """

    ids: Tensor
    values: Tensor
    needed: Tensor
    counted: Tensor


class Task(Protocol):
    """A task whose needed depth is known for every token.

    `steps` are the iterations of the loop, `fixed` the depths at which models are trained as such, the last of them
    `steps`. `dense` is the number of distinct layers that cost what gates cost: the mean depth of the guided gates,
    rounded up. `training` are the steps of both stages that it takes to learn the task.
    """

    @property
    def name(self) -> str: ...
    @property
    def sizes(self) -> Sizes: ...
    @property
    def steps(self) -> int: ...
    @property
    def fixed(self) -> tuple[int, ...]: ...
    @property
    def dense(self) -> int: ...
    @property
    def training(self) -> tuple[int, int]: ...
    @property
    def introduction(self) -> str: ...

    def draw(self, count: int, generator: torch.Generator) -> Sample:
        """`count` random sequences."""

    def most(self, ids: Tensor) -> Tensor:
        """The most iterations that each token of `ids` can need, by its kind and its place alone; of the same shape."""

    def text(self, ids: Sequence[int]) -> list[str]:
        """The tokens of one sequence as one writes them."""
