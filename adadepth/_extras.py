"""Imports of optional packages, each of which an extra installs."""

import importlib
from types import ModuleType


def need(module: str, extra: str) -> ModuleType:
    """Import `module`; if it is missing, the error names the extra that installs it.

    Raises: `ImportError` that names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise ImportError(f"{package} is not installed. Install it with: pip install 'adadepth[{extra}]'") from None
