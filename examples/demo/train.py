"""Training in two stages: full depth for all bytes, then exits as a policy says."""

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

import adadepth as ad

from ..figures import cosine
from .exits import Policy, Probed
from .model import AdaptiveLM, Shape
from .text import random_windows


class Recipe(NamedTuple):
    """`steps` of training on `batch` windows of `window` bytes, the share `open_share` of them without exits.

    `gate_lr` is a gate's part of the learning rate. A probe, from which a router is made, takes a tenth of the steps
    on a copy that is then thrown away, and looks at `probed` windows. `programs` are the steps of both stages of
    what is trained on programs.
    """

    steps: int
    batch: int = 16
    window: int = 128
    lr: float = 3e-3
    open_share: float = 0.4
    gate_lr: float = 0.1
    probed: int = 1024
    programs: tuple[int, int] = (1000, 600)

    @property
    def first(self) -> int:
        """The step at which exits begin."""
        return math.ceil(self.open_share * self.steps)


class Progress(NamedTuple):
    """One step of training: its number, from 1, the loss in nats per byte and the mean depth of its batch."""

    step: int
    loss: float
    depth: float


@final
class Training:
    """A model, its optimiser, and how far they are. The seed decides the weights and the batches."""

    def __init__(self, shape: Shape, recipe: Recipe, seed: int) -> None:
        torch.manual_seed(seed)
        self.model, self.recipe, self.step = AdaptiveLM(shape), recipe, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), recipe.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )

    def save(self, path: Path) -> None:
        """All that `resume` needs."""
        state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(), "step": self.step}
        torch.save(state | {"generator": self.generator.get_state()}, path)

    def resume(self, path: Path) -> None:
        """Go on from what a training without exits saved."""
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def begin(self, policy: Policy, data: Tensor) -> None:
        """Let bytes leave from here on."""
        slow = policy.begin(self.model, lambda: self.probe(data))
        if slow:
            self.optimiser.add_param_group({"params": slow, "scale": self.recipe.gate_lr})

    def fixed(self, data: Tensor, depth: int | Tensor) -> Progress:
        """One step with every byte at `depth`, or each at its own."""
        return self._update(data, lambda trace: 0.0, min_depth=depth, max_depth=depth)

    def adaptive(self, data: Tensor, policy: Policy) -> Progress:
        """One step with exits."""
        recipe = self.recipe
        thousandth = 1000 * (self.step - recipe.first) // max(1, recipe.steps - recipe.first)
        return self._update(data, lambda trace: policy.cost(trace, thousandth))

    def answering(self, data: Tensor) -> Progress:
        """One step at full depth in which every iteration is trained to answer."""
        loss = self.every_iteration(self._windows(data))
        return self._advance(loss, loss, self.model.shape.steps)

    def probe(self, data: Tensor) -> Probed:
        """What each iteration is worth: a copy learns to answer after every iteration, and is looked at."""
        trial = copy.deepcopy(self)
        count = math.ceil(self.recipe.steps / 10)
        for step in range(count):
            trial._descend(trial.every_iteration(trial._windows(data)), 0.5 * (1 - step / count))
        windows = random_windows(data, self.recipe.probed, self.recipe.window, trial.generator)
        with torch.no_grad():
            losses = torch.cat([trial.losses(rows) for rows in windows.split(32)])
        return Probed(windows[:, :-1], losses)

    def losses(self, windows: Tensor) -> Tensor:
        """Of every byte after every iteration, `(rows, window, steps)`."""
        model = self.model
        states = model.looped(model.embedding(windows[:, :-1]), states=True).states
        return ad.per_iteration_loss(states, torch.nn.Sequential(model.norm, model.head), windows[:, 1:])

    def every_iteration(self, windows: Tensor) -> Tensor:
        """The loss after the last iteration, and half the mean of those before it, from the second on."""
        *_, last = losses = self.losses(windows).mean((0, 1))[1:]
        return last + 0.5 * losses[:-1].mean() if len(losses) > 1 else last

    def _update(self, data: Tensor, cost: Any, **depths: int | Tensor) -> Progress:
        windows = self._windows(data)
        prediction = self.model(windows[:, :-1], **depths)
        loss = nll(prediction.logits, windows[:, 1:]).mean()
        depth = prediction.trace.depth.double().mean().item()
        return self._advance(loss + cost(prediction.trace), loss, depth)

    def _advance(self, total: Tensor, loss: Tensor, depth: float) -> Progress:
        """One step down `total`, of which `loss` is reported."""
        self._descend(total, schedule(self.step, self.recipe.steps))
        self.step += 1
        return Progress(self.step, loss.item(), depth)

    def _windows(self, data: Tensor) -> Tensor:
        return random_windows(data, self.recipe.batch, self.recipe.window, self.generator)

    def _descend(self, loss: Tensor, share: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.lr * share * group.get("scale", 1.0)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats per byte, shaped like `targets`; `logits` have one more axis."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate: a linear warm-up over a twentieth of the steps, then a cosine to a tenth."""
    return cosine(step, steps, max(1, steps // 20))
