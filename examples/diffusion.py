"""A diffusion transformer whose points run as many iterations as they need: a DiT block, as it is, looped.

Each row is a set of points on a ring, a square or a spiral. The model is given noisy points, their time and the class
of the row, and predicts the velocity that takes noise to points (flow matching, arXiv 2210.02747, Eq. 23). The block
takes its condition as DiT does (arXiv 2212.09748, AdaLN-Zero), `(batch, dim)`, so it is wrapped in `RowPerToken`.

`python -m examples.diffusion` trains a model with all four iterations, and goes on from it in three ways: with all
four, with two for every point, and with hard exits at a mean of two. It draws points with each, and prints how far they
are from their shape, and the mean depth at each time.
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

SHAPES, POINTS, DIM, STEPS, BUDGET = ("ring", "square", "spiral"), 12, 48, 4, 2.0


def shape_of(kind: Tensor, at: Tensor) -> Tensor:
    """Points of shapes: `kind (batch, 1)` and places `at (batch, points)` along each in [0, 1) to `(..., 2)`."""
    turn = 2 * math.pi * at
    ring = torch.stack([turn.cos(), turn.sin()], -1)
    square = ring / ring.abs().amax(-1, keepdim=True)
    spiral = ring * at.unsqueeze(-1)
    return torch.stack([ring, square, spiral], -2).take_along_dim(kind[..., None, None], -2).squeeze(-2)


def draw(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Classes `(rows,)` and points of these shapes `(rows, POINTS, 2)`."""
    kind = torch.randint(len(SHAPES), (rows,), generator=generator)
    return kind, shape_of(kind.unsqueeze(1), torch.rand(rows, POINTS, generator=generator))


class DiTBlock(nn.Module):
    """As one has it: `x (batch, points, dim)` and one condition for each row, `c (batch, dim)`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(6, -1)
        x = x + gate * self.attend(self.norm(x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kind, self.point = nn.Embedding(len(SHAPES), DIM), nn.Linear(2, DIM)
        self.time = nn.Sequential(nn.Linear(8, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        # Every point attends to all others: causal=False.
        self.looped = ad.RecurrentWrapper(ad.RowPerToken(DiTBlock(DIM, heads=4)), STEPS, causal=False)
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 2))

    def forward(self, noisy: Tensor, time: Tensor, kind: Tensor) -> ad.Output:
        """Points `(batch, points, 2)`, times and classes `(batch,)`."""
        waves = time.unsqueeze(-1) * math.pi * 2.0 ** torch.arange(4)
        c = self.kind(kind) + self.time(torch.cat([waves.sin(), waves.cos()], -1))
        return self.looped(self.point(noisy), block_kwargs={"c": c.unsqueeze(1)})


def fixed(model: Model, steps: int) -> Model:
    """A copy with so many iterations for every point."""
    model = copy.deepcopy(model)
    model.looped.steps = steps
    return model


def with_exits(model: Model) -> Model:
    """A copy with hard exits and a gate that begins at full depth."""
    model = copy.deepcopy(model)
    model.looped.gate = ad.SharedMLPGate(DIM, hidden=16, bias=2.0)
    model.looped.rule = ad.SurvivalThreshold(0.3)
    model.looped.update = ad.SurvivalScaled(ad.Interpolate())
    return model


def train(model: Model, steps: int, budget: ad.DepthBudget | None = None) -> Model:
    """Flow matching; with a budget, a second loss holds the mean depth."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        kind, points = draw(64, generator)
        noise, time = torch.randn(points.shape, generator=generator), torch.rand(len(kind), generator=generator)
        out = model(torch.lerp(noise, points, time[:, None, None]), time, kind)
        loss = F.mse_loss(model.head(out.hidden), points - noise)
        if budget is not None:
            loss = loss + budget(out.trace)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


@torch.inference_mode()
def sample(model: Model, kind: Tensor, generator: torch.Generator, calls: int = 10) -> tuple[Tensor, Tensor]:
    """Points drawn in so many Euler steps, and the mean depth at each of them."""
    points, depths = torch.randn(len(kind), POINTS, 2, generator=generator), []
    for call in range(calls):
        out = model(points, torch.full((len(kind),), call / calls), kind)
        points = points + model.head(out.hidden) / calls
        depths.append(out.trace.depth.double().mean())
    return points, torch.stack(depths)


def distance(points: Tensor, kind: Tensor) -> float:
    """The mean distance of points from the nearest of their shape."""
    shape = shape_of(kind.unsqueeze(1), torch.linspace(0, 1, 200).expand(len(kind), -1))
    return torch.cdist(points, shape).amin(-1).mean().item()


def show(name: str, model: Model) -> None:
    kind = torch.arange(len(SHAPES)).repeat(64)
    points, depths = sample(model.eval(), kind, torch.Generator().manual_seed(1))
    print(f"{name:<18}distance {distance(points, kind):.3f}, mean depth {depths.mean():.2f}")
    print("  depth from noise to points:", " ".join(f"{depth:.1f}" for depth in depths))
    model.train()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    steps = parser.parse_args(arguments).steps
    torch.manual_seed(0)
    model = train(Model(), steps)
    show("four iterations", train(fixed(model, 4), steps))
    show("two iterations", train(fixed(model, 2), steps))
    show("hard exits", train(with_exits(model), steps, ad.DepthBudget(BUDGET)))


if __name__ == "__main__":
    main()
