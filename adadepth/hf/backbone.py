"""An adapted model without its head, as trainers call it: `model.base_model(...).last_hidden_state`."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, final, no_type_check

from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .._references import referring
from ..loop.bounds import Depth
from ..loop.trace import Output, Trace
from ..rules import Rule
from .cache import AdaptiveCache
from .ends import around
from .inputs import (
    cache_of,
    check_inputs,
    check_positions,
    learned_positions,
    new_columns,
    positions_of,
    refuse_unknown,
)
from .routers import routed, wants_routers
from .segments import Segments

# Hidden states that are asked for: all (True), or those with these numbers.
Wanted = int | list[int] | None
Hidden = tuple[Tensor | None, ...] | None


@dataclass
@no_type_check  # made from a dictionary as well, as every output of transformers
class AdaptiveBackboneOutput(BaseModelOutputWithPast):
    """The output of an adapted model without its head.

    Shapes:
        last_hidden_state: `(batch, seq, dim)`, the input of the head.
        past_key_values: the `AdaptiveCache`, if one is used.
        hidden_states: on request, `(batch, seq, dim)` each: the embeddings, the output of each layer before the loop,
            the state after each iteration, the output of each layer after the loop. The last is
            `last_hidden_state`. None for those that were not requested.
        trace: the loop's trace, for the tokens of this call.
        states: `(batch, seq, steps, dim)` on request: the loop's states, before the coda and a norm outside the loop.
        router_logits: of a mixture of experts, on request: `(tokens, experts)` for each layer and iteration, for the
            tokens that ran.
    """

    trace: Trace = None  # type: ignore[assignment]  # always there; what stands before it has defaults
    states: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@final
class AdaptiveBackbone(nn.Module):
    """An adapted model without its head. It refers to the model, and has no weights of its own."""

    model: Any
    __setattr__ = referring("model")

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self.model.config

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        min_depth: Depth = None,
        max_depth: Depth = None,
        rule: Rule | None = None,
        states: bool = False,
        output_hidden_states: Wanted = None,
        output_router_logits: bool | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        **others: Any,
    ) -> AdaptiveBackboneOutput:
        """The last hidden states and the loop's trace. Arguments and errors are those of the model."""
        model = self.model
        refuse_unknown(others, position_ids)
        check_inputs(input_ids, inputs_embeds)
        x = model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        held = cache_of(use_cache, past_key_values, cache)
        mask = new_columns(attention_mask, x, held)
        texts = None if held is not None else Segments.of(position_ids, x.shape[:2], mask)
        if texts is not None:
            x, mask, position_ids = texts.rows(x), texts.mask, None
            min_depth, max_depth = texts.rows(min_depth), texts.rows(max_depth)
        self._check_positions(position_ids, x, mask, held)
        wanted = model.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        options = {"min_depth": min_depth, "max_depth": max_depth, "states": states or bool(wanted)}
        router = wants_routers(model.config) if output_router_logits is None else output_router_logits
        with nullcontext() if held is None else held.passing(x, mask), routed(model.base, router) as routers:
            hidden, out, every = _run(model, x, mask, held, rule, options, wanted)
        parts = (hidden, out.trace, out.states if states else None, every)
        hidden, trace, kept, every = parts if texts is None else _back(texts, *parts)
        return AdaptiveBackboneOutput(
            hidden,
            held,
            hidden_states=every,
            trace=trace,
            states=kept,
            router_logits=None if routers is None else tuple(routers),
        )

    def _check_positions(
        self, given: Tensor | None, x: Tensor, mask: Tensor | None, cache: AdaptiveCache | None
    ) -> None:
        limit = learned_positions(self.model.base, self.model.anatomy)
        if limit is not None or given is not None:
            check_positions(given, positions_of(x, mask, cache), mask, limit)


def _run(
    model: Any,
    x: Tensor,
    mask: Tensor | None,
    cache: AdaptiveCache | None,
    rule: Rule | None,
    options: dict[str, Any],
    wanted: Wanted,
) -> tuple[Tensor, Output, Hidden]:
    """The last hidden states, the loop's output, and on request the states before, in and after it."""
    model.bind()
    parts = {} if cache is None else cache.parts
    before: list[Tensor] = []
    after: list[Tensor] = []
    outs: list[Output] = []

    def once(name: str, x: Tensor, seen: list[Tensor]) -> Tensor:
        part = getattr(model, name)
        if part is None:
            return x
        given = {"see": seen.append} if wanted else None
        hidden: Tensor = part(x, mask=mask, cache=parts.get(name), block_kwargs=given).hidden
        return hidden

    def layers(x: Tensor) -> Tensor:
        before.append(x)
        x = once("prelude", x, before)
        outs.append(model.loop_with(rule)(x, mask=mask, cache=parts.get("loop"), **options))
        return once("coda", outs[-1].hidden, after)

    if model.config.span is None:
        hidden = layers(x)
    else:
        positions = positions_of(x, mask, cache)
        hidden = around(model.base, model.anatomy, x, positions, layers, lambda: model.loop.block.tuples)
    states = outs[-1].states
    every = (*before, *states.unbind(2), *after) if wanted and states is not None else None
    return hidden, outs[-1], None if every is None else _only(wanted, (*every[:-1], hidden))


def _only(wanted: Wanted, every: tuple[Tensor, ...]) -> Hidden:
    """The hidden states that are wanted, counted from either end, and None for the others."""
    if wanted is True or wanted is None:
        return every
    kept = {wanted} if isinstance(wanted, int) else {*wanted}
    return tuple(h if kept & {i, i - len(every)} else None for i, h in enumerate(every))


def _back(
    texts: Segments, hidden: Tensor, trace: Trace, states: Tensor | None, every: Hidden
) -> tuple[Tensor, Trace, Tensor | None, Hidden]:
    return (
        texts.back(hidden),
        Trace(*map(texts.back, trace)),
        None if states is None else texts.back(states),
        None if every is None else tuple(None if h is None else texts.back(h) for h in every),
    )
