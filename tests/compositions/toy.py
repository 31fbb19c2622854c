"""A task that needs depth, a block that does not use adadepth, and the assertions that all compositions share.

The task is two hops. A token with the number n at position t points at position min(n, t) of its row. The token there
points at another position in the same way, and the label is the number at that position. A trained block predicts about
86 % of the labels with one iteration, and nearly all with two.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

DIM, NUMBERS, LENGTH = 32, 8, 12
HELD_OUT = 10**6  # training uses smaller seeds


class Block(nn.Module):
    """A pre-norm transformer layer, (rows, length, DIM) to the same; the residual stream is its state."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(DIM), nn.LayerNorm(DIM)])
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Embed(nn.Module):
    """Numbers (batch, seq) to (batch, seq, DIM): the sum of the embeddings of number and position."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.place = nn.Embedding(NUMBERS, DIM), nn.Embedding(LENGTH, DIM)

    def forward(self, ids: Tensor) -> Tensor:
        return self.number(ids) + self.place.weight[: ids.shape[1]]


def make_head() -> nn.Sequential:
    """A final norm, which is outside the loop, and a linear map to the numbers."""
    return nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, NUMBERS))


def spread(gate: nn.Module) -> None:
    """Draw a gate's weights so that scores are on both sides of 1/2, whatever its initial bias."""
    for p in gate.parameters():
        nn.init.normal_(p, std=0.4)


def batch(seed: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    """Numbers and labels, each (rows, LENGTH)."""
    ids = torch.randint(0, NUMBERS, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    first = torch.minimum(ids, torch.arange(LENGTH))
    second = torch.minimum(ids.gather(1, first), first)
    return ids, ids.gather(1, second)


def ragged(labels: Tensor) -> tuple[Tensor, Tensor]:
    """A mask with padding anywhere, and the labels with -100 at padding."""
    mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) < 0.8
    return mask, labels.masked_fill(~mask, -100)


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (batch, seq, ...) of logits (batch, seq, ..., NUMBERS); 0 where the label is -100."""
    labels = labels.view(*labels.shape, *[1] * (logits.dim() - 3)).expand(logits.shape[:-1])
    return F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")


def train(loss: Callable[[Tensor, Tensor], Tensor], modules: Iterable[nn.Module], steps: int, lr: float = 5e-3) -> None:
    """Train for `steps` steps of AdamW on `loss(ids, labels)`."""
    optimizer = torch.optim.AdamW([p for module in modules for p in module.parameters()], lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss(*batch(step)).backward()
        optimizer.step()


def assert_packed_equals_dense(model: Any, run: Callable[[], tuple[ad.Output, Tensor]], *, mixed: bool = True) -> None:
    """Assert the same output, loss and gradients in float64; `mixed` says whether tokens exit at different depths."""
    model.double()
    packed, dense = (measured(model, run, skip) for skip in (True, False))
    depth = dense["live"].sum(-1)
    assert (depth[depth > 0].unique().numel() > 1) == mixed
    for name, want in dense.items():
        assert_close(name, packed[name], want)


def assert_same_gradients(model: nn.Module, got: Tensor, want: Tensor) -> None:
    """Assert that two losses have the same gradient in every parameter."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    each = (torch.autograd.grad(loss, parameters) for loss in (got, want))
    for name, *pair in zip(names, *each, strict=True):
        assert_close(name, *pair)


def assert_close(name: str, got: Tensor, want: Tensor) -> None:
    """Assert a small largest error, relative to max|want|. The constant is for exact zeros (a key's bias, say)."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    error, size = (got - want).abs().max(), want.abs().max()
    assert error <= 1e-10 * size + 1e-13, f"{name}: off by {error:.1e}, largest {size:.1e}"


def measured(model: Any, run: Callable[[], tuple[ad.Output, Tensor]], skip: bool) -> dict[str, Tensor]:
    """The output, the loss and all gradients of a run with this `skip`."""
    model.looped.skip = skip
    out, loss = run()
    results = {"loss": loss, "hidden": out.hidden, "scores": out.trace.scores, "exits": out.trace.exit_probs}
    if out.states is not None:
        results["states"] = out.states
    generator = torch.Generator().manual_seed(0)
    parts = [(t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in results.values()]
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(sum(parts[1:], parts[0]), parameters, allow_unused=True, materialize_grads=True)
    return results | {"live": out.trace.live.double()} | dict(zip(names, gradients, strict=True))
