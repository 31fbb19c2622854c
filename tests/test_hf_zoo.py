# ruff: noqa: E402 (the whole file is skipped without transformers)
"""Every causal language model that the installed transformers can build small: exact, or refused in a sentence.

Each is tried whole or sliced; `make test-every` tries it both ways.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from hf_exact import SPANS, Exact, adapted, faults
from hf_small import SMALL

PAGE = Path(__file__).parent.parent / "docs" / "hugging-face.md"
SAME_VERSION = f"With transformers {transformers.__version__}, " in PAGE.read_text()


def exact_families() -> set[str]:
    """Those that the page names."""
    listed = re.search(r"<!-- exact -->(.*?)<!-- end -->", PAGE.read_text(), re.S)
    assert listed is not None
    return set(re.findall(r"`([^`]+)`", listed[1]))


def cases() -> Iterator[Any]:
    for i, kind in enumerate(SMALL):
        for j, part in enumerate(SPANS):
            yield pytest.param(kind, part, marks=[pytest.mark.every] if i % 2 == j else [])


@pytest.mark.filterwarnings("ignore")  # the models' own
@pytest.mark.parametrize(("kind", "part"), list(cases()))
def test_a_model_is_exact_or_refused(kind: str, part: str) -> None:
    # With another version of transformers fewer or more may be; none may be wrong.
    listed = kind in exact_families() if SAME_VERSION else None
    try:
        with Exact():
            model = adapted(kind, SPANS[part])
    except ValueError:
        assert listed is not True
        return
    assert not faults(kind, model)
    assert listed is not False or part == "whole"  # a model that loops some of its layers itself can be looped whole
