"""A Hugging Face causal language model in which each token runs the layers as often as it needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, TypeVar, final, no_type_check, overload

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .._called import Called
from ..loop.agreement import altered
from ..loop.bounds import Depth
from ..loop.checks import check_part
from ..loop.trace import Trace
from ..loop.wrapper import RecurrentWrapper
from ..rules import Rule
from .anatomy import anatomy_of
from .attention import NAME
from .backbone import AdaptiveBackbone, Wanted
from .binding import bind, mark
from .cache import CACHE
from .check import check
from .config import AdaptiveConfig
from .ends import head
from .generation import AdaptiveGenerationMixin
from .inputs import LOSS_OPTIONS
from .pieces import KINDS, complete, describe, reset
from .routers import wants_routers
from .saving import check_loaded, write_card, write_gates
from .serving import AdaptiveServingMixin
from .stack import Stack

Forward = TypeVar("Forward", bound=Callable[..., Any])


def _tuple_on_request(forward: Forward) -> Forward:
    """transformers' decorator with the type of what it decorates."""
    return can_return_tuple(forward)


@dataclass
@no_type_check  # made from a dictionary as well, as every output of transformers
class AdaptiveOutput(CausalLMOutputWithPast):
    """The output of an adapted model: that of causal language models, with `trace` and `states`.

    Shapes:
        loss: `()`, with labels.
        logits: `(batch, kept, vocabulary)`.
        past_key_values: the `AdaptiveCache`, if one is used; from transformers 5.24 on also `cache`.
        trace: the loop's trace, for the tokens of this call.
        states: `(batch, seq, steps, dim)` on request: the loop's states, before the coda and a norm outside the loop.
        router_logits, aux_loss: of a mixture of experts, on request; `loss` includes `aux_loss`.
    """

    trace: Trace = None  # type: ignore[assignment]  # always there; what stands before it has defaults
    states: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None


