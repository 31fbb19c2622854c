"""`python -m examples.adaponderlm.cost`: what training costs at full scale, on paper: FLOPs, memory and hours.

Nothing is trained and no weights are made: models are built on the meta device and counted. What is assumed: how much
of its peak a GPU reaches (`--mfu`), and how deep tokens go once gates decide (`--depth`).

**FLOPs** of a pass are those of `adadepth.TokenFlops`. In training, the backward pass of a matrix product is two. In
attention and in the pondering update it is 2.5 times the forward pass, five products for two: both make again what
they did not keep. Checkpointed iterations run the layers once more.

**Memory** per token of `d` hidden units, `w` bytes in a matrix product (2 in bfloat16), in bytes, for the backward
pass: `(4 + 17w)·d` in each layer and iteration: its input in float32, and in `w` both norms' outputs, the projection
to queries, keys and values (3), rotated queries and keys (2), attention's answer (2), the MLP before and after its
nonlinearity (8). `8d` at the end of each iteration: the final norm's input and output. Between iterations `4d` of what
the update adds, `w·d` of a copy for the gate where `w < 4`, and `2w` for each hidden unit of the gate. With exits, the
keys and values that the next iteration needs, `12d` in each layer and iteration, and of all else what ran. 12 bytes
for each logit, when the loss is differentiated. With checkpointing of iterations, instead of all layers those of one.
What the allocator and the kernels hold beside that is not counted.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, final

import torch

import adadepth as ad

from .config import Config, Stage
from .model import build, head_of

SIZES = ("pythia-70m.yaml", "pythia-160m.yaml", "pythia-410m.yaml", "pythia-1.4b.yaml", "pythia-2.8b.yaml")
METHOD = "adaponder.yaml"
PEAK = 989e12  # FLOP/s of an H100 SXM in bfloat16, without sparsity, by its data sheet
HOLDS = 80  # GiB of an H100
STATE = 16  # bytes for a parameter: weight, gradient and both moments of AdamW, in float32
GIB = 2**30


class Memory(NamedTuple):
    """Bytes on one GPU: `states` of the optimiser, `copies` of weights and gradients beside them, `activations`."""

    states: float
    copies: float
    activations: float


@final
@dataclass(frozen=True)
class Costs:
    """The costs of one configuration, whose tokens have mean depth `depth` where a stage lets them leave."""

    config: Config
    depth: float

    @cached_property
    def model(self) -> "Counted":
        """Its sizes."""
        return count(self.config)

    def forward(self, depth: float) -> ad.Flops:
        """FLOPs of one token's pass at a mean depth: all run the first iteration, equally many each of the others."""
        steps, window = self.config.model.steps, self.config.data.window
        live = torch.zeros(1, window, steps, dtype=torch.bool)
        live[..., 0] = True
        live[:, : round(window * (depth - 1) / max(1, steps - 1)), 1:] = True
        return ad.Flops(*(part / window for part in self.model.flops.count(live)))

    def step(self, depth: float) -> float:
        """FLOPs that training spends on one token."""
        run = self.forward(depth)
        total = 3 * (run.block + run.gate + run.once) + 3.5 * (run.attention + run.update)
        return total + self.config.train.checkpointing * (run.block + run.attention)

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.config.train.steps * self.config.train.batch * self.config.data.window

    def run(self) -> float:
        """FLOPs of all stages."""
        stages = self.config.stages.values()
        return self.tokens * sum(stage.share * self.step(self._depth(stage)) for stage in stages)

    def _depth(self, stage: Stage) -> float:
        """The mean depth of a stage's tokens."""
        steps = self.config.model.steps
        if isinstance(stage.depth, int):
            return stage.depth
        if stage.depth == "random":
            prior = ad.depth_prior("uniform" if stage.prior == "none" else stage.prior, steps, stage.rate)
            return float((prior * torch.arange(1, steps + 1)).sum())
        depths = {"full": steps, "exits": self.depth, "alternate": (steps + self.depth) / 2}
        return depths.get(stage.depth, stage.mean)

    def memory(self, gpus: int, *, sharded: bool, checkpointing: bool) -> Memory:
        """On each of so many GPUs, at the worst moment of the worst stage.

        Under autocast there is a copy of all weights in bfloat16; under DDP, one of all gradients. FSDP2 holds both, in
        bfloat16, of two layers and of what is in no layer; and all gradients in float32 where a step is several
        passes, since it then waits with the exchange.
        """
        model, train = self.model, self.config.train
        half = train.precision == "bf16"
        if sharded:
            layer = model.layers / self.config.model.shape.num_hidden_layers
            several = (train.micro or train.batch) * gpus < train.batch
            copies = 4 * (model.total - model.layers + 2 * layer) + 4 * model.total * several
        else:
            copies = 2 * model.total * half + 4 * model.total * (gpus > 1)
        states = STATE * model.total / (gpus if sharded else 1)
        return Memory(states, copies, self.activations(checkpointing))

    def activations(self, checkpointing: bool) -> float:
        """Bytes of one pass over `train.micro` rows: see above."""
        depths = {(self._depth(stage), stage.depth in ("exits", "alternate")) for stage in self.config.stages.values()}
        per_token = max(activations(self.config, depth, exits, checkpointing) for depth, exits in depths)
        rows = self.config.train.micro or self.config.train.batch
        return rows * self.config.data.window * per_token

    def hours(self, gpus: int, mfu: float) -> float:
        """Of the whole run."""
        return self.run() / (gpus * PEAK * mfu) / 3600


def activations(config: Config, depth: float, exits: bool, checkpointing: bool) -> float:
    """Bytes per token of the batch, at the worst moment of a training step: see the head of this file."""
    shape, steps, gate = config.model.shape, config.model.steps, config.model.gate
    d, w = shape.hidden_size, 2 if config.train.precision == "bf16" else 4
    units = (4 * d if gate.hidden is None else gate.hidden) if gate.kind in ("iteration", "shared") else 0
    layers = (4 + 17 * w) * d * shape.num_hidden_layers
    ends = 8 * d * depth + (depth - 1) * ((4 + (w if w < 4 else 0)) * d + 2 * w * units)
    kept = 12 * d * shape.num_hidden_layers * steps if exits else 0
    logits = 12 * shape.vocab_size
    if checkpointing:
        return ends + kept + max(layers, logits)
    return ends + kept + layers * depth + logits


@final
class Counted(NamedTuple):
    """A model: parameters of the `base` and of the `gates`, of these those in `layers`, and a token's `flops`."""

    base: int
    gates: int
    layers: int
    flops: ad.TokenFlops

    @property
    def total(self) -> int:
        """All parameters."""
        return self.base + self.gates


def count(config: Config) -> Counted:
    """Build the model on the meta device, and count."""
    with torch.device("meta"):
        model = build(config.model)
    head = head_of(model.base, config.model.layers)
    total, base, layers = (sum(p.numel() for p in m.parameters()) for m in (model, model.base, model.loop.block_layers))
    return Counted(base, total - base, layers, ad.TokenFlops.measure(model.loop, model.base.config.hidden_size, [head]))
