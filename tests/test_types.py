"""Types as a user meets them: `typed_use` to pyright; mypy reads it in `make lint`, and `typed_use_hf`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import adadepth as ad

USE = Path(__file__).with_name("typed_use.py")


def test_pyright_finds_what_is_wrong_and_nothing_else() -> None:
    pytest.importorskip("basedpyright")
    checker = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, str(USE)]
    answer = subprocess.run(checker, cwd=USE.parents[1], capture_output=True, text=True, check=False)
    found = [
        (error["range"]["start"]["line"], error["message"]) for error in json.loads(answer.stdout)["generalDiagnostics"]
    ]
    wrong = [number for number, line in enumerate(USE.read_text().splitlines()) if "# type: ignore" in line]
    assert [line for line, _ in found] == wrong, found


@pytest.mark.parametrize("kind", [ad.RecurrentWrapper, ad.LinearGate, ad.Replace])
def test_the_types_of_a_call_are_not_there_when_it_runs(kind: type[nn.Module]) -> None:
    assert kind.__call__ is nn.Module.__call__
