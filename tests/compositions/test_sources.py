"""A composition is the code above the first test of its file: about 30 lines that use public names only."""

import ast
import inspect
from pathlib import Path

import pytest
import toy
from narrow import the

import adadepth as ad

FILES = [path for path in sorted(Path(__file__).parent.glob("test_*.py")) if path != Path(__file__)]


def public_names() -> set[str]:
    pieces = {name for name, value in vars(ad).items() if not (name.startswith("_") or inspect.ismodule(value))}
    return pieces | {"testing"}


def private_uses(source: str) -> list[str]:
    """The names that a source uses and that are private, of adadepth or of any object."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [n.name for n in names if "adadepth" in n.name and ast.unparse(n) != "adadepth as ad"]
            case ast.ImportFrom(module=str(module)) if "adadepth" in module:
                found.append(module)
            case ast.Attribute(value=ast.Name(id="ad"), attr=name) if name not in public_names():
                found.append(f"ad.{name}")
            case ast.Attribute(attr=name) if name.startswith("_") and name != "__init__":
                found.append(name)
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "vars" as name)):
                found.append(name)
    return found


def composition(source: str) -> list[str]:
    """The lines of a composition, without imports, docstrings, comments and blank lines."""
    lines: set[int] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and (node.name.startswith("test_") or node.decorator_list):
            break
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr):
            lines |= lines_of(node) - docstrings(node)
    stripped = [line.strip() for i, line in enumerate(source.splitlines(), 1) if i in lines]
    return [line for line in stripped if line and not line.startswith("#")]


def docstrings(tree: ast.AST) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            found |= lines_of(node.body[0])
    return found


def lines_of(node: ast.stmt) -> set[int]:
    return set(range(node.lineno, the(int, node.end_lineno) + 1))


@pytest.mark.parametrize("path", [*FILES, Path(toy.__file__)], ids=lambda path: path.stem)
def test_compositions_use_public_names_only(path: Path) -> None:
    assert private_uses(path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_method_is_about_thirty_lines(path: Path) -> None:
    lines = composition(path.read_text())
    assert any("ad.RecurrentWrapper(" in line for line in lines)
    assert len(lines) <= 32


def test_every_method_has_a_file() -> None:
    methods = "act fixed_prior huginn loop_transformer mixture_of_recursions ouro ponder_lm pondernet think_at_hard"
    methods += " tiny_recursive_models"
    assert [path.stem for path in FILES] == [f"test_{method}" for method in methods.split()]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import adadepth as ad\nad.RecurrentWrapper(block, 2).steps", []),
        ("import adadepth", ["adadepth"]),
        ("from adadepth.attention.tokens import TokenSet", ["adadepth.attention.tokens"]),
        ("ad.wrapper.RecurrentWrapper", ["ad.wrapper"]),
        ("ad.DenseTokens", ["ad.DenseTokens"]),
        ("looped._iterate(x)", ["_iterate"]),
        ("getattr(looped, name)", ["getattr"]),
    ],
)
def test_private_uses_are_found(source: str, found: list[str]) -> None:
    assert private_uses(source) == found


def test_docstrings_and_comments_are_not_counted() -> None:
    source = '''
"""Doc."""
import torch

class A:
    """Doc.

    More."""

    # why
    x = 1

def test_a():
    pass
'''
    assert composition(source) == ["class A:", "x = 1"]
