"""`Drafts`: when the next token is guessed and started early, and whether this saves time."""

from typing import final

# While guesses do not save time, one of this many is still made, to measure whether they do now.
PROBE = 32
_MEMORY = 0.9  # the weight of earlier observations, next to one new observation


@final
class Drafts:
    """Decides when to guess the next token, from how earlier guesses turned out and how long calls take.

    A guess never changes a result: it is compared with the token that is chosen later, and dropped if it was wrong. A
    right guess saves the iterations that its token has run by then.

    Arguments:
        depth: the number of iterations of a token after which the next token is guessed.
        revise: whether to guess again after each later iteration, and to start again if the guess has changed.
        always: whether to guess even if this does not save time.

    Attributes: `right` and `wrong`, the numbers of right and of wrong guesses.
    Raises: `ValueError` for a depth below 1.
    """

    def __init__(self, depth: int, revise: bool = False, always: bool = False) -> None:
        if depth < 1:
            raise ValueError(
                f"draft_depth expected the iterations after which the next token is guessed, 1 or more, got {depth}."
            )
        self.depth, self.revise, self.always = depth, revise, always
        self.right = self.wrong = 0
        self.calls, self.reads = Line(), Line()  # seconds of a call by its tokens, of a run of the head by its states
        self._saved = self._wasted = self._head_calls = 0.0
        self._unprofitable = 0

    @property
    def agreement(self) -> float:
        """The share of guesses that were right; 1 before any was made."""
        return self.right / (self.right + self.wrong) if self.right + self.wrong else 1.0

    def resolved(self, right: bool, saved: int, wasted: int, head_calls: int) -> None:
        """Record a guess: the iterations it saved, those it wasted, and the runs of the head that it took."""
        self.right += right
        self.wrong += not right
        old = min(_MEMORY, 1 - 1 / (self.right + self.wrong))
        for name, new in (("_saved", saved), ("_wasted", wasted), ("_head_calls", head_calls)):
            setattr(self, name, old * getattr(self, name) + (1 - old) * new)

    def pays(self, rows: int) -> bool:
        """Whether to guess, if the tokens of this many rows share a call of the block.

        A call that is not needed saves each row its share of a call's fixed cost. The iterations of a wrong guess cost
        the time that each token adds to a call. Each guess also costs the time of one more state in the head.
        """
        if self.always or self.right + self.wrong < 4:
            return True
        if self._saved * self.calls.base / rows > self._wasted * self.calls.slope + self._head_calls * self.reads.slope:
            return True
        self._unprofitable += 1
        return self._unprofitable % PROBE == 0


@final
class Line:
    """The line `base + slope * x`, fitted to recent points. Neither `base` nor `slope` is below 0."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5

    def see(self, x: int, y: float) -> None:
        """Add a point."""
        self._sums = [_MEMORY * old + new for old, new in zip(self._sums, (1, x, y, x * x, x * y), strict=True)]

    @property
    def slope(self) -> float:
        """By how much y grows for each unit of x; 0 while all x are equal."""
        n, x, y, xx, xy = self._sums
        spread = n * xx - x * x
        return max(0.0, (n * xy - x * y) / spread) if spread > 1e-6 * n * n else 0.0

    @property
    def base(self) -> float:
        """The value of y at `x = 0`."""
        n, x, y, _, _ = self._sums
        return max(0.0, (y - self.slope * x) / n) if n else 0.0
