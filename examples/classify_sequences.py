"""Depth is not only for language models: a classifier of sequences that runs as often as its question needs.

A row is a set of nodes in two chains: each has a name and points to another by that name, or at the end of its chain
to a class. The class token asks for the class at the end of the chain on which some node stands; to name one of the two
that are there is right in half of the cases. One attention follows one pointer, so a question of n hops takes n
iterations. The block is an `nn.TransformerEncoderLayer` as it is. Only the class token thinks: the nodes, which are
there to be read, are given one iteration from outside.

`python -m examples.classify_sequences` trains at full depth, then lets the class token leave by survival gates, and
prints by hops how often it is right and how deep it went, beside one pass trained alike and the same weights held at
each depth. `--quick` asks for fewer hops and trains for less.
"""

import argparse
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

CLASSES, DIM = 4, 32


class Rows(NamedTuple):
    """Ids `(batch, seq)` of names and of what they point to, the class token first; labels and hops `(batch,)`."""

    names: Tensor
    points_to: Tensor
    mask: Tensor
    labels: Tensor
    hops: Tensor


def draw(batch: int, hops: int, longest: int, generator: torch.Generator) -> Rows:
    """Rows of two equally long chains of up to `longest` nodes, asked for from 1 to `hops` hops before an end."""
    asked = torch.randint(1, hops + 1, (batch, 1), generator=generator)
    length = asked + (torch.rand(batch, 1, generator=generator) * (longest + 1 - asked)).long()
    nodes = torch.rand(batch, 2 * longest, generator=generator).argsort(1)
    chains = nodes.unflatten(1, (2, longest))  # each from its end
    ends = torch.rand(batch, CLASSES, generator=generator).argsort(1)[:, :2]
    targets = torch.cat([2 * longest + ends.unsqueeze(2), chains[..., :-1]], 2)
    return Rows(
        names=F.pad(nodes, (1, 0), value=2 * longest + CLASSES),
        points_to=torch.cat([chains[:, 0].gather(1, asked - 1), targets.flatten(1)], 1),
        mask=F.pad(ad.depth_mask(length.expand(batch, 2), longest).flatten(1), (1, 0), value=True),
        labels=ends[:, 0],
        hops=asked.squeeze(1),
    )


class Classifier(nn.Module):
    """The raw residual stream is fed back; the final norm stands in the head, outside the loop."""

    def __init__(self, steps: int, longest: int) -> None:
        super().__init__()
        self.ids = nn.Embedding(2 * longest + CLASSES + 1, DIM)
        nn.init.normal_(self.ids.weight, std=0.3)
        self.pointer = nn.Linear(DIM, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, 0.0, "gelu", batch_first=True, norm_first=True)
        self.looped = ad.RecurrentWrapper(layer, steps, update=ad.SurvivalScaled(ad.Interpolate()), causal=False)
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES))

    def forward(self, rows: Rows, held: int | None = None) -> tuple[Tensor, ad.Trace]:
        """Logits of the class tokens `(batch, classes)`; `held` is a depth that they must run."""
        x = self.ids(rows.names) + self.pointer(self.ids(rows.points_to))
        most = torch.ones_like(rows.names)
        most[:, 0] = self.looped.steps if held is None else held
        hidden, trace, _ = self.looped(x, mask=rows.mask, min_depth=None if held is None else most, max_depth=most)
        return self.head(hidden[:, 0]), trace


def train(model: Classifier, hops: int, steps: int, lr: float, grow: bool, generator: torch.Generator) -> None:
    """Questions of up to `hops` hops, which `grow` reaches from one; a gate, if there is one, learns to let go."""
    gate = model.looped.gate
    penalty = ad.BottomKPenalty(k_max=0.8, warmup=(steps // 10, steps * 6 // 10))
    groups: list[dict[str, Any]] = [{"params": [p for name, p in model.named_parameters() if "gate" not in name]}]
    if gate is not None:
        groups.append({"params": gate.parameters(), "lr": 1e-3})  # slow: what closed too early gets no gradient
    optimiser = torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 50, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        now = min(hops, 1 + int(hops * step / (0.7 * steps))) if grow else hops
        rows = draw(64, now, hops, generator)
        logits, trace = model(rows)
        loss = F.cross_entropy(logits, rows.labels)
        if gate is not None:
            loss = loss + 0.5 * penalty(trace.survival[:, :1], trace.live[:, :1], step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()


def fit(hops: int, steps: int, stages: tuple[int, int], seed: int) -> Classifier:
    """A classifier of at most `steps` iterations: trained at full depth, then with exits where it has several."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Classifier(steps, hops)
    train(model, hops, stages[0], lr=5e-3, grow=True, generator=generator)
    if steps > 1:
        model.looped.gate = ad.PerIterationMLPGate(DIM, steps, hidden=16, bias=4.0)  # open at first
        model.looped.rule = ad.SurvivalThreshold(0.1)
    train(model, hops, stages[1], lr=2.5e-3, grow=False, generator=generator)
    return model


@torch.no_grad()
def measure(model: Classifier, rows: Rows, held: int | None = None) -> tuple[Tensor, Tensor]:
    """Whether each row's class is found, and how many iterations its class token took; both `(batch,)`."""
    logits, trace = model.eval()(rows, held)
    model.train()
    return logits.argmax(-1) == rows.labels, trace.depth[:, 0]


def line(name: str, values: Tensor, hops: Tensor) -> str:
    """The means of `values (batch,)` by hops, and over all."""
    means = [values[hops == n].double().mean() for n in hops.unique()] + [values.double().mean()]
    return f"{name:<22}" + "".join(f"{mean:6.2f}" for mean in means)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer hops, fewer steps of training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    hops, stages = (3, (250, 300)) if args.quick else (6, (600, 1000))
    once, often = (fit(hops, steps, stages, args.seed) for steps in (1, hops))

    rows = draw(2000, hops, hops, torch.Generator().manual_seed(args.seed + 1_000_000))
    print(f"{'hops':<22}" + "".join(f"{n:6}" for n in range(1, hops + 1)) + "   all")
    print(line("right: one pass", measure(once, rows)[0], rows.hops))
    for depth in range(1, hops + 1):
        print(line(f"right: held at {depth}", measure(often, rows, depth)[0], rows.hops))
    right, taken = measure(often, rows)
    print(line("right: free to leave", right, rows.hops))
    print(line("iterations taken", taken, rows.hops))


if __name__ == "__main__":
    main()
