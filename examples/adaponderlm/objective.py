"""What is minimised: next tokens' cross-entropy, and what a stage adds to it."""

from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad
from adadepth.hf import AdaptiveForCausalLM
from adadepth.hf.model import AdaptiveOutput

from .config import Config, Penalty
from .model import head_of
from .plan import Plan, Turn
from .routers import Router, router_of, told_of


class Figures(NamedTuple):
    """Of one batch: the `loss` to descend, and without gradients what it is made of.

    `nats`, the cross-entropy of what the model answers, per token; `penalty` and `guidance` before they are weighted;
    `scores (steps - 1,)`, the mean score of the tokens that a gate saw; `live (batch, seq, steps)`.
    """

    loss: Tensor
    nats: Tensor
    penalty: Tensor
    guidance: Tensor
    scores: Tensor
    live: Tensor


@final
class Objective(nn.Module):
    """The adapted model and its router, and the loss of a stage. Called as a whole, so that wrappers see it all."""

    def __init__(self, model: AdaptiveForCausalLM, config: Config) -> None:
        super().__init__()
        self.model, self.config, self.plan = model, config, Plan(config)
        self._compiled = self._run
        if config.train.compile:
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.int64))  # binds its pieces, which a graph could not
            self._compiled = torch.compile(self._run)
        self.router: Router | None = router_of(config.model.router, config.model.steps, model.base.config.vocab_size)
        self.told = told_of(config.model.router, model, self.router)

    def forward(self, ids: Tensor, turn: Turn | None, first: int = 0) -> Figures | Tensor:
        """The loss of the windows `ids (batch, seq + 1)`, rows `first` and following of a step.

        Without a turn: what every token loses after every iteration, `(batch, seq, steps)`.
        """
        ids, labels = ids[:, :-1], ids[:, 1:]
        if turn is None:
            return self._every(self.model(ids, states=True, **self._at(ids, self.config.model.steps)), labels)
        depths = self._depths(ids, turn, first)
        static = isinstance(depths.get("max_depth"), int)  # nobody leaves early
        self.model.loop.agree = bool if static else ad.ranks.any_rank
        out = (self._compiled if static else self._run)(ids, states=self._looks_inside(turn), **depths)
        return self._figures(out, labels, turn)

    def _run(self, ids: Tensor, **options: Any) -> AdaptiveOutput:
        return self.model(ids, **options)

    def _depths(self, ids: Tensor, turn: Turn, first: int) -> dict[str, Any]:
        """`min_depth` and `max_depth`, where no gate decides."""
        if not turn.exits:
            return self._at(ids, self.plan.depth(turn, first, len(ids)))
        return {} if self.router is None else self._at(ids, self.router(ids))

    def _at(self, ids: Tensor, depth: int | Tensor) -> dict[str, Any]:
        """The arguments with which all go so deep; what tokens are told stands in place of `min_depth`."""
        told = None if self.router is None or self.told is None else self.router.kind(ids)
        return {"min_depth": depth if told is None else told, "max_depth": depth}

    def _every(self, out: AdaptiveOutput, labels: Tensor) -> Tensor:
        return ad.per_iteration_loss(out.states, head_of(self.model.base, self.config.model.layers), labels)

    @staticmethod
    def _looks_inside(turn: Turn) -> bool:
        """Whether the step needs every iteration's loss."""
        return turn.full and (turn.stage.prior != "none" or turn.stage.guidance > 0)

    def _figures(self, out: AdaptiveOutput, labels: Tensor, turn: Turn) -> Figures:
        logits = out.logits.flatten(0, 1)
        nats = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten())
        loss, guidance = nats, nats.new_zeros(())
        if self._looks_inside(turn):
            every = self._every(out, labels)
            loss, guidance = self._weighted(every, turn), self._guidance(every, out.trace, turn)
        penalty = self._penalty(out.trace, turn)
        total = loss + turn.stage.penalty.weight * penalty + turn.stage.guidance * guidance
        seen = out.trace.live[..., :-1]
        scores = out.trace.scores.sum((0, 1)) / seen.sum((0, 1)).clamp_min(1)
        nats, penalty, guidance, scores = (part.detach() for part in (nats, penalty, guidance, scores))
        return Figures(ad.ranks.anchor(total, self), nats, penalty, guidance, scores, out.trace.live)

    def _weighted(self, every: Tensor, turn: Turn) -> Tensor:
        stage = turn.stage
        if stage.prior == "none":
            return every[..., -1].mean()
        return (every * ad.depth_prior(stage.prior, every.shape[-1], stage.rate).to(every)).sum(-1).mean()

    def _guidance(self, every: Tensor, trace: ad.Trace, turn: Turn) -> Tensor:
        """Gates that say whether a later iteration will have gained more than its price."""
        if turn.stage.guidance == 0:
            return every.new_zeros(())
        goes_on = ad.loss_gain(every, turn.stage.price, self.config.model.gate.first).goes_on
        with torch.autocast(trace.scores.device.type, enabled=False):  # which knows no cross-entropy of probabilities
            return F.binary_cross_entropy(trace.scores.clamp(0, 1), goes_on.to(trace.scores))

    def _penalty(self, trace: ad.Trace, turn: Turn) -> Tensor:
        """Over the rows of all ranks: the smallest k share of a rank's own is another."""
        settings = turn.stage.penalty
        if settings.weight == 0:
            return trace.scores.new_zeros(())
        values = trace.gates if self.config.model.gate.reads == "newest" else trace.survival
        live = ad.ranks.gather(trace.live)
        return bottom_k(settings, turn.length)(ad.ranks.gather(values), live, turn.since)


def bottom_k(settings: Penalty, length: int) -> ad.BottomKPenalty:
    """The penalty of a stage of so many steps."""
    first, last = (round(share * length) for share in settings.warmup)
    return ad.BottomKPenalty(settings.k, (first, last), settings.over)
