"""What skipping is worth: packed against dense execution by live share.

`python -m benchmarks.skip` interleaves both in one run and prints packed / dense, best of several,
beside the limit (live share × 1.05 + 0.03). Depths are given from outside, so that both do the same.
"""

import argparse
import itertools

import torch
from torch import Tensor, nn

import adadepth as ad

from ._blocks import stack
from ._measure import interleave, machine, write_section

MODELS = {"6 × 512": (6, 512, 8), "4 × 256": (4, 256, 4)}
SHARES = (1.0, 0.9, 0.75, 0.5, 0.3)


def depths(batch: int, seq: int, steps: int, share: float, uneven: bool) -> Tensor:
    """Depths with the wanted live share: every row alike, or some rows all deep and others shallow."""
    generator = torch.Generator().manual_seed(0)
    if not uneven:
        return ad.uniform_depths((batch, seq), steps, share * steps, generator)
    deep = (share * steps - 1) / (steps - 1) * batch
    chance = (deep - torch.arange(batch)).clamp(0, 1).unsqueeze(1)
    return torch.where(torch.rand(batch, seq, generator=generator) < chance, steps, 1)


def run(looped: nn.Module, x: Tensor, depth: Tensor, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        hidden = looped(x, min_depth=depth, max_depth=depth).hidden
        if backward:
            hidden.sum().backward()
    looped.zero_grad(set_to_none=True)


def measure(block: nn.Module, dim: int, steps: int, depth: Tensor, backward: bool, repeats: int) -> float:
    """Packed time over dense time."""
    x = torch.randn(*depth.shape, dim, generator=torch.Generator().manual_seed(1))
    gate = ad.LinearGate(dim)
    both = {
        skip: ad.RecurrentWrapper(block, steps, gate, update=ad.Interpolate(), skip=skip).eval()
        for skip in (True, False)
    }
    best = interleave({str(skip): lambda m=m: run(m, x, depth, backward) for skip, m in both.items()}, repeats)
    return best["True"] / best["False"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose description contains this")
    args = parser.parse_args()
    lines = ["| model | steps | batch × seq | rows | pass | " + " | ".join(f"live {s}" for s in SHARES) + " |"]
    lines.append("|" + "---|" * (5 + len(SHARES)))
    print(machine(), *lines, sep="\n", flush=True)
    cases = itertools.product(MODELS, (2, 4), (1, 8), (128, 256, 512), (False, True), (False, True))
    for model, steps, batch, seq, uneven, backward in cases:
        if uneven and batch == 1:
            continue
        head = f"| {model} | {steps} | {batch} × {seq} | {'uneven' if uneven else 'even'} | "
        head += "forward + backward" if backward else "forward"
        if args.only not in head:
            continue
        layers, dim, heads = MODELS[model]
        cells = []
        for share in SHARES:
            if share * steps < 1:
                cells.append("–")
                continue
            depth = depths(batch, seq, steps, share, uneven)
            live = ad.live_share(ad.depth_mask(depth, steps))
            ratio = measure(stack(layers, dim, heads), dim, steps, depth, backward, args.repeats)
            limit = 1.02 if share == 1 else live * 1.05 + 0.03
            if batch * seq < 1024:
                limit = 1.1
            cells.append(f"{ratio:.2f} (≤ {limit:.2f}){'' if ratio <= limit else ' **over**'}")
        lines.append(" | ".join([head, *cells]) + " |")
        print(lines[-1], flush=True)
    if not args.only:
        write_section("skip", f"Packed time / dense time; in brackets the limit. {machine()}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
