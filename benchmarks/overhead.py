"""What the wrapper costs: at fixed depth against a hand-written loop, and what its check of itself adds.

`python -m benchmarks.overhead` interleaves both in one run and prints wrapper / loop, best of several. The check runs
in the first pass that skips tokens: that pass, and a later one with and without the check switched on.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

from ._blocks import Layer, stack
from ._measure import interleave, machine, write_section

STEPS = 4


class ViewStack(nn.Module):
    """The same layers, written for adadepth. Without a view they attend by themselves."""

    takes_view = True

    def __init__(self, layers: int, dim: int, heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(layers))

    def forward(self, x: Tensor, view: ad.TokenView | None = None) -> Tensor:
        for layer in cast(Iterable[Layer], self.layers):
            q, k, v = layer.split(x)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True) if view is None else view.attend(q, k, v)
            x = layer.finish(x, attended)
        return x


def loop(block: nn.Module, x: Tensor) -> Tensor:
    for _ in range(STEPS):
        x = block(x)
    return x


def timed(
    call: Callable[[Tensor], Tensor], x: Tensor, backward: bool, params: list[nn.Parameter]
) -> Callable[[], None]:
    def once() -> None:
        with torch.set_grad_enabled(backward):
            out = call(x)
            if backward:
                torch.autograd.grad(out.sum(), params)

    return once


def ratio(
    block: nn.Module, shape: tuple[int, int, int], backward: bool, skip: bool, compiled: bool, repeats: int
) -> tuple[float, float]:
    """Wrapper over loop, and the loop's seconds for one pass of the block."""
    looped = ad.RecurrentWrapper(block, STEPS, skip=skip).eval()
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    wrapper, by_hand = (lambda x: looped(x).hidden), (lambda x: loop(block, x))
    if compiled:
        torch._dynamo.reset()
        wrapper, by_hand = torch.compile(wrapper, fullgraph=True), torch.compile(by_hand, fullgraph=True)
    params = list(block.parameters())
    best = interleave({n: timed(f, x, backward, params) for n, f in (("wrapper", wrapper), ("loop", by_hand))}, repeats)
    return best["wrapper"] / best["loop"], best["loop"] / STEPS


def self_check(block: nn.Module, shape: tuple[int, int, int], repeats: int) -> tuple[float, float, float]:
    """Seconds of a pass that skips tokens: without the check, of the first with it, and of a later one."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    depth = 1 + torch.arange(shape[0] * shape[1]).view(shape[:2]) % STEPS
    looped = {name: ad.RecurrentWrapper(block, STEPS).eval() for name in ("off", "first", "later")}
    looped["off"].self_check = False

    def run(name: str) -> Callable[[], None]:
        def once() -> None:
            with torch.no_grad():
                looped[name](x, max_depth=depth)

        return once

    def forget() -> None:
        looped["first"].block = block  # a block that is assigned has not been checked

    best = interleave({name: run(name) for name in looped}, repeats, {"first": forget})
    return best["off"], best["first"], best["later"]


def check_table(repeats: int) -> list[str]:
    """What the check costs where tokens are skipped."""
    lines = [
        "| block | input | a pass, ms | the first, with the check, ms | a later one / without the check |",
        "|---|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    for name, block, shape in (
        ("unmodified, 4 × 128", stack(4, 128, 4), (4, 16, 128)),
        ("unmodified, 4 × 128", stack(4, 128, 4), (4, 64, 128)),
        ("unmodified, 4 × 256", stack(4, 256, 4), (8, 256, 256)),
        ("takes a view, 4 × 128", ViewStack(4, 128, 4), (4, 64, 128)),
    ):
        off, first, later = self_check(block, shape, max(5, repeats // 10))
        size = " × ".join(map(str, shape))
        lines.append(f"| {name} | {size} | {off * 1e3:.1f} | {first * 1e3:.1f} | {later / off:.3f} |")
        print(lines[-1], flush=True)
    return lines


def cases() -> list[tuple[str, nn.Module, tuple[int, int, int], bool, float]]:
    """Name, block, shape of the input, compiled, limit."""
    return [
        ("takes a view, 4 × 128", ViewStack(4, 128, 4), (1, 64, 128), False, 1.03),
        ("takes a view, 4 × 128, compiled", ViewStack(4, 128, 4), (1, 64, 128), True, 1.03),
        ("unmodified, 4 × 128", stack(4, 128, 4), (1, 64, 128), False, 1.05),
        ("unmodified, 4 × 128, compiled", stack(4, 128, 4), (1, 64, 128), True, 1.03),
        ("unmodified, one token, 6 × 512", stack(6, 512, 8), (1, 1, 512), False, 1.05),
        ("unmodified, 4 × 256", stack(4, 256, 4), (4, 128, 256), False, 1.03),
        ("unmodified, 6 × 512", stack(6, 512, 8), (1, 512, 512), False, 1.03),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="more hide the overhead behind their own")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = ["| block | input | pass | one iteration, ms | packed | dense | limit |", "|---|---|---|---|---|---|---|"]
    print(machine(), *lines, sep="\n", flush=True)
    for name, block, shape, compiled, limit in cases():
        for backward in (False, True):
            cells, ms = [], math.inf
            for skip in (True, False):
                if skip and compiled:
                    cells.append("–")
                    continue
                repeats = min(args.repeats, 5 + int(args.repeats * 2**16 / math.prod(shape) / (2 + 4 * backward)))
                value, seconds = ratio(block, shape, backward, skip, compiled, repeats)
                cells.append(f"{value:.3f}{'' if value <= limit else ' **over**'}")
                ms = min(ms, seconds * 1e3)
            what = "forward + backward" if backward else "forward"
            size = " × ".join(map(str, shape))
            lines.append(f"| {name} | {size} | {what} | {ms:.2f} | {cells[0]} | {cells[1]} | {limit} |")
            print(lines[-1], flush=True)
    text = "Wrapper at fixed depth / hand-written loop over the same block, 4 iterations."
    check = "The wrapper's check of itself, in the first pass that skips tokens, on at most 4 rows of 64 tokens:"
    table = "\n".join(check_table(args.repeats))
    write_section("overhead", f"{text} {machine()}\n\n" + "\n".join(lines) + f"\n\n{check}\n\n{table}")


if __name__ == "__main__":
    main()
