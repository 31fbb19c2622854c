"""`calibrate`: the threshold for a wanted cost, in units of the model before it was looped."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, final

from torch import Tensor

from ..calibration import Goal, arguments, fit
from ..calibration import OutOfReach as OutOfReach
from ..loop.wrapper import RecurrentWrapper
from ..rules import Rule, Threshold
from . import flops
from .model import AdaptiveForCausalLM


@final
class Calibration(NamedTuple):
    """What `calibrate` found.

    `rule` holds the threshold `tau`: assign it to the loop's `rule`, or pass it to a call. `depth` is the
    mean over the tokens that were fitted, `unseen_depth` over those that were not; beside each, its
    relative FLOPs.
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

    For any gate or exit criterion. The model is left as it was. `adadepth.calibrate` is the same for a mean depth.

    Arguments:
        model: an adapted causal language model, or a `RecurrentWrapper`.
        data: two batches or more, every second of which is kept unseen. For a language model ids
            `(batch, seq)` or mappings that hold `input_ids` and maybe `attention_mask`; for a
            `RecurrentWrapper` rows `(batch, seq, dim)` or mappings of its arguments.
        relative_flops: (F0 + mean depth · F) / (F0 + F), with F the parameters of the looped layers and
            F0 of those that run once; the mean depth where the whole backbone is looped.
        rule: makes a rule of a threshold: `Threshold`, `SurvivalThreshold` or a function. The threshold
            is looked for among the scores that were seen and their running products.

    Raises: `ValueError` if the loop has no gate, if there are fewer than two batches or one of the two
        parts holds no real token; `OutOfReach`, which is one, if nothing costs `relative_flops`.
    Source: relative FLOPs: AdaPonderLM, arXiv 2603.01914.
    """
    looped = model if isinstance(model, RecurrentWrapper) else model.loop
    batches = [arguments(batch if model is looped else _of_language(batch), model) for batch in data]
    depth = flops.depth(model, relative_flops)
    goal = Goal("relative_flops", relative_flops, depth, lambda depth: flops.relative(model, depth))
    found = fit(model, looped, batches, rule, goal)
    cost, unseen = flops.relative(model, found.depth), flops.relative(model, found.unseen_depth)
    return Calibration(found.rule, found.tau, found.depth, cost, found.unseen_depth, unseen)


def _of_language(batch: Any) -> Any:
    """Of ids or a mapping what the passes need: no labels, and no more logits than must be."""
    if not isinstance(batch, Tensor | Mapping):
        return batch  # refused as for any model
    given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    return {**{name: given[name] for name in ("input_ids", "attention_mask") if name in given}, "logits_to_keep": 1}
