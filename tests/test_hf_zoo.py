# ruff: noqa: E402 (the whole file is skipped without transformers)
"""Every causal language model that the installed transformers can build small: exact, or refused in a sentence.

A third of those that are refused, and of the exact ones those that differ in kind, are tried whole or sliced;
`make test-every` tries the others, and the other way.
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


# One of a kind, of what a loop or a cache could do wrongly.
KINDS = {
    # attention: windows and sinks, caps, latents (of deepseek_v3), few keys, differences, clips and norms of queries
    "gpt_oss", "gemma2", "gpt_bigcode", "diffllama", "olmo", "exaone4",
    # positions: learned, rotated in pairs and in part or by halves, by layers, in three axes
    "opt", "gptj", "cohere2", "cohere_compass_text",
    # layers: in parallel, scaled, normed inside (before: gptj; after: exaone4; both: gemma2), with biases (opt)
    "gpt_neox", "granite", "bitnet",
    # experts: in the feed-forward part, in attention too, shared, fused, beside dense layers
    "mixtral", "jetmoe", "deepseek_v3", "dbrx", "afmoe",
    # models of other shapes: a decoder of an encoder, several towers, embeddings of each layer, caps of logits (gemma2)
    "whisper", "fuyu", "gemma4_unified_text",
}  # fmt: skip


def exact_families() -> set[str]:
    """Those that the page names."""
    listed = re.search(r"<!-- exact -->(.*?)<!-- end -->", PAGE.read_text(), re.S)
    assert listed is not None
    return set(re.findall(r"`([^`]+)`", listed[1]))


def cases() -> Iterator[Any]:
    exact = exact_families()
    for i, kind in enumerate(SMALL):
        seldom = kind not in KINDS if kind in exact else i % 3 > 0
        for j, part in enumerate(SPANS):
            every = i % 2 == j or seldom
            yield pytest.param(kind, part, marks=[pytest.mark.every] if every else [])


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
