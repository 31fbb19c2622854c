"""A tiny recursive model of Sudoku: one small network that refines an answer, and a score by which a puzzle halts."""

import torch
from torch import Tensor, nn

import adadepth as ad

from .task import units

DIM, HEADS = 64, 4
RECURSIONS, UPDATES = 2, 1  # of a segment, and of the latent state in each recursion
# A puzzle goes on while the chance that a cell is wrong is at least this. TRM's 1/2 halts too early: a puzzle that is
# likely to be right after one segment is nearly sure to be right after two.
GO_ON = 0.1


class Segment(nn.Module):
    """Recursions on the state, which is answer and latent side by side; gradients pass through the last one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        y, z = state.chunk(2, -1)
        for left in reversed(range(RECURSIONS)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not left):
                for _ in range(UPDATES):
                    z = self.net(x + y + z)
                y = self.net(y + z)
        return torch.cat([y, z], -1)


def first_token_decides(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    """A rule: all tokens of a row go on while the newest score of its first token is at least `GO_ON`."""
    first = scores[..., -1].masked_fill(positions > 0, 0).sum(1, keepdim=True)
    return torch.where(first >= GO_ON, remaining, 0)


class Embed(nn.Module):
    """Clues `(batch, cells)` to `(batch, 1 + cells, DIM)`: a token that halts, then digit, row, column and box."""

    where: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.halts, self.digits = nn.Parameter(torch.randn(DIM)), nn.Embedding(size + 1, DIM)
        self.units = nn.ModuleList(nn.Embedding(size, DIM) for _ in range(3))
        self.register_buffer("where", torch.tensor(units(size)).T, persistent=False)

    def forward(self, clues: Tensor) -> Tensor:
        x = self.digits(clues) + sum(of(where) for of, where in zip(self.units, self.where, strict=True))
        return torch.cat([self.halts.expand(len(x), 1, DIM), x], 1)


class Solver(nn.Module):
    """Runs up to `segments` segments for each puzzle of `size` × `size` cells."""

    initial: Tensor

    def __init__(self, size: int, segments: int) -> None:
        super().__init__()
        self.size = size
        self.embed, self.head = Embed(size), nn.Linear(DIM, size)
        net = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, 0.0, "gelu", batch_first=True)
        gate = ad.LinearGate(2 * DIM)
        self.looped = ad.RecurrentWrapper(Segment(net), segments, gate, first_token_decides, causal=False)
        self.register_buffer("initial", torch.randn(2 * DIM))

    def start(self, puzzles: int) -> Tensor:
        """The state before the first segment."""
        return self.initial.expand(puzzles, 1 + self.size**2, -1)

    def forward(self, clues: Tensor, state: Tensor, least: int | Tensor, most: int | Tensor) -> ad.Output:
        return self.looped(state, block_kwargs={"x": self.embed(clues)}, min_depth=least, max_depth=most)

    def logits(self, out: ad.Output) -> Tensor:
        """Of the digits from 1, `(batch, cells, size)`."""
        return self.head(out.hidden[:, 1:, :DIM])
