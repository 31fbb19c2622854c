"""Drafts: a token's successor is guessed before its last iteration, and begins at once. Whether that pays."""

from typing import final

# Of how many that may be made one is made where they do not pay, to see whether they would now.
PROBE = 32
_MEMORY = 0.9  # weight of what was known, beside one more observation


@final
class Drafts:
    """How a token's successor is guessed, and whether to guess: what guesses came to, and what calls cost.

    A guess costs no result: it is compared with what is chosen in the end, and dropped where it was wrong. It
    saves the iterations that the successor has run by then, as far as a call that is made anyway had room for them.

    Arguments:
        depth: the iterations of a token after which its successor is guessed.
        revise: whether to guess again after each later iteration, and to begin anew where the guess has changed.
        always: whether to guess also where that does not pay.

    Attributes: `right` and `wrong`, how many guesses were which.
    Raises: `ValueError` for a depth below 1.
    """

    def __init__(self, depth: int, revise: bool = False, always: bool = False) -> None:
        if depth < 1:
            raise ValueError(
                f"draft_depth expected the iterations after which the next token is guessed, 1 or more, got {depth}."
            )
        self.depth, self.revise, self.always = depth, revise, always
        self.right = self.wrong = 0
        self.calls, self.reads = Line(), Line()  # seconds by tokens of a call, by states of a readout
        self._saved = self._lost = self._read = 0.0
        self._asked = 0

    @property
    def agreement(self) -> float:
        """The share of guesses that were right; 1 before any was made."""
        return self.right / (self.right + self.wrong) if self.right + self.wrong else 1.0

    def resolved(self, right: bool, saved: int, lost: int, reads: int) -> None:
        """What a guess came to: iterations that were run early, or for nothing, and readouts for it."""
        self.right += right
        self.wrong += not right
        old = min(_MEMORY, 1 - 1 / (self.right + self.wrong))
        for name, new in (("_saved", saved), ("_lost", lost), ("_read", reads)):
            setattr(self, name, old * getattr(self, name) + (1 - old) * new)

    def pays(self, rows: int) -> bool:
        """Whether to guess, where the tokens of so many rows share a call.

        A call that is not made saves each row its part of what a call costs whatever it runs. Iterations of a wrong
        guess cost what a call costs more for a token; and a guess is read from a state.
        """
        if self.always or self.right + self.wrong < 4:
            return True
        if self._saved * self.calls.base / rows > self._lost * self.calls.slope + self._read * self.reads.slope:
            return True
        self._asked += 1
        return self._asked % PROBE == 0


@final
class Line:
    """The straight line through what was seen lately, `base + slope * x`; neither is below 0."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5

    def see(self, x: int, y: float) -> None:
        """One more point."""
        self._sums = [_MEMORY * old + new for old, new in zip(self._sums, (1, x, y, x * x, x * y), strict=True)]

    @property
    def slope(self) -> float:
        """How much more y is for one more x; 0 as long as all x were alike."""
        n, x, y, xx, xy = self._sums
        spread = n * xx - x * x
        return max(0.0, (n * xy - x * y) / spread) if spread > 1e-6 * n * n else 0.0

    @property
    def base(self) -> float:
        """What y is at 0."""
        n, x, y, _, _ = self._sums
        return max(0.0, (y - self.slope * x) / n) if n else 0.0
