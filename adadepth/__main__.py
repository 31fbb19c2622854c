"""Prints what is installed, for a bug report: `python -m adadepth`."""

import platform
import re
import textwrap
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import torch

from . import __version__

# Matches in a requirement such as `lm_eval[hf]>=0.4.13; extra == 'lm-eval'`: the package, its own extras, the extra.
REQUIREMENT = re.compile(r"""([\w.-]+)\s*(?:\[([^]]*)\])?.*;.*\bextra\s*==\s*["']([\w-]+)["']""")
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
    names = {extra for _, _, extra in requirements("adadepth")} - FOR_DEVELOPERS
    return {extra: list(packages("adadepth", extra)) for extra in sorted(names)}


def packages(package: str, extra: str) -> Iterator[str]:
    """The packages that an extra of a package needs, also by their own extras."""
    for name, inner, of in requirements(package):
        if of != extra:
            continue
        if name != package:
            yield name
        for each in inner:
            yield from packages(name, each)


def requirements(package: str) -> Iterator[tuple[str, list[str], str]]:
    """What the extras of a package require: a package, with which of its extras, and by which extra."""
    try:
        lines = requires(package) or []
    except PackageNotFoundError:
        return
    for match in filter(None, map(REQUIREMENT.match, lines)):
        yield match[1], [each.strip() for each in (match[2] or "").split(",") if each.strip()], match[3]


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
