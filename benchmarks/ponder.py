"""What `Ponder` costs beside x + s·softmax(h Wᵀ) E written plainly: time and peak memory.

`python -m benchmarks.ponder` interleaves both in one run, at 2,048 tokens of 512 and a vocabulary of
50,304. Memory is the kernel's high-water mark of a process of its own for each, less what the process
held before the call: it counts everything, also the gradients of both tables and what the matrix
library takes for itself. It is read from /proc, so that part needs Linux.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import adadepth as ad

from ._measure import interleave, machine, write_section

TOKENS, VOCABULARY, DIM = 2048, 50304, 512
NAMES = ("plain", "Ponder")
COLUMNS = ["threads", "pass", "plain, s", "Ponder, s", "ratio", "plain, MiB", "Ponder, MiB", "ratio"]


def make(name: str, tokens: int, vocabulary: int, dim: int) -> Callable[[bool], None]:
    """What runs one of both once, with or without its backward pass."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(vocabulary, dim), nn.Linear(dim, vocabulary, bias=False)
    ponder = ad.Ponder(embedding, head)
    x, h, grad = torch.randn(3, 1, tokens, dim).unbind()
    scores = torch.rand(1, tokens, 1)

    def update() -> Tensor:
        if name == "plain":
            return x + scores * (head(h).softmax(-1) @ embedding.weight)
        return ponder(x, h, x, scores, 0)

    def run(backward: bool) -> None:
        h.requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            new = update()
        if backward:
            new.backward(grad)
            embedding.weight.grad = head.weight.grad = h.grad = None

    return run


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def extra(name: str, backward: bool) -> int:
    """Peak bytes of one call above what this process holds before it."""
    make(name, 64, 512, 64)(backward)  # libraries load and threads start
    run = make(name, TOKENS, VOCABULARY, DIM)
    before = resident("VmRSS")
    run(backward)
    return resident("VmHWM") - before


def extra_elsewhere(name: str, threads: int, backward: bool) -> int:
    command = [sys.executable, "-m", "benchmarks.ponder", "--memory-of", name, "--threads", str(threads)]
    command += ["--backward"] * backward
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def row(threads: int, backward: bool, repeats: int) -> str:
    torch.set_num_threads(threads)
    runs = {name: make(name, TOKENS, VOCABULARY, DIM) for name in NAMES}
    best = interleave({name: partial(run, backward) for name, run in runs.items()}, repeats)
    seconds = [best[name] for name in NAMES]
    peaks = [extra_elsewhere(name, threads, backward) / 2**20 for name in NAMES]
    cells = [str(threads), "forward + backward" if backward else "forward"]
    cells += [*(f"{s:.2f}" for s in seconds), f"{seconds[0] / seconds[1]:.2f}"]
    cells += [*(f"{p:.0f}" for p in peaks), f"{peaks[0] / peaks[1]:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--memory-of", choices=NAMES, help="print the peak bytes of this one, and no more")
    parser.add_argument("--backward", action="store_true", help="with --memory-of: the backward pass, too")
    args = parser.parse_args()
    if args.memory_of:
        torch.set_num_threads(args.threads[0])
        print(extra(args.memory_of, args.backward))
        return
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    print(machine(), *lines, sep="\n", flush=True)
    for threads in args.threads:
        for backward in (False, True):
            lines.append(row(threads, backward, args.repeats))
            print(lines[-1], flush=True)
    what = f"{TOKENS:,} tokens of {DIM}, a vocabulary of {VOCABULARY:,}, float32. Ratios: plain / Ponder. Memory: the "
    what += "peak above what was held before the call, the gradients of both tables included."
    write_section("ponder", "\n".join([what, "", machine(), "", *lines]))


if __name__ == "__main__":
    main()
