"""What the benchmarks share: timing in turn, the machine in words, and RESULTS.md by sections."""

import gc
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("RESULTS.md")
HEADER = "# Results\n\nWritten by the benchmarks, a section each: `python -m benchmarks.<section>`.\n"


def interleave(
    functions: Mapping[str, Callable[[], object]],
    repeats: int = 5,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """The best seconds of each function, called in turn so that a slow moment of the machine meets all.

    Each is called once unmeasured. The order turns round every time, so that none always follows the same.
    `before` is called before each of the same name, unmeasured.
    """
    best = dict.fromkeys(functions, float("inf"))
    prepare = before or {}
    for name, function in functions.items():
        prepare.get(name, _nothing)()
        function()
    gc.collect()
    for i in range(repeats):
        for name in list(functions) if i % 2 == 0 else list(functions)[::-1]:
            prepare.get(name, _nothing)()
            start = time.perf_counter()
            functions[name]()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def _nothing() -> None:
    pass


def machine() -> str:
    """Processor, cores, threads and torch in one line; the accelerator too, where there is one."""
    parts = [_cpu(), f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"torch {torch.__version__}", f"Python {platform.python_version()}"])


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text("utf-8"), re.MULTILINE) if info.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


def write_section(name: str, markdown: str) -> None:
    """Replace the section `## name` of RESULTS.md, or append it; the others stay as they are."""
    text = RESULTS.read_text("utf-8") if RESULTS.exists() else HEADER
    section = f"## {name}\n\n{markdown.strip()}\n"
    old = re.compile(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    text, replaced = old.subn(lambda _: section + "\n", text, count=1)
    if not replaced:
        text = f"{text.rstrip()}\n\n{section}"
    RESULTS.write_text(text.rstrip() + "\n", "utf-8")
