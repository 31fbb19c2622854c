"""What two processes run, and one: a model under DDP or FSDP2, its loss over the global batch, and its gradients.

`logged(FOLDER, RANK)` is one of two ranks; it saves what came of each case as FOLDER/RANK.pt.
"""

import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

RANKS, ROWS, SEQ, DIM, WORDS, STEPS = 2, 2, 6, 16, 37, 4
IDS = torch.randint(3, WORDS, (RANKS * ROWS, SEQ), generator=torch.Generator().manual_seed(0))
PENALTY = ad.BottomKPenalty(0.4, over="live")


class Said(NamedTuple):
    logits: Tensor
    trace: ad.Trace


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM)
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 24), nn.GELU(), nn.Linear(24, DIM))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (6, -1)).transpose(1, 2).chunk(3, 1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.mlp(x)


class Plain(nn.Module):
    """A looped block of one's own."""

    def __init__(self, rule: ad.Rule, update: ad.Update) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, DIM), nn.Linear(DIM, WORDS)
        self.loop = ad.RecurrentWrapper(nn.Sequential(Layer(), Layer()), STEPS, gate(), rule, update)

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.loop.block.children())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None, **depths: Any) -> Said:
        out = self.loop(self.embed(input_ids), mask=attention_mask, cache=cache, **depths)
        return Said(self.head(out.hidden), out.trace)


def gate() -> ad.Gate:
    return ad.PerIterationMLPGate(DIM, STEPS, hidden=8, bias=0.5)


def neox(rule: ad.Rule, layers: slice | None) -> Any:
    """An adapted GPT-NeoX: the whole backbone with the ponder update, or its layers alone."""
    from hf_zoo import original

    from adadepth.hf import adapt

    base = original("gpt_neox")
    update = ad.Ponder(base.get_input_embeddings(), base.get_output_embeddings()) if layers is None else None
    model = adapt(base, STEPS, gate(), rule, update or ad.Interpolate(), layers)
    model.layers = model.loop.block.layers  # a list, and so not registered
    return model


class Objective(nn.Module):
    """The loss of these rows, such that its mean over ranks is that of the global batch."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, deep: Tensor) -> Tensor:
        out = self.model(input_ids=ids, attention_mask=mask, max_depth=deep)
        nll = F.cross_entropy(out.logits.transpose(1, 2), ids.roll(-1, 1), reduction="none")
        everyone = ad.ranks.gather(mask)
        loss = (nll * mask).sum() / everyone.sum() * (len(everyone) / len(mask))
        loss = loss + 0.3 * PENALTY(ad.ranks.gather(out.trace.gates), ad.ranks.gather(out.trace.live), at=0)
        return ad.ranks.anchor(loss, self.model.loop)


MODELS: dict[str, Callable[[], Any]] = {
    "block": lambda: Plain(ad.Threshold(0.6), ad.Interpolate()),
    "survival": lambda: Plain(ad.Survival(), ad.SurvivalScaled(ad.Interpolate())),
    "neox": lambda: neox(ad.Threshold(0.6), None),
    "neox core": lambda: neox(ad.Threshold(0.6), slice(None)),
    "neox survival": lambda: neox(ad.Survival(), slice(1, 3)),
}
# How deep each row may go, and how many of its tokens are real: the first two rows are of rank 0.
DATA = {
    "apart": ([4, 3, 2, 2], [6, 5, 6, 3]),
    "one rank halts": ([4, 4, 1, 1], [6, 6, 6, 6]),
    "all halt": ([1, 1, 1, 1], [6, 4, 6, 6]),
    "all padding": ([4, 3, 4, 4], [6, 5, 0, 0]),
}
SHARDED = ("layers", "loop", "layers, checkpointed")
HOW = ("ddp", *SHARDED)
PAIRS = [(data, how, (i + j) % 2) for i, data in enumerate(DATA) for j, how in enumerate(HOW)]
# Of each model every second pair, so that each data and each way is met; the others are left to `make test-every`.
MORE = [(model, data, how) for i, model in enumerate(("block", "neox")) for data, how, odd in PAIRS if odd != i]
CASES = [
    *((model, data, how) for i, model in enumerate(("block", "neox")) for data, how, odd in PAIRS if odd == i),
    *((model, "one rank halts", how) for model in ("survival", "neox core", "neox survival") for how in SHARDED[:2]),
    *((model, "one rank halts", how) for model in ("block", "neox") for how in ("dense ddp", "dense layers")),
    ("neox survival", "apart", "ddp, checkpointed"),
]
DECODED = [("block", "one rank halts"), ("block", "all padding"), ("neox survival", "all padding")]


def rows(data: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and depths of the global batch."""
    deep, real = DATA[data]
    return IDS, torch.arange(SEQ) < torch.tensor(real).unsqueeze(1), torch.tensor(deep).unsqueeze(1)


def mine(data: str, rank: int) -> tuple[Tensor, ...]:
    return tuple(part.chunk(RANKS)[rank] for part in rows(data))


