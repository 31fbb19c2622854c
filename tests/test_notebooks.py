"""The notebooks run, print what they show, and are as Jupyter writes them."""

import json
import re
from typing import Any

import pytest
import torch

from tools import notebooks

pytestmark = pytest.mark.plain
ALL = {path.stem: json.loads(path.read_text()) for path in sorted(notebooks.FOLDER.glob("*.ipynb"))}


# Those that train take longer; CI runs all of them, by make notebooks.
RUN = [pytest.param(name, marks=[] if name == "wrap_your_own_block" else [pytest.mark.every]) for name in ALL]


@pytest.mark.parametrize("name", RUN)
def test_a_notebook_prints_what_it_shows(name: str) -> None:
    pytest.importorskip("matplotlib")
    if "hugging_face" in name:
        pytest.importorskip("transformers")
    torch.manual_seed(987654)  # what is random in it, it seeds itself
    cells = notebooks.code(ALL[name])
    for cell, got in zip(cells, notebooks.run(ALL[name], name), strict=True):
        assert without_numbers(got) == without_numbers(cell["outputs"])


def without_numbers(outputs: list[dict[str, Any]]) -> str:
    """Training rounds otherwise on other machines."""
    return re.sub(r"[\d.,]+", "0", notebooks.text(outputs))


@pytest.mark.parametrize("name", ALL)
def test_a_notebook_is_complete(name: str) -> None:
    notebook = ALL[name]
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = notebooks.code(notebook)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert notebook["cells"][0]["source"][0].startswith("# ")


def test_the_runner_shows_the_last_value_of_a_cell() -> None:
    cells = [{"cell_type": "code", "source": [line]} for line in ("x = 2\nprint('a')\nx + 1", "x", "del x")]
    got = [notebooks.text(outputs) for outputs in notebooks.run({"cells": cells}, "made here")]
    assert got == ["a\n3", "2", ""]
