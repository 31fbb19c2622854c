"""The project around the package: workflows call targets that exist, forms parse, tools say what is missing."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import changelog, lowest, release

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
pytestmark = pytest.mark.skipif(not GITHUB.exists(), reason="an sdist has no workflows")
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = {*re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE)}
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in sorted((GITHUB / "workflows").glob("*.yml"))}
FORMS = {path.name: yaml.safe_load(path.read_text()) for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))}


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job["steps"]


def commands(workflow: dict[str, Any]) -> str:
    return "\n".join(step["run"] for step in steps(workflow) if "run" in step)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_calls_make_targets_that_exist(name: str) -> None:
    called = re.findall(r"\bmake (?:--\S+ )*([\w-]+)", commands(WORKFLOWS[name]))
    assert called
    assert set(called) - TARGETS == set()


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_is_well_formed(name: str) -> None:
    workflow = WORKFLOWS[name]
    assert workflow[True]  # yaml reads the key `on` so
    assert workflow["permissions"] == {"contents": "read"}
    assert all(("uses" in step) != ("run" in step) for step in steps(workflow))
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@[\w./]+", step["uses"]) for step in steps(workflow) if "uses" in step)
    for job in workflow["jobs"].values():
        needs = job.get("needs", [])
        assert {needs} if isinstance(needs, str) else set(needs) <= workflow["jobs"].keys()


def test_the_workflows_run_what_a_merge_needs() -> None:
    assert {"style", "types", "test-fast", "test-shapes", "lowest", "wheel-test", "docs", "notebooks", "changelog"} <= {
        *re.findall(r"make ([\w-]+)", commands(WORKFLOWS["ci.yml"]))
    }
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()


def test_phony_targets_are_all_that_there_are() -> None:
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)", MAKEFILE, re.MULTILINE)
    assert phony
    assert set(phony[1].replace("\\", "").split()) == TARGETS


def test_the_core_tests_exist() -> None:
    core = re.search(r"^CORE = ((?:.*\\\n)*.*)", MAKEFILE, re.MULTILINE)
    assert core
    files = [f"test_{name}.py" for name in core[1].replace("\\", "").split()]
    assert [name for name in files if not (ROOT / "tests" / name).exists()] == []


@pytest.mark.parametrize("name", [name for name in FORMS if name != "config.yml"])
def test_an_issue_form_is_one(name: str) -> None:
    form = FORMS[name]
    assert {"name", "description", "body"} <= form.keys()
    kinds = {field["type"] for field in form["body"]}
    assert kinds <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(re.fullmatch(r"[a-z]+", field["id"]) and field["attributes"]["label"] for field in asked)
    assert len({field["id"] for field in asked}) == len(asked)
    options = [field["attributes"]["options"] for field in asked if field["type"] in ("dropdown", "checkboxes")]
    assert all(len(each) > 1 for each in options)
    assert any(field.get("validations", {}).get("required") for field in asked)


def test_the_forms_ask_for_what_finds_a_cause() -> None:
    assert "python -m adadepth" in (GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    template = (GITHUB / "PULL_REQUEST_TEMPLATE.md").read_text()
    assert "On one machine" in template
    assert set(re.findall(r"`?make ([\w-]+)", template)) <= TARGETS
    assert set(re.findall(r"^make ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)) <= TARGETS


def test_the_hooks_are_those_of_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    names = {hook["id"] for repo in hooks for hook in repo["hooks"]}
    assert {"ruff-check", "ruff-format", "codespell", "types"} <= names
    assert all("rev" in repo for repo in hooks if repo["repo"] != "local")


def in_the_locales_encoding(source: str) -> list[str]:
    """Calls that read or write text and leave the encoding to the machine."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        given = [arg.value if isinstance(arg, ast.Constant) else None for arg in call.args]
        match call.func:
            case ast.Name(id="open"):
                text = "b" not in str(given[1:])
            case ast.Attribute(attr="open"):  # other things are opened too, without a mode
                text = bool(re.fullmatch("[rwax]t?", str(given[:1] and given[0])))
            case ast.Attribute(attr="read_text"):
                text = not given
            case ast.Attribute(attr="write_text"):
                text = len(given) < 2
            case _:
                text = False
        if text:
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize("folder", ["adadepth", "benchmarks", "docs", "examples", "tools"])
def test_text_is_read_and_written_as_utf_8_on_every_machine(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    sources = {path: path.read_text("utf-8") for path in files}
    for page in (ROOT / folder).rglob("*.md"):
        blocks = re.findall(r"^```python[^\n]*\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        sources[page] = "\n".join(block for block in blocks if "_text(" in block or "open(" in block)
    assert {path: found for path, source in sources.items() if (found := in_the_locales_encoding(source))} == {}


def test_what_leaves_the_encoding_to_the_machine_is_found() -> None:
    calls = [
        "p.read_text()",
        "p.read_text(errors='replace')",
        "p.write_text(a)",
        "open(p)",
        "open(p, 'w')",
        "p.open('a')",
    ]
    assert in_the_locales_encoding("\n".join(calls)) == calls
    named = 'p.read_text("utf-8"); p.write_text(a, "utf-8"); open(p, "rb"); p.open("ab"); source.open()'
    assert in_the_locales_encoding(named) == []


# The tools


def test_the_lowest_versions_are_those_of_the_project() -> None:
    text = '[project]\ndependencies = ["torch>=2.6", "einops>=0.8"]\n'
    assert lowest.lowest(text) == ["torch==2.6", "einops==0.8"]
    assert all("==" in line for line in lowest.lowest((ROOT / "pyproject.toml").read_text()))


MISSING = (
    "Expected a line in CHANGELOG.md for a change that users see, got none with changes to adadepth/gates.py. "
    "Add one under [Unreleased], or end a commit message with the line: Changelog: none"
)


@pytest.mark.parametrize(
    ("changed", "messages", "lines", "found"),
    [
        (["adadepth/gates.py", "README.md"], "A gate", [], MISSING),
        (["adadepth/gates.py"], "A gate", ["- A gate."], None),
        (["adadepth/gates.py"], "Shorter\n\nChangelog: none\n", [], None),
        (["tests/test_gates.py", "docs/adadepth/a.md"], "A test", [], None),
    ],
)
def test_a_change_that_users_see_needs_a_line(
    changed: list[str], messages: str, lines: list[str], found: str | None
) -> None:
    assert changelog.problem(changed, messages, lines) == found


def test_what_a_changelog_gains_stands_under_unreleased() -> None:
    before = "# Changelog\n\n## [Unreleased]\n\n- one\n\n## [0.1.0] - 2026-11-29\n\n- old\n"
    now = before.replace("- one", "### Added\n\n- one\n- two").replace("- old", "- old\n- late")
    assert changelog.gained(before, before) == []
    assert changelog.gained(before, now) == ["- two"]
    released = before.replace("- one", "## [0.2.0] - 2027-01-01\n\n- one")
    assert changelog.gained(before, released) == ["## [0.2.0] - 2027-01-01"]


def test_a_branch_without_a_line_is_told(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    def told() -> str:
        command = [sys.executable, str(ROOT / "tools" / "changelog.py"), "main"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout.strip()

    git("init", "--quiet", "--initial-branch=main")
    (tmp_path / "adadepth").mkdir()
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "begin")
    git("checkout", "--quiet", "-b", "branch")
    (tmp_path / "adadepth" / "gates.py").write_text("new = 1\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "a gate")
    assert told() == MISSING
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n\n- A gate.\n")
    git("commit", "--quiet", "-am", "its line")
    assert told() == "The changelog is up to date."


PACKAGE = '__version__ = "0.2.0"\n'
NOTES = "## [Unreleased]\n\n## [0.2.0] - 2027-01-01\n\n- new\n\n## [0.1.0] - 2026-11-29\n\n- old\n"
CITED = 'version: 0.2.0\ndate-released: "2027-01-01"\n'


@pytest.mark.parametrize(
    ("tag", "notes", "cited", "wrong"),
    [
        ("v0.2.0", NOTES, CITED, []),
        ("0.2.0", NOTES, CITED, ["Expected the tag v0.2.0, got 0.2.0. Set __version__ to it, or tag another commit."]),
        (
            "v0.2.0",
            NOTES.replace("0.2.0", "0.3.0"),
            CITED,
            ["Expected the heading `## [0.2.0] - <date>` in CHANGELOG.md, got none. Add it below [Unreleased]."],
        ),
        (
            "v0.2.0",
            NOTES.replace("[Unreleased]\n", "[Unreleased]\n\n- late\n"),
            "version: 0.2.0\n",
            [
                "Expected nothing under [Unreleased] in CHANGELOG.md, got lines. Move them to [0.2.0].",
                'Expected the line `date-released: "2027-01-01"` in CITATION.cff, got none. '
                "Set it as the changelog has it.",
            ],
        ),
    ],
)
def test_a_release_is_what_its_tag_says(tag: str, notes: str, cited: str, wrong: list[str]) -> None:
    assert release.problems(tag, PACKAGE, notes, cited) == wrong
    assert release.section(notes, "0.1.0") == "- old"


@pytest.mark.parametrize("args", [[], ["--notes"]])
def test_a_release_without_a_tag_is_told_what_it_lacks(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        release.main(args)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "python -m tools.release: error: the following arguments are required: TAG"


def test_the_changelog_has_a_section_for_the_version() -> None:
    version = re.findall(r'__version__ = "(.*)"', (ROOT / "adadepth" / "__init__.py").read_text())[0]
    assert release.section((ROOT / "CHANGELOG.md").read_text(), version)


def test_the_sdist_has_what_it_takes_to_test_it() -> None:
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"][
        "include"
    ]
    assert {"adadepth", "tests", "docs", "examples", "benchmarks", "tools", "Makefile", "mkdocs.yml"} <= set(include)
    assert [name for name in include if not (ROOT / name).exists()] == []
