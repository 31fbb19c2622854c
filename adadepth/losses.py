"""Losses that train depth. They read the trace and the states of a pass, and nothing else.

Means are over real tokens; padding never counts. A label belongs to the state that predicts it: for a
language model, labels are the ids shifted by one.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._given import named
from ._types import StateRows
from ._vocabulary import logits_held, vocabulary_of
from .loop.trace import Trace
from .selection import bottom_k

LossRows = Float[Tensor, "batch seq steps"]


@final
@dataclass(frozen=True)
class BottomKPenalty:
    """The mean of the smallest share k of the gates' scores. It lowers the scores that are lowest already.

    Called as `penalty(values, live, at)`. k grows linearly from 0 at training step `warmup[0]` to `k_max`
    at `warmup[1]`.

    Shapes: `values (batch, seq, steps - 1)`: `trace.gates`, `trace.survival` or logits of the scores;
    `live (batch, seq, steps)`: `trace.live`; the result `()`, which is 0 while k is 0.
    Arguments: `k_max`, in (0, 1]; `over`: "all" counts every iteration of every real token, and takes iterations
    after an exit as 0, so that k limits the share of iterations that the penalty removes. "live" counts only the
    scores of tokens that continue.
    Raises: `ValueError` if `k_max` is not in (0, 1], the warm-up ends before it starts, or shapes do not fit.
    Source: AdaPonderLM, arXiv 2603.01914: the penalty of the second stage, weighted there by λ = 0.1.
    """

    k_max: float = 0.1
    warmup: tuple[int, int] = (0, 0)
    over: Literal["all", "live"] = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.k_max, Real) or not 0 < self.k_max <= 1:
            raise ValueError(
                f"BottomKPenalty expected k_max, a share, in (0, 1], got {named(self.k_max)}. The paper's is 0.1."
            )
        if not _is_warmup(self.warmup):
            raise ValueError(
                f"BottomKPenalty expected warmup=(first, last), training steps with 0 <= first <= last, got "
                f"{self.warmup}. To grow over the first 100 steps write warmup=(0, 100)."
            )
        if self.over not in ("all", "live"):
            raise ValueError(f"BottomKPenalty expected over to be 'all' or 'live', got {self.over!r}.")

    def k(self, at: int) -> float:
        """The share at training step `at`."""
        first, last = self.warmup
        return self.k_max if at >= last else self.k_max * max(0, at - first) / (last - first or 1)

    def __call__(
        self, values: Float[Tensor, "batch seq gated"], live: Bool[Tensor, "batch seq steps"], at: int
    ) -> Float[Tensor, ""]:
        """The penalty at training step `at`."""
        if not _are_gates_of(live, values):
            raise ValueError(
                f"BottomKPenalty expected values (batch, seq, steps - 1) and live (batch, seq, steps), bool, got "
                f"{named(values)} and {named(live)}. Call it as penalty(trace.gates, trace.live, at)."
            )
        share, goes_on = self.k(at), live[..., 1:]
        if share == 0:
            return values.new_zeros(())
        # Exited tokens come first, whatever the unit of the values, and count as 0.
        ranked = values.masked_fill(~goes_on, -torch.inf)
        chosen = bottom_k(ranked, share, goes_on if self.over == "live" else live[..., :1].expand_as(goes_on))
        return chosen.masked_fill(chosen == -torch.inf, 0).sum() / max(1, chosen.numel())


def ponder_cost(trace: Trace) -> Float[Tensor, ""]:
    """The mean of N + R. N is the number of iterations that a token ran, R the weight that exited at the last of them.

    N has no gradient. The gradient of R moves the gates towards earlier exits. For exits by the rule `ACT`.

    Shapes: `()`; 0 where no token is real.
    Raises: `ValueError` if `trace` is no `Trace`.
    Source: Graves 2016, arXiv 1603.08983, equations 10 to 12.
    """
    _check_trace("ponder_cost", trace)
    last = (trace.depth - 1).clamp_min(0).unsqueeze(-1)
    return _per_token(trace.depth + trace.exit_probs.gather(-1, last).squeeze(-1), trace)


def expected_depth(trace: Trace) -> Float[Tensor, ""]:
    """The mean of Σ_i i · exit_probs_i, the iteration after which a token's weight exits on average.

    For soft exits, its gradient moves the gates towards earlier exits. For hard exits, it is the mean depth, and has no
    gradient.

    Shapes: `()`; 0 where no token is real.
    Raises: `ValueError` if `trace` is no `Trace`.
    Source: PonderNet, Banino et al. 2021, arXiv 2107.05407, section 2.2: the expected number of steps.
    """
    _check_trace("expected_depth", trace)
    steps = torch.arange(1, trace.exit_probs.shape[-1] + 1, device=trace.exit_probs.device)
    return _per_token((trace.exit_probs * steps).sum(-1), trace)


def per_iteration_loss(
    states: StateRows | None, head: nn.Module, labels: Int[Tensor, "batch seq"], chunk: int | None = None
) -> LossRows:
    """Every token's cross-entropy after every iteration, in nats, without a mean; 0 where the label is -100.

    It computes logits for `chunk` tokens at a time, and again in the backward pass, so it never holds all logits.

    Shapes: `states (batch, seq, steps, dim)`, from `looped(x, states=True)`; `labels (batch, seq)`; the
    result `(batch, seq, steps)`, in float32 or wider.
    Arguments: `head`, maps `(n, dim)` to logits `(n, vocabulary)`, and includes the final norm if the model has one;
    `chunk`, the number of tokens, each with all its iterations. With None, a chunk has about two million logits on a
    CPU, and 128 times as many elsewhere.
    Raises: `ValueError` if `states` is None, `labels` do not fit them, `chunk < 1`, or the head gives no logits.
    """
    if states is None:
        raise ValueError("per_iteration_loss expected every iteration's states, got None. Call looped(x, states=True).")
    if not isinstance(states, Tensor) or states.dim() != 4:
        raise ValueError(
            f"per_iteration_loss expected states of shape (batch, seq, steps, dim), got {named(states)}. Pass "
            "out.states, of out = looped(x, states=True)."
        )
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"per_iteration_loss expected labels, a tensor of shape (batch, seq), got {named(labels)}. The order is "
            "states, head, labels."
        )
    if labels.shape != states.shape[:2]:
        raise ValueError(
            f"per_iteration_loss expected labels of shape (batch, seq) = {tuple(states.shape[:2])}, got "
            f"{tuple(labels.shape)}. For a language model shift them: states[:, :-1] with ids[:, 1:]."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"per_iteration_loss expected labels to be integers, the numbers of words, got {labels.dtype}. Pass ids."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"per_iteration_loss needs chunk >= 1, got {chunk}.")
    steps, tokens = states.shape[2], states.flatten(0, 1)
    words = vocabulary_of("per_iteration_loss", head, tokens[:0, 0])
    size = chunk or max(1, logits_held(tokens.device) // (steps * words))
    parts = zip(tokens.split(size), labels.flatten().split(size), strict=True)
    return torch.cat([checkpoint(_nats, *part, head, use_reentrant=False) for part in parts]).view(states.shape[:3])


def _nats(states: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """`(n, steps)` of `states (n, steps, dim)` and `labels (n,)`."""
    logits = head(states.flatten(0, 1))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = labels.long().repeat_interleave(states.shape[1])
    try:
        return F.cross_entropy(logits, each, reduction="none").view(states.shape[:2])
    except IndexError as error:
        raise ValueError(
            f"per_iteration_loss expected labels from 0 to {logits.shape[1] - 1}, the last word of the head, or -100 "
            f"where there is none, got one outside: {error} Write such labels as -100: labels.masked_fill(labels == "
            "..., -100)."
        ) from error


def depth_prior(
    kind: Literal["geometric", "uniform"], steps: int, rate: float = 0.2, device: torch.device | str | None = None
) -> Float[Tensor, " steps"]:
    """A distribution over depths that does not depend on the data: one weight for each iteration; they sum to 1.

    It has three uses. As weights of `per_iteration_loss`, it trains a model to answer after every iteration, without
    a gate. A loss can keep a gate's `exit_probs` near it. `random_depth` draws from it.

    Shapes: `(steps,)` float32.
    Arguments: `kind`: "uniform", or "geometric": the share `rate` of the remaining weight at each iteration, and all of
    it at the last. These are the exits of a gate whose score is always 1 - rate.
    `device`, of the result; None: torch's default.
    Raises: `ValueError` if `kind` is another, `steps < 1`, or `rate` is not in (0, 1).
    Source: PonderNet, Banino et al. 2021, arXiv 2107.05407, section 2.2 (the geometric prior).
    """
    if not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"depth_prior needs steps >= 1, got {named(steps)}. The order is kind, steps, rate.")
    if not 0 < rate < 1:
        raise ValueError(f"depth_prior expected rate, the share that exits, in (0, 1), got {rate}.")
    if kind == "uniform":
        return torch.full((steps,), 1 / steps, device=device)
    if kind != "geometric":
        raise ValueError(f"depth_prior expected kind to be 'geometric' or 'uniform', got {kind!r}.")
    remaining = (1 - rate) ** torch.arange(steps, dtype=torch.float64, device=device)
    exits = torch.full_like(remaining, rate)
    exits[-1] = 1
    return (remaining * exits).float()


def random_depth(prior: Float[Tensor, " steps"], at: int, seed: int = 0) -> int:
    """A depth for the whole batch of training step `at`, drawn from `prior`: pass it as `max_depth`.

    It depends only on its arguments, so it is the same on every rank, whatever their random states are. For a minimum
    depth, set the prior to 0 at the first iterations.

    Arguments: `prior (steps,)`, weights of the depths 1 to steps, as from `depth_prior`.
    Raises: `ValueError` if `prior` is not one row of weights, none negative and not all 0.
    Source: a random number of iterations in each step: Geiping et al. 2025, arXiv 2502.05171, section 3.3.
    """
    weights = prior.tolist() if isinstance(prior, Tensor) and prior.dim() == 1 else []
    if not sum(weights) > 0 or min(weights) < 0:
        raise ValueError(
            f"random_depth expected prior, a tensor (steps,) of weights, none negative and not all 0, got {prior}. "
            "Take depth_prior(...), or make one: torch.tensor([0.0, 0.3, 0.7])."
        )
    return random.Random(f"{seed} {at}").choices(range(1, len(weights) + 1), weights)[0]


@final
class LossGain(NamedTuple):
    """What later iterations would gain: see `loss_gain`.

    Shapes: both `(batch, seq, steps - 1)`, as `trace.scores`. `gain` in nats, a target to regress;
    `goes_on` bool, a label to classify.
    """

    gain: Float[Tensor, "batch seq gated"]
    goes_on: Bool[Tensor, "batch seq gated"]


def loss_gain(losses: LossRows, margin: float = 0.0, min_depth: int = 1) -> LossGain:
    """Targets for a gate: by how much the best later loss is below this iteration's, L_i - min_{j>i} L_j.

    The targets have no gradient. Use the losses of a pass without exits (`rule=None` or `min_depth=steps`): for an
    exited token, later iterations only repeat its last loss. Where tokens need each other's answers, use `Lookahead`
    or the losses of one iteration earlier: a token that has its answer must run one more iteration before others can
    read it.

    Arguments: `losses`, from `per_iteration_loss`; `margin`, in nats: `goes_on` is True if the gain is larger;
    `min_depth`: at iterations below it, `goes_on` is always True.
    Raises: `ValueError` if `losses` is no tensor of this shape, or `min_depth` is not in 1..steps.
    Source: the supervised guidance that AdaPonderLM, arXiv 2603.01914, names as future work.
    """
    if not isinstance(losses, Tensor) or losses.dim() != 3:
        raise ValueError(
            f"loss_gain expected losses of shape (batch, seq, steps), got {named(losses)}. Pass what "
            "per_iteration_loss(out.states, head, labels) returns, before any mean."
        )
    steps = losses.shape[-1]
    if not 1 <= min_depth <= steps:
        raise ValueError(f"loss_gain expected min_depth from 1 to steps={steps}, got {min_depth}.")
    losses = losses.detach()
    later = losses[..., 1:].flip(-1).cummin(-1).values.flip(-1)
    gain = losses[..., :-1] - later
    early = torch.arange(1, steps, device=gain.device) < min_depth
    return LossGain(gain, (gain > margin) | early)


def _are_gates_of(live: object, values: object) -> bool:
    """Whether the values are of all iterations but the last."""
    if not isinstance(live, Tensor) or not isinstance(values, Tensor) or live.dim() != 3 or live.dtype != torch.bool:
        return False
    return values.shape == (*live.shape[:2], live.shape[2] - 1)


def _is_warmup(given: object) -> bool:
    """Whether it is two numbers in order, as a tuple or as the list of a file."""
    pair = isinstance(given, Sequence) and len(given) == 2 and all(isinstance(at, Real) for at in given)
    return pair and 0 <= given[0] <= given[1]  # type: ignore[index]


def _check_trace(owner: str, trace: object) -> None:
    if not isinstance(trace, Trace):
        raise ValueError(f"{owner} expected the trace of a pass, got {named(trace)}. Pass out.trace.")


def _per_token(values: Tensor, trace: Trace) -> Tensor:
    """The mean over real tokens of what is 0 at padding."""
    return values.sum() / trace.live[..., 0].sum().clamp_min(1)
