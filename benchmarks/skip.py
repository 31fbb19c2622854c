"""What skipping is worth: packed against dense execution by live share.

`python -m benchmarks.skip` interleaves both in one run and prints packed / dense, best of several,
beside the limit (live share × 1.05 + 0.03). Depths are given from outside, so that both do the same.
"""

import argparse
import itertools
from functools import partial
from typing import NamedTuple

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


class Case(NamedTuple):
    model: str
    steps: int
    batch: int
    seq: int
    backward: bool

    def __str__(self) -> str:
        what = "forward + backward" if self.backward else "forward"
        return f"| {self.model} | {self.steps} | {self.batch} × {self.seq} | {what}"

    @property
    def depths(self) -> dict[tuple[bool, float], Tensor]:
        """The depths to measure, by evenness of the rows and wanted live share."""
        wanted = itertools.product((False, True), SHARES)
        return {
            (uneven, share): depths(self.batch, self.seq, self.steps, share, uneven)
            for uneven, share in wanted
            if share * self.steps >= 1 and not (uneven and (self.batch == 1 or share == 1))
        }

    def limit(self, live: float) -> float:
        if self.batch * self.seq < 1024:
            return 1.1
        return 1.02 if live == 1 else live * 1.05 + 0.03


def measure(case: Case, repeats: int) -> dict[tuple[bool, float], float]:
    """Packed time over dense time for each of the case's depths, all interleaved; dense time knows no depth."""
    layers, dim, heads = MODELS[case.model]
    block, gate = stack(layers, dim, heads), ad.LinearGate(dim)
    x = torch.randn(case.batch, case.seq, dim, generator=torch.Generator().manual_seed(1))
    packed, dense = (
        ad.RecurrentWrapper(block, case.steps, gate, update=ad.Interpolate(), skip=s) for s in (True, False)
    )
    named = {(uneven, share): f"{'uneven' if uneven else 'even'}, {share:.0%}" for uneven, share in case.depths}
    calls = {named[key]: partial(run, packed, x, depth, case.backward) for key, depth in case.depths.items()}
    some = next(iter(case.depths.values()))
    best = interleave({"dense": partial(run, dense, x, some, case.backward), **calls}, repeats)
    return {key: best[named[key]] / best["dense"] for key in case.depths}


def row(case: Case, uneven: bool, ratios: dict[tuple[bool, float], float]) -> str:
    cells = []
    for share in SHARES:
        if (uneven, share) not in ratios:
            cells.append("–")
            continue
        live = ad.live_share(ad.depth_mask(case.depths[uneven, share], case.steps))
        limit, ratio = case.limit(live), ratios[uneven, share]
        cells.append(f"{ratio:.2f} (live {live:.2f}, ≤ {limit:.2f}){' **over**' if ratio > limit else ''}")
    return " | ".join([str(case), "uneven" if uneven else "even", *cells]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose description contains this")
    args = parser.parse_args()
    lines = ["| model | steps | batch × seq | pass | rows | " + " | ".join(f"{s:.0%}" for s in SHARES) + " |"]
    lines.append("|" + "---|" * (5 + len(SHARES)))
    print(machine(), *lines, sep="\n", flush=True)
    for case in itertools.starmap(Case, itertools.product(MODELS, (2, 4), (1, 8), (128, 256, 512), (False, True))):
        if args.only not in str(case):
            continue
        # Small cases are noisy and cheap: as many runs as fill about the time of a large one.
        ratios = measure(case, max(args.repeats, args.repeats * 1024 // (case.batch * case.seq)))
        for uneven in (False, True)[: 1 + (case.batch > 1)]:
            lines.append(row(case, uneven, ratios))
            print(lines[-1], flush=True)
    if not args.only:
        text = "Packed time / dense time at wanted live shares; in brackets the live share and the limit."
        write_section("skip", f"{text} {machine()}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
