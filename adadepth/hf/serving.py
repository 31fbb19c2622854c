"""`generate_batch`, and the manager of requests that it uses, as methods of an adapted model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints
from transformers.utils.logging import tqdm

from .._given import integer, named
from ..cache.kv_reuse import LayoutName
from .manager import AdaptiveBatchingManager, AdaptiveGenerationOutput, Sizes, answers
from .memory import Wanted, fitting
from .requests import OWN, configured, ids_of, most_new_tokens

_ROWS, _CAPACITY = 32, 1024


class AdaptiveServingMixin:
    """transformers' continuous batching for adapted models: many requests at once, tokens of many iterations in a call.

    All three methods take the arguments of transformers, and these.

    Arguments:
        rows: how many requests run at once; 32, unless `continuous_batching_config` sets it.
        width: how many tokens a call of the block should run; half of `rows`, unless that configuration sets it.
        capacity: the most tokens of a request, prompt and answer; 1024 unless the lengths are known. Memory for
            `rows * capacity` tokens is allocated at once.
        layout: the layout of the loop's cache, as in `KVReuseCache`.
        draft_depth: after so many iterations of a token, begin the request's next token as a guess, if calls have room
            and guesses save time. Results do not change. None: never, unless a configuration sets it.
        memory: the most bytes that the caches may take, a number or `"2GiB"`. The capacity then sets the rows, at
            most 256. If `rows` is given and `capacity` is not, the rows set the capacity.
    """

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
        *,
        rows: int | None = None,
        width: int | None = None,
        capacity: int | None = None,
        layout: LayoutName = "filled",
        draft_depth: int | None = None,
        memory: int | str | None = None,
    ) -> AdaptiveBatchingManager:
        """A manager of requests, not started. One that was kept from another session keeps its sizes.

        Raises: `ValueError` for a way of generating that is not supported, or sizes below 1.
        """
        model: Any = self
        kept: AdaptiveBatchingManager | None = getattr(self, "_cached_continuous_batching_manager", None)
        if kept is not None and generation_config is None:
            return kept
        config, defaults, draft_depth = _prepared(model, generation_config, {}, draft_depth)
        configured(config, {})
        if config.eos_token_id is None:
            config.eos_token_id = -1  # none: the manager would ask the model's configuration, which generate does not
        if kept is not None:
            kept.configure(config, defaults)
            return kept
        _check_sizes(rows=rows, width=width, capacity=capacity)
        batching = continuous_batching_config or ContinuousBatchingConfig()
        hints = workload_hints or WorkloadHints()
        rows = rows or batching.max_requests_per_batch
        capacity = capacity or hints.max_prompt_length + hints.max_generated_length or None
        if memory is not None:
            rows, capacity = fitting(model, memory, Wanted(rows, capacity, hints.num_requests), _CAPACITY, layout)
        rows, capacity = rows or min(_ROWS, hints.num_requests or _ROWS), capacity or _CAPACITY
        width = width or batching.max_batch_tokens or max(1, rows // 2)
        sizes = Sizes(rows, width, capacity, layout, draft_depth)
        return AdaptiveBatchingManager(model, config, batching, sizes, defaults)

    @contextmanager
    def continuous_batching_context_manager(
        self,
        generation_config: GenerationConfig | None = None,
        block: bool = True,
        timeout: float | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        persistent_manager: bool = False,
        warmup: bool = True,
        workload_hints: Any = None,
        **sizes: Any,
    ) -> Iterator[AdaptiveBatchingManager]:
        """A manager of requests that runs in the context. After an error in the context, it does not wait for requests.

        Raises: `ValueError` for a way of generating or sizes that are not supported.
        """
        manager = self.init_continuous_batching(generation_config, continuous_batching_config, workload_hints, **sizes)
        manager.warmup()  # makes the engine here, where its errors are seen
        manager.start()
        done = False
        try:
            yield manager
            done = True
        finally:
            kept = persistent_manager and done
            manager.stop(block, timeout, keep_for_next_session=kept, hard_stop=not done)
            if not kept:
                manager.destroy()

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        *,
        rows: int | None = None,
        width: int | None = None,
        capacity: int | None = None,
        layout: LayoutName = "filled",
        draft_depth: int | None = None,
        memory: int | str | None = None,
        **options: Any,
    ) -> dict[str, AdaptiveGenerationOutput]:
        """Answer prompts, each as `generate` would alone; results by the id of the request, in the order of prompts.

        Arguments:
            inputs: the ids of each prompt, without padding.
            warmup: has no effect, because no graphs are captured.
            options: those of a `GenerationConfig`, as in `generate`, and those of `add_request`; for all prompts.

        Raises: `ValueError` for inputs that are no list of prompts, and for options that are unknown or not supported.
            A request that fails has an `error`.
        """
        _check_prompts(inputs)
        if not inputs:
            return {}
        model: Any = self
        inputs = [*map(ids_of, inputs)]
        config, own, draft_depth = _prepared(model, generation_config, options, draft_depth)
        configured(GenerationConfig(), own)
        total, longest = len(inputs) * (config.num_return_sequences or 1), max(map(len, inputs))
        new = most_new_tokens(config, longest)
        if new is None and capacity is None:
            raise ValueError(
                "generate_batch expected max_new_tokens, or a capacity, got neither, so a row could grow without end. "
                "Pass max_new_tokens=256, say."
            )
        hints = WorkloadHints(longest, max(new or 0, 0), total)
        with self.continuous_batching_context_manager(
            config,
            continuous_batching_config=continuous_batching_config,
            persistent_manager=persistent_manager,
            workload_hints=hints,
            rows=rows,
            width=width,
            capacity=capacity,
            layout=layout,
            draft_depth=draft_depth,
            memory=memory,
        ) as manager:
            ids = manager.add_requests(inputs, record_timestamps=record_timestamps, **own)
            results = _collected(manager, total, progress_bar)
        each = config.num_return_sequences or 1
        return {name: results[name] for one in ids for name in answers(one, each) if name in results}


def _prepared(
    model: Any, config: GenerationConfig | None, options: dict[str, Any], draft_depth: int | None
) -> tuple[GenerationConfig, dict[str, Any], int | None]:
    """A complete configuration of requests, the options and attributes that are not its own, and the draft depth.

    The draft depth is that of the configuration unless `draft_depth` is given. `max_length` is None unless it
    was chosen: transformers sets it to 20, which `generate` takes as new tokens.
    """
    lengths = [options.get("max_length"), model.generation_config.max_length, config and config.max_length]
    config, others = model._prepare_generation_config(config, **options)
    if all(length is None for length in lengths):
        config.max_length = None
    configured_depth = others.pop("draft_depth", None)
    draft_depth = configured_depth if draft_depth is None else draft_depth
    if "revise_drafts" not in options:  # it is in a configuration, for `generate` alone
        others.pop("revise_drafts", None)
    return config, {name: vars(config).pop(name) for name in OWN if name in vars(config)} | others, draft_depth


def _check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and (integer(size) or 0) < 1:
            raise ValueError(f"{name} expected 1 or more, or None for the default, got {named(size)}.")


def _check_prompts(inputs: Any) -> None:
    if not isinstance(inputs, list | tuple):
        got = named(inputs)
    elif single := [one for one in inputs if not hasattr(one, "__len__") or getattr(one, "ndim", 1) == 0]:
        got = f"{named(single[0])} as a prompt"
    else:
        return
    raise ValueError(
        f"generate_batch expected a list of prompts, each a list of token ids without padding, got {got}. For a single "
        "prompt, pass [ids]."
    )


def _collected(manager: AdaptiveBatchingManager, total: int, progress_bar: bool) -> dict[str, AdaptiveGenerationOutput]:
    """The results of so many requests, as they come."""
    results: dict[str, AdaptiveGenerationOutput] = {}
    with tqdm(total=total, disable=not progress_bar, unit="request") as bar:
        while len(results) < total:
            running = manager.is_running()  # asked first: whatever was delivered before its end is then seen
            result = manager.get_result(timeout=0.1)
            if result is not None and result.is_finished():
                results[result.request_id] = result
                bar.update()
            elif result is None and not running:
                raise RuntimeError("The thread that serves requests ended early.") from (
                    manager.background_thread_status.fatal_error
                )
    return results
