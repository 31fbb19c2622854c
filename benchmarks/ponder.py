"""What `Ponder` costs beside softmax(h Wᵀ) E written plainly: time and peak memory.

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
from pathlib import Path

import torch
from torch import Tensor, nn

import adadepth as ad

from ._measure import interleave, machine, write_section

TOKENS, VOCABULARY, DIM = 2048, 50304, 512
Update = Callable[[Tensor, Tensor, Tensor], Tensor]


def make(
    tokens: int, vocabulary: int, dim: int, tied: bool
) -> tuple[dict[str, Update], Callable[[Update, bool], None]]:
    """Both updates of one input, and what runs one of them."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(vocabulary, dim), nn.Linear(dim, vocabulary, bias=False)
    if tied:
        head.weight = embedding.weight
    ponder = ad.Ponder(embedding, head)
    x, h, out = torch.randn(3, 1, tokens, dim).unbind()
    scores = torch.rand(1, tokens, 1)

    def plain(x: Tensor, h: Tensor, scores: Tensor) -> Tensor:
        return x + scores * (head(h).softmax(-1) @ embedding.weight)

    def run(update: Update, backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            new = update(x, h.requires_grad_(backward), scores)
        if backward:
            new.backward(out)
            embedding.weight.grad = head.weight.grad = h.grad = None

    return {"plain": plain, "Ponder": lambda x, h, scores: ponder(x, h, x, scores, 0)}, run


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def extra(name: str, backward: bool, tied: bool) -> int:
    """Peak bytes of one call above what the process holds before it."""
    small, run = make(64, 512, 64, tied)
    run(small[name], backward)  # libraries load and threads start
    updates, run = make(TOKENS, VOCABULARY, DIM, tied)
    before = resident("VmRSS")
    run(updates[name], backward)
    return resident("VmHWM") - before


def extra_elsewhere(name: str, backward: bool, tied: bool) -> int:
    flags = ["--backward"] * backward + ["--tied"] * tied
    command = [sys.executable, "-m", "benchmarks.ponder", "--memory-of", name, *flags]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def row(threads: int, backward: bool, tied: bool, repeats: int) -> str:
    torch.set_num_threads(threads)
    updates, run = make(TOKENS, VOCABULARY, DIM, tied)
    seconds = interleave({name: lambda u=u: run(u, backward) for name, u in updates.items()}, repeats)
    peak = {name: extra_elsewhere(name, backward, tied) for name in updates}
    cells = [str(threads), "tied" if tied else "untied", "forward + backward" if backward else "forward"]
    cells += [f"{seconds[name]:.2f}" for name in updates] + [f"{seconds['plain'] / seconds['Ponder']:.2f}"]
    cells += [f"{peak[name] / 2**20:.0f}" for name in updates] + [f"{peak['plain'] / peak['Ponder']:.1f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--memory-of", choices=("plain", "Ponder"), help="print the peak bytes of this one, and no more"
    )
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--tied", action="store_true")
    args = parser.parse_args()
    if args.memory_of:
        print(extra(args.memory_of, args.backward, args.tied))
        return
    lines = [
        "| threads | weights | pass | plain, s | Ponder, s | plain / Ponder | plain, MiB | Ponder, MiB | plain / Ponder |",
        "|" + "---|" * 9,
    ]
    print(machine(), *lines, sep="\n", flush=True)
    for threads in sorted({1, os.cpu_count() or 1}):
        for backward, tied in ((False, False), (True, False), (True, True)):
            lines.append(row(threads, backward, tied, args.repeats))
            print(lines[-1], flush=True)
    head = f"{TOKENS:,} tokens of {DIM}, a vocabulary of {VOCABULARY:,}, float32. Memory: the peak above what was held before "
    head += f"the call, gradients included.\n\n{machine()}\n\n"
    write_section("ponder", head + "\n".join(lines))


if __name__ == "__main__":
    main()
