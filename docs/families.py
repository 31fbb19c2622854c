"""Writes into the Hugging Face page which families are exact, as the tests find them.

From the root of a clone: `python docs/families.py`, about five minutes. `tests/test_hf_zoo.py` holds the list.
"""

import re
import sys
import textwrap
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers

HERE = Path(__file__).parent
PAGE = HERE / "hugging-face.md"
sys.path[:0] = [str(HERE.parent / "tests")]
zoo: Any = import_module("hf_exact")
kinds: list[str] = list(import_module("hf_small").SMALL)


def exact(kind: str) -> bool:
    """Whether it is, whole and sliced."""
    for span in zoo.SPANS.values():
        try:
            with zoo.Exact():
                model = zoo.adapted(kind, span)
        except ValueError:
            return False
        if found := zoo.faults(kind, model):
            raise SystemExit(f"{kind} is neither exact nor refused: {found}")
    return True


def main() -> None:
    """Try all of them, and write the page."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = [kind for kind in kinds if exact(kind)]
    names = textwrap.fill(", ".join(f"`{kind}`" for kind in found) + ".", 118, break_on_hyphens=False)
    said = (
        f"With transformers {transformers.__version__}, {len(found)} of the {len(kinds)} families that can be built "
        "small are exact, whole and sliced, and the others are refused. By `config.model_type`, the exact ones are"
    )
    text = f"<!-- exact -->\n{textwrap.fill(said, 118)}\n{names}\n<!-- end -->"
    page = re.sub(r"<!-- exact -->.*?<!-- end -->", lambda _: text, PAGE.read_text("utf-8"), flags=re.DOTALL)
    PAGE.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
