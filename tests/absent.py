"""Modules of packages that may be absent. They import others of which nothing is called here, present or not."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that others import on the way, and that no block of ours calls."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        ours = name.split(".")[0] in self.packages
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Names(type):
    def __getattr__(cls, name: str) -> str:
        return name


class Anything(types.ModuleType):
    """A module in which every name is a class, whose every attribute is its name."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Names(name, (), {})


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Import with stand-ins for `packages`; afterwards nothing of them is left."""
    absent = Absent(*packages)
    installed = _pop(packages)
    sys.meta_path.insert(0, absent)
    try:
        yield
    finally:
        sys.meta_path.remove(absent)
        _pop(packages)
        sys.modules.update(installed)


def _pop(packages: tuple[str, ...]) -> dict[str, types.ModuleType]:
    """Remove the modules of packages from those that are imported."""
    return {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] in packages}


def load(module: str, *unused: str) -> Any:
    """A module of a package that may be absent: then the test is skipped. It imports `unused` for nothing we call."""
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with without(*unused):
        return importlib.import_module(module)
