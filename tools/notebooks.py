"""Runs notebooks and writes what their cells give into them: `python -m tools.notebooks [FILE…]`, all without a name.

Their code is one Python program, so this needs no Jupyter. Jupyter and Colab run the same files.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
Outputs = list[dict[str, Any]]


def run(notebook: dict[str, Any], name: str) -> Iterator[Outputs]:
    """What each cell of code gives, in order and in one namespace."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code(notebook), 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            value = _evaluated("".join(cell["source"]), f"{name}, cell {number}", namespace)
        outputs: Outputs = []
        if printed.getvalue():
            outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
        if value is not None:
            outputs.append({"data": shown(value), "metadata": {}, "output_type": "display_data"})
        yield outputs


def code(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that run."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text(outputs: Outputs) -> str:
    """What is printed, or shown as text: pictures are not part of it."""
    return "".join(
        "".join(output["text"] if "text" in output else output["data"].get("text/plain", [])) for output in outputs
    )


def _evaluated(source: str, where: str, namespace: dict[str, Any]) -> Any:
    """Runs a cell; its value is that of its last line, where that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, where, "exec"), namespace)
    return eval(compile(ast.Expression(last.value), where, "eval"), namespace) if isinstance(last, ast.Expr) else None


def shown(value: Any) -> dict[str, Any]:
    """A value as a notebook shows it: figures as pictures, HTML as such, all else by its repr."""
    if hasattr(value, "savefig"):
        png = io.BytesIO()
        value.savefig(png, dpi=90)
        return {"image/png": base64.b64encode(png.getvalue()).decode()}
    if hasattr(value, "_repr_html_"):
        return {"text/html": _lines(value._repr_html_())}
    return {"text/plain": _lines(repr(value))}


def _lines(printed: str) -> list[str]:
    return printed.splitlines(keepends=True)


def main(files: list[str]) -> None:
    """Runs each and writes it."""
    torch.set_num_threads(1)
    for path in map(Path, files) if files else sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text("utf-8"))
        for number, (cell, outputs) in enumerate(zip(code(notebook), run(notebook, path.name), strict=True), 1):
            cell["execution_count"], cell["outputs"] = number, outputs
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(f"{path.name}: {len(code(notebook))} cells ran")


if __name__ == "__main__":
    main(sys.argv[1:])
