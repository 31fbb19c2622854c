"""Trained with soft exits and a depth budget, decoded with hard exits at a calibrated threshold.

Each number of a row points to an earlier place, or to its own. The model follows up to three pointers and names the
number it finds. Easy tokens need one iteration, hard ones more.

`python -m examples.soft_to_hard` trains a small causal loop with `Survival` exits, in which every token runs all
iterations, and holds their expected depth by `DepthBudget`. `calibrate` then finds the hard threshold of the same mean
depth, with which exited tokens are skipped. The model has never seen hard exits, so their loss is higher. A short
training with these exits and a frozen gate recovers most of it. The example prints the loss and the mean depth of each,
decoded with a cache where exits are hard.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

NUMBERS, LENGTH, DIM, STEPS, MEAN_DEPTH = 8, 12, 32, 4, 2.0


def draw(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and answers, both `(rows, LENGTH)`: place p points to place min(ids[p], p)."""
    ids = torch.randint(NUMBERS, (rows, LENGTH), generator=generator)
    points = torch.minimum(ids, torch.arange(LENGTH))
    at = points.gather(1, points.gather(1, points))
    return ids, ids.gather(1, at)


class Model(nn.Module):
    """The final norm stands in the head, outside the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.place = nn.Embedding(NUMBERS, DIM), nn.Embedding(LENGTH, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, 0.0, "gelu", batch_first=True, norm_first=True)
        gate = ad.SharedMLPGate(DIM, hidden=16, bias=1.0)
        self.looped = ad.RecurrentWrapper(ad.CausalEncoder(layer), STEPS, gate, ad.Survival())
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, NUMBERS))

    def forward(self, ids: Tensor, start: int = 0, **call: Any) -> ad.Output:
        """`start` is the place of the first id."""
        return self.looped(self.number(ids) + self.place.weight[start : start + ids.shape[1]], **call)


def soft_loss(model: Model, out: ad.Output, answers: Tensor) -> Tensor:
    """Each iteration's own loss, by the weight that exits there: every state must answer without the others."""
    losses = ad.per_iteration_loss(out.states, model.head, answers)
    return (out.trace.exit_probs * losses).sum(-1).mean()


def nats(model: Model, hidden: Tensor, answers: Tensor) -> Tensor:
    return F.cross_entropy(model.head(hidden).flatten(0, 1), answers.flatten())


def train(model: Model, steps: int, generator: torch.Generator, budget: ad.DepthBudget | None) -> None:
    """With a budget the exits are soft and the gate learns; without one the exits stay as they were found."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3 if budget else 2e-3)
    for _ in range(steps):
        ids, answers = draw(32, generator)
        if budget is None:
            loss = nats(model, model(ids).hidden, answers)
        else:
            out = model(ids, states=True)
            loss = soft_loss(model, out, answers) + budget(out.trace)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def decode(model: Model, ids: Tensor) -> tuple[Tensor, ad.KVReuseCache]:
    """The last states of all tokens, one at a time behind a prompt of four."""
    cache, parts = ad.KVReuseCache(), [ids[:, :4], *ids[:, 4:].split(1, 1)]
    starts = [0, *range(4, LENGTH)]
    hidden = [model(part, start, cache=cache).hidden for part, start in zip(parts, starts, strict=True)]
    return torch.cat(hidden, 1), cache


def harden(model: Model, generator: torch.Generator) -> None:
    """Puts in the hard rule that gives the wanted mean depth on other rows."""
    batches = draw(512, generator)[0].split(64)
    model.looped.rule = ad.calibrate(model, batches, MEAN_DEPTH, ad.SurvivalThreshold).rule


@torch.inference_mode()
def show(name: str, model: Model, rows: tuple[Tensor, Tensor]) -> None:
    ids, answers = rows
    if isinstance(model.looped.rule, ad.Survival):
        out = model.eval()(ids, states=True)
        loss, depth = soft_loss(model, out, answers), ad.expected_depth(out.trace)
    else:
        hidden, cache = decode(model.eval(), ids)
        loss, depth = nats(model, hidden, answers), cache.depth.double().mean()
    print(f"{name:<36}loss {loss:.3f}, mean depth {depth:.2f}")
    model.train()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of training with soft exits; half as many with hard")
    steps = parser.parse_args(arguments).steps
    torch.manual_seed(0)
    model, generator = Model(), torch.Generator().manual_seed(0)
    rows = draw(256, torch.Generator().manual_seed(1))

    train(model, steps, generator, ad.DepthBudget(MEAN_DEPTH))
    show("soft exits, all computed:", model, rows)
    harden(model, generator)
    show("hard exits at once:", model, rows)
    assert model.looped.gate is not None
    model.looped.gate.requires_grad_(False)
    train(model, steps // 2, generator, None)
    harden(model, generator)
    show("hard exits, trained with:", model, rows)


if __name__ == "__main__":
    main()
