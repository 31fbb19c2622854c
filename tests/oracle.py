"""What an adaptive-depth loop is, by definition: slow, plain, differentiable, and none of adadepth's code.

The real tokens of all rows are one list; padding is not in it. Each token knows its row and its place
among the row's tokens. Nothing is cached or reordered: an attention call keeps one key and one value for
each token, those of the last iteration in which the token ran.

`n` is the number of tokens, `m` of those that run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Result(NamedTuple):
    """What the loop must return, in rows, 0 at padding."""

    hidden: Tensor  # (batch, seq, dim)
    states: Tensor  # (batch, seq, steps, dim)
    live: Tensor  # (batch, seq, steps) bool
    scores: Tensor  # (batch, seq, steps - 1)
    exit_probs: Tensor  # (batch, seq, steps)


Name = tuple[str | int, ...]  # of an attention call's keys or values
Layers = Callable[[Any, Tensor, "Tokens"], Tensor]  # of a kind of block, the formula: (m, dim) to (m, dim)
Gate = Callable[[Tensor, Tensor, int], Tensor]  # h, previous (m, dim), step: scores (m,)
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]  # scores (n, step + 1), remaining, place (n,): what stays (n,)
Update = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x, h, start (m, dim), scores (m, step + 1): (m, dim)


def loop(
    block: nn.Module,
    layers: Layers,
    x: Tensor,
    mask: Tensor,
    steps: int,
    causal: bool,
    gate: Gate,
    rule: Rule,
    update: Update,
    start: Tensor,
    least: Tensor,
    most: Tensor,
    past: "Past | None" = None,
) -> Result:
    """Rows x, start (batch, seq, dim); mask, and the depths to reach at least and at most (batch, seq).

    `past` is what an earlier call left of itself, and is added to; None: there was none.
    """
    past = Past() if past is None else past
    row, _ = mask.nonzero(as_tuple=True)
    place = (mask.cumsum(1) - 1)[mask] + past.count(row)
    inputs, start, least, most = x[mask], start[mask], least[mask], most[mask]
    state, remaining = inputs, inputs.new_ones(len(inputs))
    shown: dict[Name, Tensor] = {}
    lives, states, scores, exits = [], [], [], []
    for step in range(steps):
        runs, previous = remaining > 0, state
        h = layers(block, inputs[runs], Tokens(runs, row, place, step, causal, shown, past))
        state = put(state, runs, h)
        lives.append(runs)
        states.append(state)
        if step == steps - 1:
            exits.append(remaining)
            break
        scores.append(put(torch.zeros_like(remaining), runs, gate(h, previous[runs], step)))
        history = torch.stack(scores, 1)
        stays = within(rule(history, remaining, place), remaining)
        stays = torch.where(step + 1 < least, remaining, stays)
        stays = torch.where(step + 1 < most, stays, 0)
        exits.append(remaining - stays)
        goes, remaining = stays > 0, stays
        inputs = put(inputs, goes, update(inputs[goes], state[goes], start[goes], history[goes]))
    past.add(row, place, shown)
    weights = torch.stack(exits, 1)
    each = torch.stack(states, 1)
    hidden = (weights.unsqueeze(-1) * each).sum(1)
    gated = torch.stack(scores, 1) if scores else weights[:, :0]
    return Result(*(in_rows(t, mask) for t in (hidden, each, torch.stack(lives, 1), gated, weights)))


class Past:
    """Tokens of earlier calls, each with the keys and values of its last iteration and no others.

    That is a cache with layout "single". For one that keeps every iteration there is no need of a past: prefill
    and decode, however cut, are one call on all the tokens.
    """

    def __init__(self) -> None:
        self.row = self.place = torch.zeros(0, dtype=torch.int64)
        self.shown: dict[Name, Tensor] = {}

    def count(self, row: Tensor) -> Tensor:
        """How many tokens of each `row` there are."""
        return (row.unsqueeze(1) == self.row).sum(1)

    def add(self, row: Tensor, place: Tensor, shown: dict[Name, Tensor]) -> None:
        self.row, self.place = torch.cat([self.row, row]), torch.cat([self.place, place])
        self.shown = {name: self.before(name, new) for name, new in shown.items()}

    def before(self, name: Name, new: Tensor) -> Tensor:
        """What these tokens show, and behind it the `new`."""
        return torch.cat([self.shown.get(name, new[:0]), new])


class Tokens(NamedTuple):
    """The tokens of one iteration, as the block's formula needs them.

    `shown` grows by two entries per attention call; `part` tells the calls of a block's parts apart.
    """

    runs: Tensor
    row: Tensor
    place: Tensor
    step: int
    causal: bool
    shown: dict[Name, Tensor]
    past: Past
    part: tuple[int, ...] = ()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: int = 0,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Softmax attention, (m, heads, head_dim): of those that run, over all tokens that they may see."""
        keys, values = self._show(("k", *self.part, call), k), self._show(("v", *self.part, call), v)
        keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (keys, values))
        sees = self.row[self.runs].unsqueeze(1) == torch.cat([self.past.row, self.row])
        behind = self.place[self.runs].unsqueeze(1) - torch.cat([self.past.place, self.place])
        if self.causal:
            sees = sees & (behind >= 0)
        if window is not None:
            sees = sees & (behind < window)
        logits = torch.einsum("qhd,khd->hqk", q, keys) * (q.shape[2] ** -0.5 if scale is None else scale)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        weights = logits.masked_fill(~sees, -torch.inf)
        if sinks is None:
            weights = weights.softmax(-1)
        else:  # one more key for each head, whose value is 0
            weights = weights.exp() / (weights.exp().sum(-1, keepdim=True) + sinks.exp().view(-1, 1, 1))
        return torch.einsum("hqk,khd->qhd", weights, values)

    def _show(self, name: Name, new: Tensor) -> Tensor:
        old = self.shown.get(name, new.new_zeros(len(self.runs), *new.shape[1:]))
        self.shown[name] = put(old, self.runs, new)
        return self.past.before(name, self.shown[name])


