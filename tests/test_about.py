"""`python -m adadepth`, and what the package says of itself in several files: version, date, address."""

import re
import runpy
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
import yaml

import adadepth
from adadepth import __main__ as about

ROOT = Path(__file__).parent.parent
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

REPORT = """\
adadepth      0.1.0
Python        3.11.7 on Linux x86_64
torch         2.6.0
einops        0.8.0
jaxtyping     missing
beartype      0.19.0
GPU           none that torch can use

Extras        (pip install 'adadepth[NAME]' completes one)
  hf          transformers 5.24.0, safetensors 0.4.0
  viz         missing: rich
  wide        first-package 1.0.0, second-package 1.0.0, third-package 1.0.0, fourth-package
              1.0.0
"""
VERSIONS = {"einops": "0.8.0", "beartype": "0.19.0", "transformers": "5.24.0", "safetensors": "0.4.0"}
WIDE = [f"{number}-package" for number in ("first", "second", "third", "fourth")]
REQUIRES = [
    "torch>=2.6",
    "transformers[serving]>=5.23; extra == 'hf'",
    'safetensors>=0.4 ; python_version > "3" and extra == "hf"',
    "adadepth[hf]; extra == 'viz'",
    "matplotlib>=3.8; extra == 'viz'",
    "rich; extra == 'viz'",
    "pytest>=8; extra == 'dev'",
    *(f"{package}; extra == 'wide'" for package in WIDE),
]


def number(package: str) -> str:
    versions = VERSIONS | {"matplotlib": "3.8.0"} | dict.fromkeys(WIDE, "1.0.0")
    if package not in versions:
        raise PackageNotFoundError(package)
    return versions[package]


def test_it_prints_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(about, "__version__", "0.1.0")
    monkeypatch.setattr(about, "version", number)
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    monkeypatch.setattr(about, "requires", lambda _: REQUIRES)
    monkeypatch.setattr("platform.python_version", lambda: "3.11.7")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(about, "gpu", lambda: "none that torch can use")
    about.main()
    assert capsys.readouterr().out == REPORT


def test_a_folder_that_is_not_installed_has_no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> list[str]:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(about, "requires", absent)
    assert about.extras() == {}


def test_an_extra_lacks_what_the_extras_of_its_packages_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    required = {
        "adadepth": ["transformers[serving, audio]>=5.23; extra == 'hf'", "adadepth[hf]; extra == 'all'"],
        "transformers": [
            "safetensors",
            "fastapi; extra == 'serving'",
            "beartype[door]; extra == 'audio'",
            "absent; extra == 'dev'",
        ],
        "beartype": ["uvicorn>=1; extra == 'door'", "beartype[door]; extra == 'all'"],
    }
    monkeypatch.setattr(about, "version", number)
    monkeypatch.setattr(about, "requires", required.get)
    every = ["transformers", "fastapi", "beartype", "uvicorn"]
    assert about.extras() == {"all": every, "hf": every}
    assert about.describe(about.extras()["hf"]) == "missing: fastapi, uvicorn"
    monkeypatch.setattr(about, "version", lambda package: "1")
    assert about.describe(about.extras()["hf"]) == "transformers 1, fastapi 1, beartype 1, uvicorn 1"


def test_the_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"H200 number {i}")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert about.gpu() == "H200 number 0, H200 number 1 (CUDA 12.8)"


def test_it_runs_as_a_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "adadepth.__main__")
    runpy.run_module("adadepth", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["adadepth", adadepth.__version__]
    assert lines[2].split() == ["torch", torch.__version__]


def test_version_and_date_are_the_same_everywhere() -> None:
    assert CITATION["version"] == adadepth.__version__
    heading = f"## [{CITATION['version']}] - {CITATION['date-released']}"
    headings = re.findall(r"^## .*", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["## [Unreleased]", heading]
    for page in ("README.md", "docs/citation.md"):
        bibtex = re.search(r"```bibtex\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        assert bibtex
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},$", bibtex[1], re.MULTILINE))
        assert fields["version"] == adadepth.__version__
        assert fields["year"] == CITATION["date-released"][:4]
        assert fields["title"].replace("{", "").replace("}", "") == CITATION["title"]
        assert fields["url"] == CITATION["repository-code"]


def test_one_address_is_the_project_s() -> None:
    address = PROJECT["urls"]["Repository"]
    assert CITATION["repository-code"] == address
    files = [ROOT / name for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "mkdocs.yml")]
    files += [path for folder in (".github", "docs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    text = "".join(path.read_text() for path in files if path.suffix in {".md", ".yml", ".toml"})
    assert set(re.findall(r"https://github\.com/[\w-]+/adadepth\b", text)) == {address}
    assert all(url.startswith(address) for url in PROJECT["urls"].values())


def test_the_readme_of_a_package_index_links_to_the_repository() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    text = """\
[a](docs/a.md), [b](#here) and [c](https://elsewhere.org/c), ![d](docs/d.svg) and [![e](docs/e.svg)](docs/e.md)
[two
lines](examples/f.py) <img alt="g" src="docs/g.svg"> <img src="https://elsewhere.org/g.svg">
"""
    for rule in settings["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    base = PROJECT["urls"]["Repository"]
    file, raw = f"{base}/blob/main", f"{base}/raw/main"
    assert (
        text
        == f"""\
[a]({file}/docs/a.md), [b](#here) and [c](https://elsewhere.org/c), ![d]({raw}/docs/d.svg) and \
[![e]({raw}/docs/e.svg)]({file}/docs/e.md)
[two
lines]({file}/examples/f.py) <img alt="g" src="{raw}/docs/g.svg"> <img src="https://elsewhere.org/g.svg">
"""
    )