@final
class AdaptiveForCausalLM(Called, PreTrainedModel, AdaptiveServingMixin, AdaptiveGenerationMixin):
    """A causal language model that runs its layers, or a slice of them, several times per token; made by `adapt`.

    `base` is the original model, and owns the weights. `loop` is the `RecurrentWrapper`, whose `gate`, `rule`, `update`
    and `checkpoint` may be reassigned. `prelude` and `coda` hold the layers that run once before and after the loop, or
    are None. The attention of `base` now goes through the loop, so `base` can no longer be called by itself.

    Arguments: `config`; `base`, None for a new model as in `config`; `pieces`, a mapping whose "gate", "rule" and
    "update" replace those of `config`.
    """

    config_class = AdaptiveConfig
    supports_gradient_checkpointing = True
    base_model_prefix = "backbone"
    _supports_sdpa = True
    _supports_attention_backend = True
    base: PreTrainedModel

    def __init__(
        self, config: AdaptiveConfig, base: PreTrainedModel | None = None, pieces: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(config)
        self.base = AutoModelForCausalLM.from_config(config.text_config) if base is None else base
        config.text_config = self.base.config
        self.anatomy = anatomy_of(self.base)
        layers, text = self.anatomy.number, self.anatomy.of(self.base).config
        known = text._attn_implementation  # a copy of a model has forgotten it
        self.attention = known if known not in (None, NAME) else "sdpa" if self.base._supports_sdpa else "eager"
        text._attn_implementation = NAME
        self.generation_config = self.base.generation_config
        pieces = complete(pieces or {}, config, self.base, self.anatomy)
        start, stop = (0, layers) if config.span is None else config.span
        self.prelude = self._once(0, start)
        self.loop = RecurrentWrapper(Stack(self.base, self.anatomy, config.span), config.steps, **pieces)
        self.coda = self._once(stop, layers)
        self._marked: dict[str, Any] = {}  # the pieces whose references have marks
        self.bind()
        self._made = False
        self.post_init()
        self._made = True

    def _once(self, start: int, stop: int) -> RecurrentWrapper | None:
        """The layers of a span, run once."""
        return RecurrentWrapper(Stack(self.base, self.anatomy, [start, stop]), 1) if start < stop else None

    @property
    def backbone(self) -> AdaptiveBackbone:
        """The model without its head, which transformers calls `base_model`."""
        held: AdaptiveBackbone | None = self.__dict__.get("_backbone")
        if held is None or held.model is not self:  # a copy has one of its own
            held = self.__dict__["_backbone"] = AdaptiveBackbone(self)
        return held

    def get_decoder(self) -> AdaptiveBackbone:
        """The same."""
        return self.backbone

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
        output_hidden_states: Wanted = None,
        output_router_logits: bool | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        **others: Any,
    ) -> AdaptiveOutput:
        """Run the model.

        Arguments:
            input_ids: `(batch, seq)`, the tokens of this call; or `inputs_embeds (batch, seq, dim)`.
            attention_mask: `(batch, seq)`, or longer if it includes the tokens in the cache; 0 or False for padding,
                anywhere.
            labels: `(batch, seq)`, -100 where there is no label. The model shifts them.
            past_key_values: an `AdaptiveCache`, of earlier passes or new. For inference only.
            use_cache: whether to make a new cache; None: only with `past_key_values`.
            min_depth, max_depth: an int, or an integer tensor that broadcasts to `(batch, seq)`.
            rule: replaces the loop's rule in this call.
            states: whether to return every iteration's state.
            logits_to_keep: how many of the last logits to return, or which columns; 0: all.
            output_hidden_states: whether to return the embeddings and the outputs of layers and iterations. An int
                or several ints return only these of them, counted from the start or, if negative, from the end.
            output_router_logits: for a mixture of experts, whether to return them and to add its auxiliary loss, over
                the tokens that ran; None: as in the base's configuration.
            position_ids: `(batch, seq)`, each token's place among the real tokens of its row. If a row holds several
                texts, its place in its text.
            cache: the name of `past_key_values` from transformers 5.24 on.
            others: arguments of the loss; and, with `position_ids`, those that tell kernels about several texts in a
                row.

        Raises: `ValueError` for arguments that do not fit together or that are not known.
        """
        loss = {name: others.pop(name) for name in LOSS_OPTIONS if others.get(name) is not None}
        out = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            min_depth=min_depth,
            max_depth=max_depth,
            rule=rule,
            states=states,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            position_ids=position_ids,
            cache=cache,
            **others,
        )
        hidden = out.last_hidden_state
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden = hidden[:, kept]
        if labels is not None:
            loss["labels"] = labels
        if out.router_logits is not None:
            loss |= {"router_logits": out.router_logits, "output_router_logits": True}
        elif wants_routers(self.config):
            loss["output_router_logits"] = False
        said = head(self.base, self.anatomy, hidden, **loss)
        return AdaptiveOutput(
            said.loss,
            said.logits,
            getattr(out, CACHE),
            out.hidden_states,
            trace=out.trace,
            states=out.states,
            router_logits=out.router_logits,
            aux_loss=getattr(said, "aux_loss", None),
        )

    def loop_with(self, rule: Rule | None) -> RecurrentWrapper:
        """The loop, or a copy of it with another rule if one is given. The loop itself does not change.

        Raises: `ValueError` for what is no rule.
        """
        loop: RecurrentWrapper = self.loop if rule is None else altered(self.loop, rule=check_part("rule", rule))
        return loop

    def check(self) -> None:
        """Check the model on a few tokens. `adapt` does this; you may call it again at any time.

        It compares logits at depth 1 with those of the original model, each row of a padded batch at mixed depths with
        the row alone, and decoding with a cache with a pass without one.

        Raises: `ValueError` that says what differs, and by how much.
        """
        check(self)

    def init_weights(self) -> None:
        """Initialise all weights: the base as transformers does, gate and update as their constructors do.

        This is for a model that was built on the meta device. Weights that are initialised already do not change.
        """
        if self._made:
            self.base.init_weights()
            reset(self.loop, self.base)

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: base and pieces initialise their own weights."""

    def get_input_embeddings(self) -> nn.Module:
        """The input embeddings of the base."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the input embeddings of the base, also where pieces refer to them."""
        self.base.set_input_embeddings(value)
        self.bind()

    def get_output_embeddings(self) -> nn.Module:
        """The base's head."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the base's head, also where pieces refer to it."""
        self.base.set_output_embeddings(new_embeddings)
        self.bind()

    def bind(self) -> None:
        """Make pieces refer to the modules that the base has now. Every pass does this first."""
        pieces = {name: getattr(self.loop, name) for name in KINDS}
        for name, piece in pieces.items():
            if piece is not self._marked.get(name):
                mark(piece, self.base)
            bind(piece, self.base)
        self._marked = pieces

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Checkpoint whole iterations, never single layers: a recomputed layer would not know which tokens ran."""
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
        """Load a saved adapted model; `gate=`, `rule=` and `update=` replace the saved ones.

        Raises: `ValueError` if the checkpoint is not of this model, or names pieces that are not imported.
        """
        given = {name: kwargs.pop(name) for name in KINDS if name in kwargs}
        report = kwargs.pop("output_loading_info", False)
        kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # refused here, by name
        model, info = super().from_pretrained(pretrained_model_name_or_path, None, given, **kwargs)
        check_loaded(given, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        return (model, info) if report else model

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save weights and configuration, with the current pieces, and a model card that says how to load them.

        Raises: `ValueError` for a piece that cannot be described.
        """
        self._describe()
        super().save_pretrained(save_directory, *args, **kwargs)
        write_card(self.config, save_directory)

    def _upload_modified_files(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload a folder; transformers calls this when it has written weights, configuration and an empty card."""
        write_card(self.config, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Does nothing: every saved folder already names its classes for `trust_remote_code=True`."""

    def save_gates(self, path: str | PathLike[str]) -> None:
        """Save only gate and update, with the configuration; `load_gates` adds them to a base again.

        Raises: `ValueError` for a piece that cannot be described.
        """
        self._describe()
        write_gates(self.loop, self.config, path)

    def _describe(self) -> None:
        self.bind()
        self.config.pieces = {name: describe(getattr(self.loop, name), self.base) for name in KINDS}
        self.config.steps = self.loop.steps
