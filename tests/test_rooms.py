"""The order of the rooms: what a user composes in front, the machinery in wings, and no import that runs back."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import adadepth

pytestmark = pytest.mark.shapes

PACKAGE = Path(adadepth.__file__).parent
# From the bottom up: a room reads those in the lines before its own, and itself.
ORDER = [
    {"_called", "_extras", "_given", "_lazy", "_modes", "_nested", "_references", "_types"},
    {"_vocabulary"},
    {"masks", "depths", "selection", "gates", "rules", "updates", "ranks"},
    {"criteria"},
    {"attention"},
    {"cache"},
    {"loop"},
    {"losses", "calibration", "diagnostics", "flops", "serving"},
    {"budget"},
    {"testing"},
    {"hf", "viz"},
    {""},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}


def module(path: Path) -> str:
    """`loop.wrapper` of `adadepth/loop/wrapper.py`; the package itself is `""`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def read(name: str) -> set[str]:
    """Every module of ours that a module imports, anywhere in it."""
    path = MODULES[name]
    package = module(path) if path.name == "__init__.py" else name.rpartition(".")[0]
    return set(imported(ast.parse(path.read_text()), package))


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        parts = package.split(".") if package else []
        origin = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{origin}.{alias.name}".lstrip(".")
            yield inner if inner in MODULES else origin


def room(name: str) -> str:
    return name.partition(".")[0]


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room(name) for name in MODULES} == set(FLOOR)


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_no_room_reads_one_that_stands_above_it(name: str) -> None:
    own = room(name)
    above = {other for other in read(name) if room(other) != own and FLOOR[room(other)] >= FLOOR[own]}
    assert above == set()


def test_no_import_runs_in_a_circle() -> None:
    try:
        TopologicalSorter({name: read(name) - {name} for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"imports run in a circle: {' -> '.join(error.args[1])}")


def test_the_reader_of_imports_sees_what_is_there() -> None:
    assert {"attention.tokens", "cache.kv_reuse", "gates", "loop.trace"} <= read("loop.wrapper")
    tree = ast.parse("def f():\n    from ..gates import Gate\n    from . import trace")
    assert set(imported(tree, "loop")) == {"gates", "loop.trace"}


def test_dir_shows_what_is_public_and_nothing_else() -> None:
    assert dir(adadepth) == adadepth.__all__
    assert all(hasattr(adadepth, name) for name in adadepth.__all__)
    assert not any(name.startswith("_") for name in adadepth.__all__)
    machinery = {"attention", "cache", "loop", "gates", "rules"}
    assert not machinery & set(adadepth.__all__)
