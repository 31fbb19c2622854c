"""Generation with an adapted model: its cache, its depths for each call or row, and rows that have ended."""

import copy
from typing import Any, final

from torch import Tensor
from transformers import GenerationMixin, StoppingCriteriaList
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from .cache import CACHE
from .depths import DEPTHS, GivenDepth, in_rows, of_columns
from .drafted import drafted
from .drafts import Drafts
from .guidance import guided
from .inputs import cache_of, check_padding, check_past

# Arguments of `generate` itself, which it also passes to each step.
_OF_GENERATE = ("tokenizer", "assistant_tokenizer")
# Arguments of `generate` that only adapted models take: those of each pass, and all of them. A configuration may hold
# them as well.
_OF_PASSES = (*DEPTHS, "rule")
_OWN = (*_OF_PASSES, "draft_depth", "revise_drafts")


@final
class _Finished(StoppingCriteriaList):
    """Stopping criteria that remember which `rows` have ended and need not run their newest token; None if none has.

    If the cache `goes_on` to another turn, a row still runs the token with which it ended: it is part of the text.
    """

    rows: Tensor | None = None
    ended: Tensor | None = None

    def __init__(self, criteria: Any, goes_on: bool) -> None:
        super().__init__(criteria)
        self.goes_on = goes_on

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done: Tensor = super().__call__(input_ids, scores, **kwargs)
        # If no end-of-text token is set, generate continues the text of rows that have ended.
        before = self.ended
        if any(hasattr(criterion, "eos_token_id") for criterion in self) and bool(done.any()):
            self.ended = done if before is None else before | done
        self.rows = before if self.goes_on else self.ended
        return done


