"""The methods' pages show the compositions that are tested, and figures that can be drawn again."""

import ast
import io
import re
import runpy
import subprocess
import sys
import tokenize
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
COMPOSITIONS, METHODS = ROOT / "tests" / "compositions", ROOT / "docs" / "methods"
NAMES = sorted(path.stem for path in METHODS.glob("*.md") if path.stem != "index")
FIGURES = {f"{name}.svg" for name in NAMES}
Code = list[ast.stmt]


def shown(page: str) -> str:
    """The python blocks of a page."""
    return "\n".join(re.findall(r"^```python[^\n]*\n(.*?)^```$", (METHODS / f"{page}.md").read_text(), re.M | re.S))


def composition(name: str) -> str:
    return (COMPOSITIONS / f"test_{name.replace('-', '_')}.py").read_text()


def definitions(source: str) -> Code:
    """The definitions above the first test or fixture, but for what tests compare with."""
    found: Code = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and (node.name.startswith("test_") or node.decorator_list):
            break
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.endswith("_by_hand"):
            found.append(node)
    return found


def imports(source: str) -> set[str]:
    """One line for each name that is imported."""
    return {
        ast.unparse(type(node)(**(vars(node) | {"names": [alias]})))
        for node in ast.parse(source).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def other(source: str) -> Code:
    """What is not imported."""
    return [node for node in ast.parse(source).body if not isinstance(node, ast.Import | ast.ImportFrom)]


def statements(code: Code) -> list[str]:
    """Each statement, wherever its lines are broken."""
    for node in (node for statement in code for node in ast.walk(statement)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = " ".join(node.value.split())
    return [ast.unparse(node) for node in code]


def comments(source: str) -> str:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return " ".join(token.string.removeprefix("# ") for token in tokens if token.type == tokenize.COMMENT)


def test_every_composition_has_a_page_and_the_table_names_it() -> None:
    files = {path.stem.removeprefix("test_").replace("_", "-") for path in COMPOSITIONS.glob("test_*.py")}
    assert set(NAMES) == files - {"sources"}
    rows = re.findall(r"^\| \[[^]]+\]\(([a-z-]+)\.md\)", (METHODS / "index.md").read_text(), re.M)
    assert sorted(rows) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_the_code_that_is_tested(name: str) -> None:
    page, tested = shown(name), composition(name)
    assert statements(other(page)) == statements(definitions(tested))
    assert imports(page) <= imports(tested)
    assert comments(page) in comments(tested)
    assert f'title="tests/compositions/test_{name.replace("-", "_")}.py"' in (METHODS / f"{name}.md").read_text()


def test_the_index_shows_the_block_that_the_figures_are_measured_on() -> None:
    toy = (COMPOSITIONS / "toy.py").read_text()
    got = statements(other(shown("index")))
    assert any(statement.startswith("class Block") for statement in got)
    assert set(got) <= set(statements(other(toy)))
    assert imports(shown("index")) <= imports(toy)


@pytest.mark.parametrize("name", ["index", *NAMES])
def test_a_page_imports_what_its_code_uses_and_nothing_else(name: str) -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "--ignore", "F841", "-"]
    done = subprocess.run(ruff, input=shown(name), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_figure_stands_on_its_page_and_nowhere_else() -> None:
    assert {path.name for path in (METHODS / "figures").iterdir()} == FIGURES
    for name in ["index", *NAMES]:
        images = re.findall(r"!\[([^]]+)\]\((.+?)\)", (METHODS / f"{name}.md").read_text())
        assert [path for _, path in images] == ([] if name == "index" else [f"figures/{name}.svg"])
        assert all(len(text) > 40 for text, _ in images)  # says what is to be seen, for who cannot see it


@pytest.mark.every
def test_the_figures_can_be_drawn_again(tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, "-W", "error", METHODS / "draw.py", "--quick", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == FIGURES
    for folder in (METHODS / "figures", tmp_path):
        for name in FIGURES:
            assert ElementTree.parse(folder / name).getroot().tag.endswith("svg")
            assert (folder / name).stat().st_size < 60_000


def test_an_unknown_figure_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(METHODS))
    monkeypatch.setattr(sys, "argv", ["draw.py", "actt"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(METHODS / "draw.py"), run_name="__main__")
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("draw.py: error: no figure is called actt; there are act, ")
