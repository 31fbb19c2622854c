"""`calibrate`: the threshold for a wanted cost, in units of the model before it was looped."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, final

from torch import Tensor

from ..calibration import Goal, arguments, check_rule, fit
from ..calibration import OutOfReach as OutOfReach
from ..loop.wrapper import RecurrentWrapper
from ..rules import Rule, Threshold
from . import flops
from .inputs import inputs_of
from .model import AdaptiveForCausalLM


@final
class Calibration(NamedTuple):
    """What `calibrate` found.

    `rule` holds the threshold `tau`: assign it to the loop's `rule`, or pass it to a call. `depth` is the mean depth of
    the tokens to which the threshold was fitted, and `unseen_depth` that of the others. `relative_flops` and
    `unseen_relative_flops` are the costs of these depths.
    """

    rule: Rule
    tau: float
    depth: float
    relative_flops: float
    unseen_depth: float
    unseen_relative_flops: float


def calibrate(
    model: AdaptiveForCausalLM | RecurrentWrapper,
    data: Iterable[Tensor | Mapping[str, Any]],
    relative_flops: float = 3.2,
    rule: Callable[[float], Rule] = Threshold,
) -> Calibration:
    """The threshold at which a token costs, on average, `relative_flops` passes of the model before it was looped.

    It works for any gate or exit criterion, and does not change the model. `adadepth.calibrate` does the same for a
    mean depth.

    Arguments:
        model: an adapted causal language model, or a `RecurrentWrapper`.
        data: two batches or more. The threshold is fitted to the first, third, fifth and so on. The others only
            measure the `unseen` values. For a language model, a batch is ids `(batch, seq)`, or a mapping with
            `input_ids` and perhaps `attention_mask` and the `position_ids` of several texts in a row. For a
            `RecurrentWrapper`, it is rows `(batch, seq, dim)`, or a mapping of its arguments.
        relative_flops: (F0 + mean depth · F) / (F0 + F). F is the number of parameters of the looped layers, F0 that of
            the layers that run once. If the whole backbone is looped, this is the mean depth.
        rule: makes a rule from a threshold: `Threshold`, `SurvivalThreshold` or a function. The search takes
            thresholds from the scores in the data and their running products.

    Raises: `ValueError` if the loop has no gate, if there are fewer than two batches, or if one of the two parts holds
        no real token; `OutOfReach`, a `ValueError`, if no threshold costs `relative_flops`.
    Source: relative FLOPs: AdaPonderLM, arXiv 2603.01914.
    """
    check_rule(rule)
    looped = model if isinstance(model, RecurrentWrapper) else model.loop
    batches = [arguments(batch if model is looped else _of_language(batch), model) for batch in data]
    depth = flops.depth(model, relative_flops)
    goal = Goal("relative_flops", relative_flops, depth, lambda depth: flops.relative(model, depth))
    found = fit(model, looped, batches, rule, goal)
    cost, unseen = flops.relative(model, found.depth), flops.relative(model, found.unseen_depth)
    return Calibration(found.rule, found.tau, found.depth, cost, found.unseen_depth, unseen)


def _of_language(batch: Any) -> Any:
    """What the passes need of ids or a mapping: no labels, and as few logits as possible."""
    if not isinstance(batch, Tensor | Mapping):
        return batch  # refused as for any model
    return inputs_of(batch) | {"logits_to_keep": 1}