class AdaptiveGenerationMixin(GenerationMixin):
    """`generate` of transformers, with `min_depth`, `max_depth`, `rule` and drafts.

    `min_depth` and `max_depth` are each one of four things: an int; an integer tensor `(batch, 1)`, with a depth per
    row; one of shape `(batch, columns)`, with a depth per token, such as the `depth` of an earlier call's cache, which
    repeats that call; or a function of the ids so far, `(batch, length)`, whose result broadcasts to them. `rule`
    replaces the loop's rule; its threshold may be `(batch, 1)`.

    `draft_depth=n`: after n iterations of a token, the next token begins, as a guess: the one that the model would
    choose from the state so far. If the model chooses another one in the end, the guess is dropped. The text is
    therefore the same, with sampling too. Rows do not wait for each other. With `revise_drafts=True`, the guess is made
    again after each later iteration.

    A `GenerationConfig` may hold all five as well. Padding must be on the left.
    """

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """What a configuration says of these, the call's or the model's, holds unless the call names its own."""
        given = {name: kwargs.pop(name) for name in _OWN if name in kwargs}
        config, others = super()._prepare_generation_config(generation_config, **kwargs)
        configured = {name: vars(config).pop(name) for name in _OWN if name in vars(config)}
        return config, others | configured | given

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        if not (generation_config.cache_implementation or "dynamic").startswith("dynamic"):
            raise ValueError(
                f"An adapted model generates with a cache of its own, got cache_implementation="
                f"{generation_config.cache_implementation!r}. Choose its layout: "
                f"{CACHE}=adadepth.hf.AdaptiveCache(layout='compact')."
            )
        given = model_kwargs.get(CACHE)
        cache = cache_of(generation_config.use_cache is not False, given)
        if cache is not None:
            model_kwargs[CACHE] = cache
            cache.goes_on = given is not None or bool(generation_config.return_dict_in_generate)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        past = cache_of(None, model_kwargs.get(CACHE))
        if past is not None and "inputs_embeds" not in model_kwargs and input_ids.shape[1] <= past.get_seq_length() > 0:
            raise ValueError(
                "generate expected all ids so far, those that the cache holds before the new ones, got "
                f"{input_ids.shape[1]} columns with a cache of {past.get_seq_length()}. Pass them all, with the "
                "attention_mask of all."
            )
        mask, columns = model_kwargs.get("attention_mask"), 0 if past is None else past.get_seq_length()
        if past is not None and mask is not None and len(mask) == past.batch_size:
            check_past(mask[:, :columns], past)
        if mask is not None and mask.dim() == 2:
            check_padding(mask, columns)
        own = {name: model_kwargs.pop(name) for name in _OF_PASSES if name in model_kwargs}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | {
            name: in_rows(value, lambda rows: rows.repeat_interleave(expand_size, 0)) for name, value in own.items()
        }

    def _get_logits_processor(self, *args: Any, model_kwargs: Any = None, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        return guided(self, processors, model_kwargs or {})

    def _prepare_position_ids_for_generation(self, *args: Any) -> None:
        """Prepare none: the model counts positions itself."""

    def _sample(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if (depth := kwargs.pop("draft_depth", None)) is not None:
            drafts = Drafts(depth, bool(kwargs.pop("revise_drafts", False)))
            return drafted(self, drafts, input_ids, logits_processor, stopping_criteria, *args, **kwargs)
        finished = _Finished(stopping_criteria, kwargs.get(CACHE) is not None and kwargs[CACHE].goes_on)
        return super()._sample(input_ids, logits_processor, finished, *args, finished=finished, **kwargs)

    def _assisted_decoding(self, input_ids: Tensor, *args: Any, inputs_tensor: Any = None, **kwargs: Any) -> Any:
        return super()._assisted_decoding(input_ids, *args, inputs_tensor=inputs_tensor, all_ids=True, **kwargs)

    def _beam_search(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get(CACHE)
        try:
            return super()._beam_search(input_ids, *args, **kwargs)
        finally:
            if cache is not None:
                cache.end_beams((input_ids if embeds is None else embeds).shape[1])

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,  # generate reads from the signature whether it is accepted
        min_depth: GivenDepth = None,
        max_depth: GivenDepth = None,
        finished: _Finished | None = None,
        draft_depth: int | None = None,
        revise_drafts: bool = False,
        all_ids: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next pass: ids, mask and depths of the new columns.

        If they are not numbered, `all_ids` says that `input_ids` are all so far, those in the cache too.
        """
        if draft_depth is not None:
            raise ValueError(
                "generate(draft_depth=) cannot be used with beams or an assistant. Remove one or the other."
            )
        if revise_drafts:
            raise ValueError("revise_drafts=True expected draft_depth, got None. Pass draft_depth=n as well.")
        for name in _OF_GENERATE:
            kwargs.pop(name, None)
        past = 0 if kwargs.get(CACHE) is None else kwargs[CACHE].get_seq_length()
        if all_ids and inputs_embeds is None and kwargs.get("next_sequence_length") is None:
            kwargs["next_sequence_length"] = input_ids.shape[1] - past
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        now = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        for name, depth in zip(DEPTHS, (min_depth, max_depth), strict=True):
            inputs[name] = of_columns(name, depth, input_ids, past, past + now.shape[1])
        mask = inputs.get("attention_mask")
        if mask is not None:  # the part of the cached tokens was checked at the start
            inputs["attention_mask"] = mask = mask[:, mask.shape[1] - now.shape[1] :]
        if finished is not None and finished.rows is not None:
            inputs["attention_mask"] = _without(finished.rows, mask, now)
        return inputs

    def _get_candidate_generator(self, generation_config: Any, **kwargs: Any) -> Any:
        """With `assistant_early_exit=n` the model drafts for itself, in at most n iterations.

        An assistant runs at its own depths: those of the call are for this model's iterations.
        """
        depth = generation_config.assistant_early_exit
        given = {name: value for name, value in kwargs.pop("model_kwargs").items() if name != "all_ids"}
        if depth is None:
            others = {name: value for name, value in given.items() if name not in _OWN}
            return super()._get_candidate_generator(generation_config=generation_config, model_kwargs=others, **kwargs)
        config = copy.deepcopy(generation_config)
        config.assistant_early_exit = None
        shallow = {**given, "min_depth": None, "max_depth": depth, "draft_depth": None, "revise_drafts": False}
        known = {name: kwargs[name] for name in ("input_ids", "inputs_tensor", "logits_processor")}
        return AssistedCandidateGenerator(assistant_model=self, generation_config=config, model_kwargs=shallow, **known)


def _without(rows: Tensor, mask: Tensor | None, now: Tensor) -> Tensor:
    """The mask of the new columns, False in rows that have ended."""
    go_on = ~rows.to(now.device).unsqueeze(1).expand(now.shape[:2])
    return go_on if mask is None else go_on & mask.bool()
