"""A Hugging Face causal language model in which each token runs the layers as often as it needs."""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, TypeVar, final, no_type_check, overload

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .._called import Called
from ..loop.bounds import Depth
from ..loop.trace import Output, Trace
from ..loop.wrapper import RecurrentWrapper
from ..rules import Rule
from .anatomy import anatomy_of
from .attention import NAME
from .cache import AdaptiveCache
from .config import AdaptiveConfig
from .generation import AdaptiveGenerationMixin
from .inputs import cache_of, check_inputs, check_positions, new_columns, positions_of, refuse_unknown
from .pieces import KINDS, bind, complete, describe, rebind
from .saving import check_loaded, write_gates
from .stack import Stack

Forward = TypeVar("Forward", bound=Callable[..., Any])


def _tuple_on_request(forward: Forward) -> Forward:
    """transformers' decorator with the type of what it decorates."""
    return can_return_tuple(forward)


@dataclass
@no_type_check  # made from a dictionary as well, as every output of transformers
class AdaptiveOutput(CausalLMOutputWithPast):
    """What an adapted model returns: what causal language models do, and beside it `trace` and `states`.

    Shapes:
        loss: `()`, with labels.
        logits: `(batch, kept, vocabulary)`.
        past_key_values: the `AdaptiveCache`, if one is used; from transformers 5.24 on also `cache`.
        trace: of the loop, over the tokens passed now.
        states: `(batch, seq, steps, dim)` on request: the loop's, before coda and outer norm.
    """

    trace: Trace = None  # type: ignore[assignment]  # always there; what stands before it has defaults
    states: Tensor | None = None


