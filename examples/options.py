"""What the command lines of several examples check alike."""

from collections.abc import Mapping


def at_least_one(given: Mapping[str, int | None]) -> None:
    """Check numbers by the names of their options; None is an option that is not given.

    Raises: `SystemExit`, with one line for the user, if a number is below 1.
    """
    for option, number in given.items():
        if number is not None and number < 1:
            raise SystemExit(f"error: {option} expected at least 1, got {number}")