def within(stays: Tensor, remaining: Tensor) -> Tensor:
    """Between 0 and what remains: no token comes back."""
    stays = torch.where(stays > remaining, remaining, stays)
    return torch.where(stays < 0, 0, stays)


def put(old: Tensor, where: Tensor, new: Tensor) -> Tensor:
    """`old`, with `new` in place of the entries chosen by the bool `where`."""
    return old.index_put((where,), new)


def in_rows(tokens: Tensor, mask: Tensor) -> Tensor:
    return put(tokens.new_zeros(*mask.shape, *tokens.shape[1:]), mask, tokens)


# Rules. `tau` is a number or one for each token.


def never(scores: Tensor, remaining: Tensor, place: Tensor) -> Tensor:
    return remaining


def threshold(tau: float | Tensor) -> Rule:
    return lambda scores, remaining, place: remaining * (scores[:, -1] >= tau)


def survival_threshold(tau: float | Tensor) -> Rule:
    return lambda scores, remaining, place: remaining * (scores.prod(1) >= tau)


def survival(scores: Tensor, remaining: Tensor, place: Tensor) -> Tensor:
    return remaining * scores[:, -1]


def act(eps: float) -> Rule:
    def rule(scores: Tensor, remaining: Tensor, place: Tensor) -> Tensor:
        halting = 1 - scores[:, -1]
        return (remaining - halting) * (remaining - halting > eps)

    return rule


def lookahead(rule: Rule) -> Rule:
    def late(scores: Tensor, remaining: Tensor, place: Tensor) -> Tensor:
        return remaining if scores.shape[1] == 1 else rule(scores[:, :-1], remaining, place)

    return late


def not_before(first: int, rule: Rule) -> Rule:
    def patient(scores: Tensor, remaining: Tensor, place: Tensor) -> Tensor:
        return rule(scores, remaining, place) if scores.shape[1] >= first else remaining

    return patient


# Updates.


def replace(x: Tensor, h: Tensor, start: Tensor, scores: Tensor) -> Tensor:
    return h


def residual(x: Tensor, h: Tensor, start: Tensor, scores: Tensor) -> Tensor:
    return x + scores[:, -1:] * h


def interpolate(x: Tensor, h: Tensor, start: Tensor, scores: Tensor) -> Tensor:
    return (1 - scores[:, -1:]) * x + scores[:, -1:] * h


def input_injection(x: Tensor, h: Tensor, start: Tensor, scores: Tensor) -> Tensor:
    return start + h


def survival_scaled(update: Update) -> Update:
    return lambda x, h, start, scores: update(x, h, start, scores.prod(1, keepdim=True))


def ungated(update: Update) -> Update:
    return lambda x, h, start, scores: update(x, h, start, torch.ones_like(scores))


# Gates, of a module's parameters: any that has them.


def no_gate(module: None) -> Gate:
    return lambda h, previous, step: h.new_ones(len(h))


def linear_gate(module: Any) -> Gate:
    return lambda h, previous, step: 1 / (1 + (-(h @ module.proj.weight[0] + module.proj.bias)).exp())


def shared_gate(module: Any) -> Gate:
    return lambda h, previous, step: _mlp_score(module.mlp, h)


def per_iteration_gate(module: Any) -> Gate:
    return lambda h, previous, step: _mlp_score(module.mlps[step], h)


def _mlp_score(mlp: Any, h: Tensor) -> Tensor:
    first, last = mlp[0], mlp[2]
    between = torch.nn.functional.gelu(h @ first.weight.T + first.bias)
    return 1 / (1 + (-(between @ last.weight[0] + last.bias)).exp())
