"""`python -m examples.adaponderlm.cost`: what training AdaPonderLM costs at full scale, on paper.

Nothing is trained and no weights are made: models are built on the meta device and counted. What is assumed: how much
of its peak a GPU reaches (`--mfu`), and how deep tokens go once gates decide (`--depth`).

**FLOPs** of a pass are those of `adadepth.TokenFlops`. In training, the backward pass of a matrix product is two. In
attention and in the pondering update it is 2.5 times the forward pass, five products for two: both make again what
they did not keep. Checkpointed iterations run the layers once more.

**Memory** of the activations, in bytes for each token of `d` hidden units, `w` bytes in a matrix product (2 in
bfloat16). Each layer, in each iteration, keeps `(4 + 17w)·d`: its input in float32, and in `w` both norms' outputs,
queries, keys and values (3), rotated queries and keys (2), attention's answer (2), the MLP before and after its
nonlinearity (8). The end of an iteration keeps `8d`, the final norm's input and output, and `w·d` of a copy for the
head or gate where `w < 4`; between iterations `4d` of what the update adds and `2w` for each hidden unit of the gate,
and where `w < 4` another 4, for its last map is made in float32; those of the last gate are gone at the worst moment.
The loss takes 12 for each logit. With checkpointed iterations, layers keep what one iteration does, and with exits
`(4 + 3w)·d` of keys and values in each layer and iteration but the last. All this at full depth: gates start open.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import NamedTuple, cast, final

import torch

import adadepth as ad
from adadepth.hf.stack import Stack

from .config import BadInput, Config, read
from .model import build, flops_of

SIZES = ("pythia-70m.yaml", "pythia-160m.yaml", "pythia-410m.yaml", "pythia-1.4b.yaml", "pythia-2.8b.yaml")
METHOD = "adaponder.yaml"
GPUS = (1, 8, 64)
NODE = 8  # GPUs in one machine
PEAK = 989e12  # FLOP/s of an H100 SXM in bfloat16, without sparsity, by its data sheet
HOLDS = 80  # GiB of an H100
SPARE = 0.1  # of them, for the allocator and the kernels
ROWS = (16, 8, 4, 2, 1)  # at once; more are no faster
STATE = 16  # bytes for a parameter: weight, gradient and both moments of AdamW, in float32
GIB = 2**30
BEGIN, END = "<!-- python -m examples.adaponderlm.cost --markdown docs/full-scale.md -->", "<!-- end -->"
NONE = "–"
HERE = "examples/adaponderlm"
NODES = "--machine_rank 0 --main_process_ip node0 --main_process_port 29500"


class Way(NamedTuple):
    """How `gpus` GPUs train: FSDP2 if `sharded`, else DDP; `rows` at once on each; iterations checkpointed or not."""

    gpus: int
    sharded: bool
    checkpointing: bool
    rows: int


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

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.config.train.steps * self.config.train.batch * self.config.data.window

    def forward(self, depth: float) -> ad.Flops:
        """FLOPs of one token's pass at a mean depth: all run the first iteration, equally many each of the others."""
        steps, window = self.config.model.steps, self.config.data.window
        live = torch.zeros(1, window, steps, dtype=torch.bool)
        live[..., 0] = True
        live[:, : round(window * (depth - 1) / max(1, steps - 1)), 1:] = True
        return ad.Flops(*(part / window for part in self.model.flops.count(live)))

    def step(self, depth: float, *, gated: bool = True, checkpointing: bool = False) -> float:
        """FLOPs that training spends on one token."""
        run = self.forward(depth)
        matrices = run.block + run.once + run.gate * gated
        return 3 * matrices + 3.5 * (run.attention + run.update) + checkpointing * (run.block + run.attention)

    def run(self, *, checkpointing: bool = False) -> float:
        """FLOPs of all stages."""
        depths = {"full": self.config.model.steps, "exits": self.depth}
        stages = [(stage.share, depths[str(stage.depth)]) for stage in self.config.stages.values()]
        return self.tokens * sum(share * self.step(depth, checkpointing=checkpointing) for share, depth in stages)

    def fixed(self, *, checkpointing: bool = False) -> float:
        """FLOPs of the same run at full depth and without gates."""
        return self.tokens * self.step(self.config.model.steps, gated=False, checkpointing=checkpointing)

    def memory(self, way: Way) -> float:
        """Bytes on each GPU, at the worst moment of the worst stage.

        Autocast keeps a copy of all weights in bfloat16, DDP one of all gradients. FSDP2 gathers weights and gradients
        of two layers at a time and of what is in no layer, in bfloat16; and where a step is several passes, it
        exchanges gradients after the last one and until then has all of them, in float32.
        """
        model, train = self.model, self.config.train
        width = 2 if train.precision == "bf16" else 4
        if way.sharded:
            gathered = model.total - model.layers * (1 - 2 / self.config.model.shape.num_hidden_layers)
            several = way.rows * way.gpus < train.batch
            copies = width * gathered + (4 * model.total if several else width * gathered)
        else:
            copies = 2 * model.total * (width == 2) + 4 * model.total * (way.gpus > 1)
        states = STATE * model.total / (way.gpus if way.sharded else 1)
        return states + copies + way.rows * self.config.data.window * activations(self.config, way.checkpointing)

    def fits(self, gpus: int, *, sharded: bool, checkpointing: bool) -> Way | None:
        """With as many rows as fit on each of so many GPUs, None if not even one does; one GPU has nothing to share."""
        if sharded and gpus == 1:
            return None
        ways = (Way(gpus, sharded, checkpointing, n) for n in ROWS if self.config.train.batch % (n * gpus) == 0)
        return next((way for way in ways if self.memory(way) <= (1 - SPARE) * HOLDS * GIB), None)

    def best(self, gpus: int) -> Way | None:
        """The fastest way that fits: checkpointing costs a pass of the layers, sharding an exchange of weights."""
        kinds = product((False, True), (False, True))
        return next((way for c, s in kinds if (way := self.fits(gpus, sharded=s, checkpointing=c))), None)