def objective(model: str, how: str = "") -> Objective:
    torch.manual_seed(0)
    made = Objective(MODELS[model]()).double()
    for weight in made.model.loop.gate.parameters():
        nn.init.normal_(weight)
    made.model.loop.skip, made.model.loop.checkpoint = "dense" not in how, "checkpointed" in how
    return made


def shard(whole: nn.Module, model: Any, how: str) -> Any:
    """`whole`, which is or holds the model, and units of the model in it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for part in [model.loop] if "loop" in how else model.layers:
        fully_shard(part, mesh=mesh)
    return fully_shard(whole, mesh=mesh)


def trained(made: nn.Module, *batch: Tensor) -> dict[str, Tensor]:
    """The loss and the gradients, whole and by name; none where a parameter has none."""
    loss = made(*batch)
    loss.backward()
    grads = {name: weight.grad for name, weight in made.named_parameters() if weight.grad is not None}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}
    return {"loss": loss.detach()} | {name.removeprefix("module."): grad for name, grad in whole.items()}


@torch.no_grad()
def decoded(model: Any, cache: Any, ids: Tensor, mask: Tensor, deep: Tensor) -> Tensor:
    """The logits of a prompt and of one more token; without gradients."""
    parts = (slice(None, -1), slice(-1, None))
    return torch.cat([model(ids[:, at], mask[:, at], cache=cache, max_depth=deep).logits for at in parts], 1)


def empty_cache(model: str) -> Any:
    if "neox" not in model:
        return ad.KVReuseCache(layout="compact")
    from adadepth.hf import AdaptiveCache

    return AdaptiveCache("compact")


def gathered(rank: int, rows: int = 2) -> tuple[Tensor, Tensor | None]:
    """The rows of both ranks, and the gradient of this rank's, for a loss that is another on each."""
    x = torch.arange(4.0).view(2, 2)[:rows].add(10 * rank).requires_grad_()
    everyone = ad.ranks.gather(x)
    (everyone.pow(2).sum() * (rank + 1)).backward()
    return everyone.detach(), x.grad


def in_groups(rank: int) -> tuple[bool, Tensor]:
    """The same where each rank is a group of its own."""
    group = [dist.new_group([r]) for r in range(RANKS)][rank]
    return ad.ranks.any_rank(rank == 1, group), ad.ranks.gather(torch.tensor([rank]), group)


def agreed(model: nn.Module) -> nn.Module:
    """All loops of a model: what an adapted one runs before and after its loop is one of one step."""
    for part in model.modules():
        if isinstance(part, ad.RecurrentWrapper):
            part.agree = ad.ranks.any_rank
    return model


def to_a_depth(gather: Callable[[Tensor], Tensor], *batch: Tensor) -> tuple[Tensor, Tensor]:
    """The price after each step of a training with a budget, whose trace is gathered so, and the gate's weights."""
    ids, mask, deep = batch
    model, budget, prices = objective("block").model, ad.DepthBudget(1.5, gain=0.1), []
    weights = list(model.loop.gate.parameters())
    optimiser = torch.optim.SGD(weights, 0.5)
    for _ in range(4):
        loss = budget(ad.Trace(*map(gather, model(ids, mask, max_depth=deep).trace)))
        optimiser.zero_grad()
        ad.ranks.anchor(loss, model.loop.gate).backward()
        for weight in weights:  # their mean over ranks, as DDP takes it
            weight.grad = ad.ranks.gather(weight.grad.unsqueeze(0)).mean(0)
        optimiser.step()
        prices.append(budget.multiplier)
    return torch.stack(prices), nn.utils.parameters_to_vector(weights).detach()


def own(rows: Tensor) -> Tensor:
    """Of this rank alone."""
    return rows


def results(rank: int, cases: list[tuple[str, ...]]) -> Iterator[tuple[Any, Any]]:
    """Each case with what this rank made of it."""
    for case in cases:
        name, data, how = case
        made = agreed(objective(name, how))
        whole = nn.parallel.DistributedDataParallel(made) if "ddp" in how else shard(made, made.model, how)
        yield case, trained(whole, *mine(data, rank))
    yield "any", [ad.ranks.any_rank(flag) for flag in (False, rank == 1, True)]
    yield "gathered", gathered(rank)
    yield "gathered, uneven", gathered(rank, rows=2 - rank)
    yield "in groups", in_groups(rank)
    yield "budget", to_a_depth(ad.ranks.gather, *mine("apart", rank))
    yield "budget, not gathered", to_a_depth(own, *mine("apart", rank))
    for name, data in DECODED:
        model = agreed(objective(name).model)
        yield (name, data), decoded(shard(model, model, "layers"), empty_cache(name), *mine(data, rank))


def main(folder: str, rank: int, cases: list[tuple[str, ...]]) -> None:
    warnings.filterwarnings("error")
    warnings.filterwarnings("ignore", ".*returned a view tensor")  # of FSDP2, about writing into it
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(minutes=5))
    torch.save(dict(results(rank, cases)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def logged(folder: str, rank: int, cases: list[tuple[str, ...]]) -> None:
    """`main`, leaving what it raises in FOLDER/RANK.txt."""
    try:
        main(folder, rank, cases)
    except BaseException:
        Path(f"{folder}/{rank}.txt").write_text(traceback.format_exc())
        raise
