"""Optional packages, each in an extra of ours."""

import importlib
from types import ModuleType


def need(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises: `ImportError` that names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise ImportError(f"{package} is not installed. Install it with: pip install 'adadepth[{extra}]'") from None