def activations(config: Config, checkpointing: bool) -> float:
    """Bytes per token of the batch, at the worst moment of a training step: see the head of this file."""
    shape, steps, gate = config.model.shape, config.model.steps, config.model.gate
    d, w = shape.hidden_size, 2 if config.train.precision == "bf16" else 4
    units = 4 * d if gate.hidden is None else gate.hidden
    layers = (4 + 17 * w) * d * shape.num_hidden_layers
    copied = 4 * (steps - 2) if w < 4 else 0
    ends = steps * (8 + (w if w < 4 else 0)) * d + (steps - 1) * (4 * d + 2 * w * units) + copied * units
    logits = 12 * shape.vocab_size
    if not checkpointing:
        return ends + steps * layers + logits
    exits = any(stage.depth == "exits" for stage in config.stages.values())
    kept = (4 + 3 * w) * d * shape.num_hidden_layers * (steps - 1) if exits else 0
    return ends + kept + max(layers, logits)


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
        flops = flops_of(model, config.model.layers)
    layers = sum(p.numel() for layer in cast(Stack, model.loop.block).layers for p in layer.parameters())
    total, base = (sum(p.numel() for p in module.parameters()) for module in (model, model.base))
    return Counted(base, total - base, layers, flops)


def page(costs: dict[str, Costs], mfu: float) -> str:
    """All of it, by the names of the configurations, as Markdown."""
    return "\n\n".join([_totals(costs, mfu), _memories(costs), *(_commands(*each) for each in costs.items())])


def _totals(costs: dict[str, Costs], mfu: float) -> str:
    rows: list[Sequence[object]] = []
    for name, cost in costs.items():
        sizes = f"{cost.model.base:,} + {cost.model.gates:,}", f"{cost.tokens / 1e9:.1f}·10⁹"
        flops = (f"{run / 1e18:,.0f}" for run in (cost.fixed(), cost.run()))
        rows.append((Path(name).stem, *sizes, *flops, *(_hours(cost, gpus, mfu) for gpus in GPUS)))
    hours = [f"hours on {gpus}" for gpus in GPUS]
    return _table(("", "parameters + gates", "tokens", "10¹⁸ FLOPs, fixed", "adaptive", *hours), rows)


def _hours(cost: Costs, gpus: int, mfu: float) -> str:
    if (way := cost.best(gpus)) is None:
        return NONE
    runs = (run(checkpointing=way.checkpointing) for run in (cost.fixed, cost.run))
    hours = [run / (gpus * PEAK * mfu) / 3600 for run in runs]
    return " / ".join(f"{each:,.0f}" if each >= 10 else f"{each:.1f}" for each in hours)


def _memories(costs: dict[str, Costs]) -> str:
    kinds = list(product((False, True), (False, True)))
    rows: list[Sequence[object]] = []
    for (name, cost), gpus in product(costs.items(), GPUS):
        ways = [cost.fits(gpus, sharded=s, checkpointing=c) for s, c in kinds]
        marks = [" ←" * (way == cost.best(gpus)) for way in ways]
        sizes = [f"{cost.memory(way) / GIB:.0f} GiB, {way.rows}" if way else None for way in ways]
        cells = [NONE if size is None else size + mark for size, mark in zip(sizes, marks, strict=True)]
        rows.append((Path(name).stem, gpus, *cells))
    return _table(("", "GPUs", "DDP", "DDP, checkpointing", "FSDP2", "FSDP2, checkpointing"), rows)


def _commands(name: str, cost: Costs) -> str:
    ways = [way for gpus in GPUS if (way := cost.best(gpus))]
    return "\n".join([f"{Path(name).stem}:\n\n```sh", *(_command(name, way) for way in ways), "```"])


def _command(name: str, way: Way) -> str:
    words = ["accelerate launch"]
    words += [f"--config_file {HERE}/configs/accelerate/{'fsdp2' if way.sharded else 'ddp'}.yaml"] * (way.gpus > 1)
    words += [f"--num_processes {way.gpus}"]
    words += [f"--num_machines {way.gpus // NODE} {NODES}"] * (way.gpus > NODE)
    words += [f"{HERE}/train.py --config {name} {METHOD} train.micro={way.rows}"]
    return " ".join([*words, f"train.checkpointing={str(way.checkpointing).lower()}"])


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *rows))


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.adaponderlm.cost", description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", default=SIZES, metavar="FILE", help="sizes; Pythia's if none is given")
    parser.add_argument("--mfu", type=float, default=0.4, help="the share of its peak that a GPU reaches")
    parser.add_argument("--depth", type=float, default=3.6, help="the mean depth of tokens that may leave")
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="put it into docs/full-scale.md, in its place")
    parsed = parser.parse_args(args)
    if not (0 < parsed.mfu <= 1 and parsed.depth >= 1):
        parser.error(f"expected --mfu in (0, 1] and --depth from 1, got {parsed.mfu} and {parsed.depth}")
    try:
        costs = {name: Costs(read([name, METHOD]), parsed.depth) for name in parsed.configs}
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None
    text = page(costs, parsed.mfu)
    if parsed.markdown is None:
        print(text)
    else:
        before, _, rest = parsed.markdown.read_text("utf-8").partition(BEGIN)
        parsed.markdown.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
