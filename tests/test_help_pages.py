"""The help pages: messages are quoted as they stand in the source, evidence exists, and all cite the same."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^### `(.*)`$", TROUBLE, re.MULTILINE)


def rendered(node: ast.Constant | ast.JoinedStr) -> str:
    """A string or an f-string, with an ellipsis for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


def texts() -> list[str]:
    """All strings of the package; of a sum, its parts."""
    trees = (ast.parse(path.read_text()) for path in (ROOT / "adadepth").rglob("*.py"))
    return [rendered(n) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant | ast.JoinedStr)]


TEXTS = "\n".join(dict.fromkeys(text for text in texts() if " " in text))


def stands(message: str) -> bool:
    """An ellipsis is for what is filled in, and for what stands between two such things."""
    parts = message.removeprefix("… ").split("…")
    return re.search("[^\n]*?".join(map(re.escape, parts)), TEXTS) is not None


def test_a_message_stands_in_the_source() -> None:
    assert len(QUOTED) == TROUBLE.count("\n### ") > 20
    assert [message for message in QUOTED if not stands(message)] == []


def test_the_evidence_exists() -> None:
    named = re.findall(r"`(tests/\w+\.py)`", (ROOT / "docs" / "what-works.md").read_text())
    assert named and [name for name in named if not (ROOT / name).exists()] == []
