"""The oldest packages that adadepth supports, as pip takes them: `python -m tools.lowest`."""

import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lowest(project: str) -> list[str]:
    """Each dependency, pinned to the lowest version that it allows."""
    return [line.replace(">=", "==") for line in tomllib.loads(project)["project"]["dependencies"]]


if __name__ == "__main__":
    print(*lowest(PROJECT.read_text("utf-8")))
