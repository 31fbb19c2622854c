"""Deep supervision: each call runs one segment, after which the optimiser steps; the state is carried to the next call.

A puzzle that halts, or has run the most segments, makes room for a new one. With `always` it never halts early: this is
how models of a fixed number of segments are trained.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

from .model import GO_ON, Solver
from .task import Puzzles, relabelled

BATCH, RATE, WARM = 64, 2e-3, 100
EXPLORED = 0.1  # share of the puzzles that must run a random number of segments
HALTING = 0.5  # weight of the halting score's loss


def explore(most: int, generator: torch.Generator) -> Tensor:
    """The fewest segments of new puzzles `(batch,)`: 1, for some a number from 2 to `most`, as in HRM."""
    drawn = torch.randint(2, most + 1, (BATCH,), generator=generator)
    return torch.where(torch.rand(BATCH, generator=generator) < EXPLORED, drawn, 1)


def always(most: int, generator: torch.Generator) -> Tensor:
    """The fewest segments are the most: no puzzle halts before."""
    del generator
    return torch.full((BATCH,), most)


class Carry(NamedTuple):
    """The puzzles of a batch, their state, the segments they have run, and the fewest that they must run."""

    puzzles: Puzzles
    state: Tensor
    ran: Tensor
    least: Tensor

    def renewed(self, done: Tensor, fresh: "Carry") -> "Carry":
        """`fresh` where a puzzle is done `(batch,)`; the others go on."""
        puzzles = (torch.where(done[:, None], new, old) for new, old in zip(fresh.puzzles, self.puzzles, strict=True))
        state = torch.where(done[:, None, None], fresh.state, self.state)
        ran, least = (torch.where(done, new, old) for new, old in zip(fresh[2:], self[2:], strict=True))
        return Carry(Puzzles(*puzzles), state, ran, least)


class Stream:
    """New puzzles: random ones of a list, under random digits."""

    def __init__(self, model: Solver, puzzles: Puzzles, least: Callable[[torch.Generator], Tensor], seed: int) -> None:
        self.model, self.puzzles, self.least = model, puzzles, least
        self.draws, self.depths = (torch.Generator().manual_seed(2 * seed + use) for use in range(2))

    def fresh(self) -> Carry:
        """A batch that has run nothing yet."""
        rows = torch.randint(len(self.puzzles.clues), (BATCH,), generator=self.draws)
        puzzles = relabelled(self.puzzles.at(rows), self.model.size, self.draws)
        least = self.least(self.depths)
        return Carry(puzzles, self.model.start(BATCH), torch.zeros_like(least), least)


def losses(model: Solver, out: ad.Output, answers: Tensor) -> Tensor:
    """Of the digits, and of the score, which is the chance that some cell is wrong."""
    logits = model.logits(out)
    wrong = (logits.argmax(-1) + 1 != answers).any(1)
    halting = F.binary_cross_entropy(out.trace.scores[:, 0, 0], wrong.to(logits))
    return F.cross_entropy(logits.flatten(0, 1), answers.flatten() - 1) + HALTING * halting


def one_segment(model: Solver, carry: Carry, most: int) -> tuple[Tensor, Carry, Tensor]:
    """The loss, the carry after one segment, and which puzzles are done: they halted, or ran `most` segments."""
    # A depth per row, not an int: the loop then still has a next iteration, and the gate scores this one.
    one = torch.ones(BATCH, 1, dtype=torch.long)
    out = model(carry.puzzles.clues, carry.state, one, one)
    ran = carry.ran + 1
    halts = (out.trace.scores[:, 0, 0] < GO_ON) & (ran >= carry.least)
    after = carry._replace(state=out.hidden.detach(), ran=ran)
    return losses(model, out, carry.puzzles.answers), after, halts | (ran >= most)


def train(model: Solver, new: Stream, most: int, steps: int) -> None:
    """`steps` segments of a batch, each with a step of AdamW; a puzzle runs `most` of them at most."""
    optimiser = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.01)
    carry = new.fresh()
    for step in range(steps):
        loss, after, done = one_segment(model, carry, most)
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        optimiser.param_groups[0]["lr"] = RATE * min((step + 1) / WARM, cosine)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        carry = after.renewed(done, new.fresh())
