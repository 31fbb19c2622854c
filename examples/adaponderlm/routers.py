"""Depths from the ids alone: fitted once to what iterations were seen to gain, then as fixed as the data.

A model that is trained with such exits learns to live with them, and they cost next to nothing. A router predicts the
loss of a token at each depth, up to a constant, and takes the depth at which loss + price · depth is least; the price
is the one at which depths have the wanted mean. A token may be told its kind, by which the router decides: that is
worth much even where all tokens run as deep, so that fixed depths are told as well before they are compared
(`methods/told.yaml`).
"""

from abc import ABC, abstractmethod
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadepth.hf import AdaptiveForCausalLM

from . import config

LONG = 8  # letters; what stands deeper in a word is taken together
STEPS, BATCH, RATE = 400, 4096, 3e-3  # of fitting a window


class Router(nn.Module, ABC):
    """Depths of tokens from `first` to `steps`. Nothing in it gets a gradient from the model's loss."""

    price: Tensor
    kinds: int

    def __init__(self, steps: int, first: int) -> None:
        super().__init__()
        self.steps, self.first, self.kinds = steps, first, steps
        self.register_buffer("price", torch.zeros(()))

    @property
    def fitted(self) -> bool:
        """Whether it has a price."""
        return bool(self.price > 0)

    @abstractmethod
    def losses(self, ids: Tensor) -> Tensor:
        """The predicted loss of `ids (batch, seq)` at each depth, `(batch, seq, steps)`, up to a constant."""

    @abstractmethod
    def learn(self, ids: Tensor, losses: Tensor) -> None:
        """Fit `losses` to those measured, of the same shape."""

    def forward(self, ids: Tensor) -> Tensor:
        """The depths of `ids (batch, seq)`, int64."""
        return self._cheapest(self.losses(ids), self.price)

    def kind(self, ids: Tensor) -> Tensor:
        """What a token of `ids (batch, seq)` is told, from 1 to `kinds`: here its depth, until it has one the least."""
        return torch.where(self.price > 0, self(ids), self.first)

    def fit(self, ids: Tensor, losses: Tensor, mean: float) -> None:
        """Learn from the losses of `ids (rows, seq)` at each depth, `(rows, seq, steps)`, and aim at a mean depth."""
        with torch.enable_grad():
            self.learn(ids, losses)
        self.aim(ids, mean)

    @torch.no_grad()
    def aim(self, ids: Tensor, mean: float) -> None:
        """Set the least price at which `ids (rows, seq)` have no more than this mean depth."""
        predicted = self.losses(ids)
        low, high = predicted.new_tensor(0.0), (predicted.amax(-1) - predicted.amin(-1)).max() + 1
        for _ in range(40):
            middle = (low + high) / 2
            deep = self._cheapest(predicted, middle).double().mean() > mean
            low, high = (middle, high) if deep else (low, middle)
        self.price.copy_(high)

    def _cheapest(self, losses: Tensor, price: Tensor) -> Tensor:
        each = torch.arange(1, self.steps + 1, device=losses.device)
        cost = (losses + price * each).masked_fill(each < self.first, torch.inf)
        return cost.argmin(-1) + 1


@final
class Words(Router):
    """By how many letters of its word have been seen, the byte's own with them: 0 for what is no letter. For bytes."""

    letters: Tensor
    table: Tensor

    def __init__(self, steps: int, first: int) -> None:
        super().__init__(steps, first)
        self.kinds = LONG + 1
        self.register_buffer("letters", torch.tensor([_is_letter(byte) for byte in range(256)]))
        self.register_buffer("table", torch.zeros(LONG + 1, steps))

    def losses(self, ids: Tensor) -> Tensor:
        return self.table[self._seen(ids)]

    def kind(self, ids: Tensor) -> Tensor:
        """All that is read of it, at any price: one more than its letters."""
        return self._seen(ids) + 1

    def learn(self, ids: Tensor, losses: Tensor) -> None:
        seen = self._seen(ids).flatten()
        total = torch.zeros_like(self.table).index_add_(0, seen, losses.flatten(0, 1).to(self.table))
        self.table.copy_(total / seen.bincount(minlength=LONG + 1).clamp_min(1).unsqueeze(1))

    def _seen(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        letter = (ids < 256) & self.letters[ids.clamp_max(255)]
        return (places - torch.where(letter, -1, places).cummax(1).values).clamp_max(LONG)


@final
class Window(Router):
    """A small network over the last `window` ids, for any vocabulary."""

    def __init__(self, steps: int, first: int, window: int, vocabulary: int, dim: int = 16, hidden: int = 64) -> None:
        super().__init__(steps, first)
        self.window = window
        self.embedding = nn.Embedding(vocabulary + 1, dim)  # the last stands for what is before the text
        self.mlp = nn.Sequential(nn.Linear(window * dim, hidden), nn.GELU(), nn.Linear(hidden, steps))
        self.requires_grad_(False)

    def losses(self, ids: Tensor) -> Tensor:
        before = F.pad(ids, (self.window - 1, 0), value=self.embedding.num_embeddings - 1)
        return self.mlp(self.embedding(before.unfold(1, self.window, 1)).flatten(-2))

    def learn(self, ids: Tensor, losses: Tensor) -> None:
        """Regress each iteration's loss less the last one's: what a token is worth at all is not asked."""
        generator = torch.Generator(ids.device).manual_seed(0)
        wanted = (losses - losses[..., -1:]).to(next(self.mlp.parameters()))
        trained = nn.ParameterList(self.parameters()).requires_grad_(True)
        optimiser = torch.optim.AdamW(trained, RATE)
        rows = max(1, BATCH // ids.shape[1])
        for _ in range(STEPS):
            some = torch.randint(len(ids), (rows,), generator=generator, device=ids.device)
            optimiser.zero_grad()
            F.mse_loss(self.losses(ids[some]), wanted[some]).backward()
            optimiser.step()
        trained.requires_grad_(False)


@final
class Told(nn.Module):
    """Adds to the embedding of each token one of its kind, before an adapted model runs.

    It is 0 at first. A hook, so that `generate` passes through it as well. The kind comes as `min_depth`, which
    `generate` takes as a function of all ids; without a gate that is no bound, since `max_depth` wins.
    """

    def __init__(self, model: AdaptiveForCausalLM, kinds: int) -> None:
        super().__init__()
        self.kinds = nn.Embedding(kinds, model.base.config.hidden_size)
        nn.init.zeros_(self.kinds.weight)
        model.register_forward_pre_hook(self._tell, with_kwargs=True)

    def _tell(
        self, model: AdaptiveForCausalLM, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if (kind := given.get("min_depth")) is None:
            return args, given
        ids = given.pop("input_ids") if not args else args[0]
        said = self.kinds(torch.as_tensor(kind, device=ids.device) - 1)
        return args[1:], given | {"inputs_embeds": model.get_input_embeddings()(ids) + said}


def told_of(settings: config.Router, model: AdaptiveForCausalLM, router: Router | None) -> Told | None:
    """What tells the tokens of a model their kinds, if a configuration asks for it."""
    return Told(model, router.kinds) if settings.tells and router is not None else None


def router_of(settings: config.Router, steps: int, vocabulary: int) -> Router | None:
    """What a configuration asks for, not yet fitted."""
    if settings.kind == "words":
        return Words(steps, settings.first)
    if settings.kind == "window":
        return Window(steps, settings.first, settings.window, vocabulary)
    return None


def _is_letter(byte: int) -> bool:
    return chr(byte).isalnum() or byte == ord("_") or byte > 127