@final
class AdaptiveForCausalLM(Called, PreTrainedModel, AdaptiveGenerationMixin):
    """A causal language model whose layers, or some of them, each token runs as often as it needs; made by `adapt`.

    `base` is the original and owns its weights; `loop` the `RecurrentWrapper`, whose `gate`, `rule`,
    `update` and `checkpoint` may be reassigned; `prelude` and `coda` what runs once before and after
    it, None where there is nothing. `base` now attends through the loop and no longer runs alone.

    Arguments: `config`; `base`, None for a new one as `config` says; `pieces`, of "gate", "rule" and
    "update" those that stand in place of the ones in `config`.
    """

    config_class = AdaptiveConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    base: PreTrainedModel

    def __init__(
        self, config: AdaptiveConfig, base: PreTrainedModel | None = None, pieces: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(config)
        self.base = AutoModelForCausalLM.from_config(config.text_config) if base is None else base
        config.text_config = self.base.config
        self.anatomy, layers = anatomy_of(self.base), self.base.config.num_hidden_layers
        self.base.config._attn_implementation = NAME
        self.generation_config = self.base.generation_config
        pieces = complete(pieces or {}, config, self.base)
        start, stop = (0, layers) if config.span is None else config.span
        self.prelude = self._once(0, start)
        self.loop = RecurrentWrapper(Stack(self.base, config.span), config.steps, **pieces)
        self.coda = self._once(stop, layers)
        self._bound: dict[str, Any] = {}
        self.post_init()

    def _once(self, start: int, stop: int) -> RecurrentWrapper | None:
        """The layers of a span, run once."""
        return RecurrentWrapper(Stack(self.base, [start, stop]), 1) if start < stop else None

    @_tuple_on_request
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        min_depth: Depth = None,
        max_depth: Depth = None,
        rule: Rule | None = None,
        states: bool = False,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **others: Any,
    ) -> AdaptiveOutput:
        """Run the model.

        Arguments:
            input_ids: `(batch, seq)`, the tokens passed now; or `inputs_embeds (batch, seq, dim)`.
            attention_mask: `(batch, seq)` or, with those in the cache before them, longer; 0 or False
                for padding, anywhere.
            labels: `(batch, seq)`, -100 where nothing is to be learned; shifted inside.
            past_key_values: an `AdaptiveCache`, of earlier passes or new. For inference only.
            use_cache: whether to begin a cache; None: only with `past_key_values`.
            min_depth, max_depth: an int, or an integer tensor that broadcasts to `(batch, seq)`.
            rule: in place of the loop's, in this call.
            states: whether to return every iteration's state.
            logits_to_keep: how many of the last logits, or which columns; 0: all.
            cache: `past_key_values`, as transformers calls it from 5.24 on.
            others: `position_ids (batch, seq)`, which must be those that are counted, each token's place
                among its row's real ones; and what the loss takes.

        Raises: `ValueError` for arguments that do not fit together or that are not known.
        """
        positions = others.pop("position_ids", None)
        refuse_unknown(others)
        check_inputs(input_ids, inputs_embeds)
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        held = cache_of(use_cache, past_key_values, cache)
        mask = new_columns(attention_mask, x, held)
        self._check_positions(positions, x, mask, held)
        with nullcontext() if held is None else held.passing(x, mask):
            options = {"min_depth": min_depth, "max_depth": max_depth, "states": states}
            hidden, out = self._run(x, mask, held, rule, options)
        logits = self._logits(hidden, logits_to_keep)
        loss = None
        if labels is not None:
            words = logits.shape[-1]
            loss = self.base.loss_function(logits=logits, labels=labels, vocab_size=words, **others)
        return AdaptiveOutput(loss, logits, held, trace=out.trace, states=out.states)

    def _run(
        self, x: Tensor, mask: Tensor | None, cache: AdaptiveCache | None, rule: Rule | None, options: dict[str, Any]
    ) -> tuple[Tensor, Output]:
        """The last hidden states, and the loop's output."""
        self._bind()
        parts = {} if cache is None else cache.parts
        if self.config.span is not None:
            x = self._embed(x, mask, cache)
        if self.prelude is not None:
            x = self.prelude(x, mask=mask, cache=parts.get("prelude")).hidden
        out = (self.loop if rule is None else _with_rule(self.loop, rule))(
            x, mask=mask, cache=parts.get("loop"), **options
        )
        hidden = out.hidden
        if self.coda is not None:
            hidden = self.coda(hidden, mask=mask, cache=parts.get("coda")).hidden
        return hidden, out

    def _check_positions(
        self, given: Tensor | None, x: Tensor, mask: Tensor | None, cache: AdaptiveCache | None
    ) -> None:
        table = self.anatomy.position
        if table is None and given is None:
            return  # rotary: nothing to look at
        limit = None if table is None else getattr(self.loop.block.backbone, table).num_embeddings
        check_positions(given, positions_of(x, mask, cache), mask, limit)

    def _embed(self, x: Tensor, mask: Tensor | None, cache: AdaptiveCache | None) -> Tensor:
        """What the backbone does to embeddings before its first layer, where the loop does not."""
        backbone, anatomy = self.loop.block.backbone, self.anatomy
        if anatomy.position is not None:
            x = x + getattr(backbone, anatomy.position)(positions_of(x, mask, cache))
        return x if anatomy.dropout is None else getattr(backbone, anatomy.dropout)(x)

    def _logits(self, hidden: Tensor, keep: int | Tensor) -> Tensor:
        if not isinstance(keep, int) or keep:
            hidden = hidden[:, -keep:] if isinstance(keep, int) else hidden[:, keep]
        if self.config.span is not None:
            hidden = getattr(self.loop.block.backbone, self.anatomy.norm)(hidden)
        return self.get_output_embeddings()(hidden)

    def init_weights(self) -> None:
        """Nothing: base and pieces have made their own."""

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing, for the same reason; those of the base come to it by its own."""

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the base's, also where pieces refer to it."""
        old = self.base.get_input_embeddings()
        self.base.set_input_embeddings(value)
        self._rebind(old, value)

    def get_output_embeddings(self) -> nn.Module:
        """The base's head."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the base's head, also where pieces refer to it."""
        old = self.base.get_output_embeddings()
        self.base.set_output_embeddings(new_embeddings)
        self._rebind(old, new_embeddings)

    def _rebind(self, old: nn.Module, new: nn.Module) -> None:
        for name in KINDS:
            rebind(getattr(self.loop, name), old, new)
        self._bound = {}

    def _bind(self) -> None:
        """See that pieces refer to the base's modules, once for each that was assigned or wrapped."""
        pieces = {name: getattr(self.loop, name) for name in KINDS}
        if any(piece is not self._bound.get(name) for name, piece in pieces.items()):
            self._bound = pieces
            for piece in pieces.values():
                bind(piece, self.base)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Checkpoint whole iterations, never the layers in them: a recomputed layer would not know who ran."""
        del args, kwargs
        for part in (self.prelude, self.loop, self.coda):
            if part is not None:
                part.checkpoint = enable

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether iterations are checkpointed."""
        return self.loop.checkpoint

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The older name of `is_activation_checkpointing`."""
        return self.loop.checkpoint

    @overload
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], *, output_loading_info: Literal[True], **kwargs: Any
    ) -> "tuple[AdaptiveForCausalLM, dict[str, Any]]": ...

    @overload
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any
    ) -> "AdaptiveForCausalLM": ...

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Load a saved adapted model; `gate=`, `rule=` and `update=` stand in place of those saved.

        Raises: `ValueError` if the checkpoint is not of this model, or names pieces that are not imported.
        """
        given = {name: kwargs.pop(name) for name in KINDS if name in kwargs}
        report = kwargs.pop("output_loading_info", False)
        kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # refused here, by name
        model, info = super().from_pretrained(pretrained_model_name_or_path, None, given, **kwargs)
        check_loaded(given, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        return (model, info) if report else model

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save weights and configuration, with the pieces as they are now.

        Raises: `ValueError` for a piece that cannot be described.
        """
        self._describe()
        super().save_pretrained(save_directory, *args, **kwargs)

    def save_gates(self, path: str | PathLike[str]) -> None:
        """Save gate and update alone, with the configuration; `load_gates` puts them on a base.

        Raises: `ValueError` for a piece that cannot be described.
        """
        self._describe()
        write_gates(self.loop, self.config, path)

    def _describe(self) -> None:
        self._bind()
        self.config.pieces = {name: describe(getattr(self.loop, name), self.base) for name in KINDS}
        self.config.steps = self.loop.steps


def _with_rule(loop: RecurrentWrapper, rule: Rule) -> RecurrentWrapper:
    """The same loop with another rule; the one that others may be running is not touched."""
    loop = copy.copy(loop)
    loop.__dict__["rule"] = rule  # goes before a rule that is a module
    return loop
