"""Is this commit the release that its tag says? `python -m tools.release v0.1.0`, and `--notes` for its text."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main(args: Sequence[str] | None = None) -> int:
    """Print the release's notes or what is wrong; 1 if something is."""
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=__doc__)
    parser.add_argument("tag", metavar="TAG", help="of the release, such as v0.1.0")
    parser.add_argument("--notes", action="store_true", help="print its section of the changelog")
    parsed = parser.parse_args(args)
    package, changelog, citation = (
        (ROOT / name).read_text("utf-8") for name in ("adadepth/__init__.py", "CHANGELOG.md", "CITATION.cff")
    )
    wrong, tag = problems(parsed.tag, package, changelog, citation), parsed.tag
    print("\n".join(wrong) if wrong else section(changelog, tag[1:]) if parsed.notes else f"{tag} is ready.")
    return int(bool(wrong))


def problems(tag: str, package: str, changelog: str, citation: str) -> list[str]:
    """What does not fit, a sentence each."""
    version = re.findall(r'^__version__ = "(.*)"', package, re.MULTILINE)[0]
    if tag != f"v{version}":
        return [f"Expected the tag v{version}, got {tag}. Set __version__ to it, or tag another commit."]
    date = re.findall(rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$", changelog, re.MULTILINE)
    if not date:
        return [f"Expected the heading `## [{version}] - <date>` in CHANGELOG.md, got none. Add it below [Unreleased]."]
    wrong = []
    if section(changelog, "Unreleased"):
        wrong.append(f"Expected nothing under [Unreleased] in CHANGELOG.md, got lines. Move them to [{version}].")
    for line in (f"version: {version}", f'date-released: "{date[0]}"'):
        if line not in citation.splitlines():
            wrong.append(f"Expected the line `{line}` in CITATION.cff, got none. Set it as the changelog has it.")
    return wrong


def section(changelog: str, name: str) -> str:
    """What stands under the heading of a release, or of what is not released yet."""
    found = re.search(rf"^## \[{re.escape(name)}\][^\n]*\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


if __name__ == "__main__":
    sys.exit(main())
