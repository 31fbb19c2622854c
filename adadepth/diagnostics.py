"""How the depth of tokens changes a model's losses on held-out data. Losses are per token; results are means of them.

You write a function `score(batch, **depths)`. It runs the model on one batch, and passes `min_depth=` and
`max_depth=` on to its loop. It returns two tensors of one shape: the losses in nats and the depths of the tokens that
count. `against` takes the entries of their first axis to be independent: rows, or single tokens where a mask removed
the padding.

    def score(ids, **depths):
        out = model(ids[:, :-1], **depths)
        return nll(out.logits, ids[:, 1:]), out.trace.depth
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ._given import named

Score = Callable[..., tuple[Tensor, Tensor]]


@final
class Measured(NamedTuple):
    """The loss of each token, in nats, and its depth.

    Shapes: both `(rows, ...)`, the same.
    """

    loss: Float[Tensor, "*tokens"]
    depth: Int[Tensor, "*tokens"] | Float[Tensor, "*tokens"]

    @property
    def nats(self) -> float:
        """The mean loss."""
        return self.loss.double().mean().item()

    @property
    def mean_depth(self) -> float:
        """The mean depth."""
        return self.depth.double().mean().item()

    def against(self, other: "Measured") -> tuple[float, float]:
        """The mean loss minus that of `other` on the same tokens, and the standard error of this difference.

        The error is over rows, which are taken to be independent; the tokens of one row are not.
        Raises: `ValueError` if `other` is of other tokens, or there are fewer than two rows.
        """
        _check_same("against", self, other)
        if len(self.loss) < 2:
            raise ValueError(
                f"against expected at least 2 rows, over which the standard error is computed, got {len(self.loss)}. "
                "Measure more rows; the difference alone is a.nats - b.nats."
            )
        rows = (self.loss - other.loss).double().reshape(len(self.loss), -1).mean(1)
        return rows.mean().item(), rows.std().item() / len(rows) ** 0.5


@final
class Group(NamedTuple):
    """Some of the tokens: their `name`, their `share` of all, and the `mean` of a loss or a gain over them."""

    name: int | float
    share: float
    mean: float


@final
class Oracle(NamedTuple):
    """Every token at the depth of its smallest loss.

    `measured` has these losses and depths. `better` is the share of tokens whose loss at some depth is smaller than
    at the last.
    """

    measured: Measured
    better: float


@torch.no_grad()
def measure(score: Score, data: Iterable[Any], **depths: Any) -> Measured:
    """Losses and depths over all batches of `data`; `depths` are passed to every call of `score`.

    Raises: `ValueError` if there is no batch, if losses and depths are not two tensors of one shape, if some of them
    are of padding, or if the batches have rows of different lengths.
    """
    parts = [score(batch, **depths) for batch in data]
    if not parts:
        raise ValueError(
            "measure expected at least one batch, got none. A generator is empty after one use: make it a list."
        )
    for part in parts:
        if not isinstance(part, tuple | list) or [isinstance(each, Tensor) for each in part] != [True, True]:
            raise ValueError(
                f"measure expected score to return two tensors, losses and depths of the same tokens, got "
                f"{named(part)}. Return both: (loss, out.trace.depth)."
            )
        loss, depth = part
        if loss.shape != depth.shape:
            raise ValueError(
                f"measure expected score to return losses and depths of the same tokens, got {tuple(loss.shape)} and "
                f"{tuple(depth.shape)}. Cut both to the tokens that have a label."
            )
        if padding := int((depth == 0).sum()):
            raise ValueError(
                f"measure expected score to return tokens that ran, got {padding} of depth 0. Remove the padding: "
                "loss[mask], depth[mask]."
            )
    losses, each = zip(*parts, strict=True)
    if len(lengths := {tuple(loss.shape[1:]) for loss in losses}) > 1:
        raise ValueError(
            f"measure expected all batches to have rows of one length, got {sorted(lengths)}. Return their tokens "
            "alone, on one axis: loss[mask], depth[mask]."
        )
    return Measured(torch.cat(losses), torch.cat(each))


def forced(score: Score, data: Iterable[Any], steps: int) -> list[Measured]:
    """The depth curve: all tokens at depth 1, at depth 2, … at depth `steps`, with the same weights.

    A model that is trained at one fixed depth is usually better at it, and is the stricter baseline.
    """
    data = list(data)
    return [measure(score, data, min_depth=depth, max_depth=depth) for depth in range(1, steps + 1)]


def mixture(fixed: list[Measured], mean: float) -> Measured:
    """The expected loss if some rows run at one fixed depth and the rest at another, so that the mean is `mean`.

    It takes the best of all pairs of depths. With separately trained models this is the lower hull of their losses,
    which a policy has to beat.

    Arguments: `fixed`, what was measured at depth 1, 2, …
    Raises: `ValueError` if `mean` is outside these depths, or `fixed` is no list of what was measured.
    """
    _check_curve("mixture", fixed)
    if not 1 <= mean <= len(fixed):
        raise ValueError(f"mixture expected a mean depth from 1 to {len(fixed)}, got {mean}.")
    mixed = [
        _between(low, high, (mean - i) / max(1, j - i))
        for i, low in enumerate(fixed, 1)
        for j, high in enumerate(fixed[i - 1 :], i)
        if i <= mean <= j
    ]
    return min(mixed, key=lambda each: each.nats if math.isfinite(each.nats) else math.inf)


def _between(low: Measured, high: Measured, part: float) -> Measured:
    """The expected loss and depth if a token is of `high` with probability `part`, and otherwise of `low`."""
    if part in (0, 1):  # the other one may not be finite
        one = high if part else low
        return Measured(one.loss, one.depth.double())
    return Measured(torch.lerp(low.loss, high.loss, part), torch.lerp(low.depth.double(), high.depth.double(), part))


def oracle(fixed: list[Measured]) -> Oracle:
    """The headroom: every token at the depth of its smallest loss, and at the shallowest of several such depths.

    No policy reaches it, because it reads the label.
    Raises: `ValueError` if `fixed` is no list of what was measured at each depth.
    """
    _check_curve("oracle", fixed)
    losses = torch.stack([each.loss for each in fixed], -1)
    least, best = losses.min(-1)
    return Oracle(Measured(least, best + 1), (least < losses[..., -1]).double().mean().item())


def gain_by(shallow: Measured, deep: Measured, groups: Tensor) -> list[Group]:
    """Which tokens gain from depth: the loss of `shallow` minus that of `deep`, for each group of tokens.

    Arguments: `groups`, integers in the shape of the tokens, such as the place in a word, the decile of the entropy,
    or a class of frequency.
    Raises: `ValueError` if `shallow`, `deep` and `groups` are not of the same tokens.
    """
    _check_same("gain_by", shallow, deep)
    return group_means(shallow.loss - deep.loss, groups)


def by_exit(measured: Measured) -> list[Group]:
    """Share and mean loss of the tokens that exit at each depth; depths without exits are not listed."""
    return group_means(measured.loss, measured.depth)


def deciles(values: Float[Tensor, "*tokens"]) -> Int[Tensor, "*tokens"]:
    """The group of each value among ten groups of equal size, from 0, the smallest values, to 9."""
    rank = values.flatten().argsort(stable=True).argsort()
    return (rank * 10 // max(1, values.numel())).view(values.shape)


def group_means(values: Float[Tensor, "*tokens"], groups: Tensor) -> list[Group]:
    """The share and the mean value of each group of tokens, in ascending order of their names.

    Arguments: `values` and `groups` of one shape.
    Raises: `ValueError` if their shapes differ.
    """
    if values.shape != groups.shape:
        raise ValueError(
            f"group_means expected a group for each value, {tuple(values.shape)}, got {tuple(groups.shape)}."
        )
    names, which = groups.unique(return_inverse=True)
    counts = which.flatten().bincount(minlength=len(names)).double()
    sums = torch.zeros_like(counts).index_add_(0, which.flatten(), values.flatten().double())
    rows = zip(names.tolist(), (counts / values.numel()).tolist(), (sums / counts).tolist(), strict=True)
    return [Group(*row) for row in rows]


def _check_same(owner: str, measured: Measured, other: Measured) -> None:
    if measured.loss.shape != other.loss.shape:
        raise ValueError(
            f"{owner} expected the same tokens measured, of shape {tuple(measured.loss.shape)}, got "
            f"{tuple(other.loss.shape)}. Measure both on the same batches."
        )


def _check_curve(owner: str, fixed: object) -> None:
    if not isinstance(fixed, list | tuple) or not fixed or not all(isinstance(each, Measured) for each in fixed):
        got = "an empty list" if fixed == [] else named(fixed)
        raise ValueError(
            f"{owner} expected fixed, a list with a Measured for each depth from 1 on, got {got}. Pass forced(score, "
            "data, steps)."
        )
