"""Prints what is installed, for a bug report: `python -m adadepth`."""

import platform
import re
import textwrap
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import torch

from . import __version__

# Matches in a requirement such as `lm_eval[hf]>=0.4.13; extra == 'lm-eval'`: the package and the extra.
REQUIREMENT = re.compile(r"""([\w.-]+).*;.*\bextra\s*==\s*["']([\w-]+)["']""")
FOR_DEVELOPERS = {"dev", "docs"}


def main() -> None:
    """Print versions, the accelerators that torch can use, and for each extra what is installed or missing."""
    for name, value in report():
        print(textwrap.fill(f"{name:<14}{value}", 96, subsequent_indent=" " * 14, break_on_hyphens=False).rstrip())


def report() -> Iterator[tuple[str, str]]:
    """The lines of the report, each a name and a value."""
    yield "adadepth", __version__
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    for package in ("einops", "jaxtyping", "beartype"):
        yield package, found(package) or "missing"
    yield "GPU", gpu()
    yield "", ""
    yield "Extras", "(pip install 'adadepth[NAME]' completes one)"
    for extra, packages in extras().items():
        yield f"  {extra}", describe(packages)


def gpu() -> str:
    """The accelerators that torch can use."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{', '.join(names)} (CUDA {torch.version.cuda or torch.version.hip})"
    return "Apple MPS" if torch.backends.mps.is_available() else "none that torch can use"


def extras() -> dict[str, list[str]]:
    """The packages of each extra; none if adadepth runs from a folder and is not installed."""
    try:
        lines = requires("adadepth") or []
    except PackageNotFoundError:
        return {}
    packages: dict[str, list[str]] = {}
    for match in filter(None, map(REQUIREMENT.match, lines)):
        if match[2] not in FOR_DEVELOPERS and match[1] != "adadepth":
            packages.setdefault(match[2], []).append(match[1])
    return packages


def describe(packages: list[str]) -> str:
    """The versions of an extra's packages, or the names of those that are missing."""
    versions = {package: found(package) for package in packages}
    missing = [package for package, number in versions.items() if number is None]
    if missing:
        return f"missing: {', '.join(missing)}"
    return ", ".join(f"{package} {number}" for package, number in versions.items())


def found(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
