"""Does a change that users see have its line in CHANGELOG.md? `python -m tools.changelog BASE`.

What users see is the package and what it needs: `adadepth/` and `pyproject.toml`. A change there that they do not see
says so in a commit message, in a line of its own: `Changelog: none`.
"""

import re
import subprocess
import sys

VISIBLE = re.compile(r"adadepth/|pyproject\.toml$")
NONE = re.compile(r"^Changelog: none$", re.MULTILINE)


def main() -> int:
    """0 if all is well, and 1 behind a sentence that says what to do."""
    (base,) = sys.argv[1:]
    changed = git("diff", "--name-only", f"{base}...HEAD").splitlines()
    found = problem(changed, git("log", "--format=%B", f"{base}..HEAD"), added(base))
    print(found or "The changelog is up to date.")
    return int(bool(found))


def problem(changed: list[str], messages: str, lines: list[str]) -> str | None:
    """What is missing, given the changed files, the commit messages and the lines that CHANGELOG.md gained."""
    visible = [path for path in changed if VISIBLE.match(path)]
    if not visible or lines or NONE.search(messages):
        return None
    return (
        f"Expected a line in CHANGELOG.md for a change that users see, got none with changes to {', '.join(visible)}. "
        "Add one under [Unreleased], or end a commit message with the line: Changelog: none"
    )


def added(base: str) -> list[str]:
    """What CHANGELOG.md gained: lines under [Unreleased], or the heading of a release."""
    then = git("merge-base", base, "HEAD").strip()
    return gained(git("show", f"{then}:CHANGELOG.md"), git("show", "HEAD:CHANGELOG.md"))


def gained(before: str, now: str) -> list[str]:
    """The new lines under [Unreleased], and the new headings of releases."""
    section = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", now, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^[^#\n].*", section[1] if section else "", re.MULTILINE)
    return [line for line in [*lines, *re.findall(r"^## .*", now, re.MULTILINE)] if line not in before.splitlines()]


def git(*arguments: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
