"""What a user gets: few imports, one version, a README that runs, errors that name an extra."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from narrow import the

import adadepth
from adadepth._extras import need

ROOT = Path(__file__).parent.parent
CORE = {"torch", "einops", "jaxtyping", "beartype"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.plain
def test_the_import_needs_only_the_four_core_packages() -> None:
    listing = "print(*{m.partition('.')[0] for m in sys.modules})\n"
    code = f"import sys, torch, einops, jaxtyping, beartype\n{listing}import adadepth\n{listing}"
    theirs, ours = (set(line.split()) for line in python(code).splitlines())
    assert ours - theirs - set(sys.stdlib_module_names) == {"adadepth"}


def test_the_declared_dependencies_are_these() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {the(re.Match, re.match(r"\w+", line))[0] for line in project["dependencies"]} == CORE
    assert "version" in project["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", adadepth.__version__)


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(ImportError) as error:
        need("no_such_package.inside", "viz")
    assert str(error.value) == ("no_such_package is not installed. Install it with: pip install 'adadepth[viz]'")
    assert need("json", "viz").dumps(1) == "1"


README = (ROOT / "README.md").read_text()
BLOCK = r"^## ([^\n]*)\n(?:(?!## |```)[^\n]*\n)*```python\n(.*?)```\n\n```text\n(.*?)```"
SHOWN = re.findall(BLOCK, README, re.DOTALL | re.MULTILINE)


@pytest.mark.plain
def test_all_code_in_the_readme_is_shown_with_what_it_prints() -> None:
    assert len(SHOWN) == README.count("```python") == README.count("```text") > 2


@pytest.mark.plain
def test_the_readme_runs_and_prints_what_it_says() -> None:
    """Each block in a namespace of its own, all in one process: importing takes the longest."""
    codes, end = [code for _, code, _ in SHOWN], "<end>\n"
    got = python(f"for code in {codes!r}:\n    exec(code, {{'__name__': '__main__'}})\n    print({end!r}, end='')")
    assert dict(zip((title for title, *_ in SHOWN), got.split(end), strict=False)) == {
        title: printed for title, _, printed in SHOWN
    }


def test_wrapper_reads_in_one_sitting_and_names_no_paper() -> None:
    text = (ROOT / "adadepth" / "loop" / "wrapper.py").read_text()
    assert text.count("\n") <= 250
    assert not re.search(r"arXiv|et al|ponder|huggingface|adaponder", text, re.IGNORECASE)
