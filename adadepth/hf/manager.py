"""`AdaptiveBatchingManager`: transformers' manager of requests, which runs them with our `Engine`.

transformers' manager has the queues, the thread and streaming, and delivers results. Its own batch processor keeps one
cache entry for each token and layer, and runs whole tokens. `Processor` replaces it. This module uses private names of
transformers; tests/test_hf_serving.py lists them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Queue
from time import perf_counter
from typing import Any, NamedTuple, TypeVar, final

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from .._given import text_of
from ..cache.kv_reuse import LayoutName
from .cache import AdaptiveCache
from .drafts import Drafts
from .engine import Engine, Event, Refused
from .requests import Request, configured, ids_of, most_new_tokens

T = TypeVar("T")


@dataclass
class AdaptiveGenerationOutput(GenerationOutput):
    """The result of a request: the fields of transformers' result, and `depth`.

    `depth` has the iterations of each token of prompt and answer, except for the last token, which was not run.
    """

    depth: list[int] = field(default_factory=list)


class Sizes(NamedTuple):
    """The arguments of an `Engine` other than the model."""

    rows: int
    width: int
    capacity: int
    layout: LayoutName
    draft_depth: int | None = None

    def engine(self, model: Any) -> Engine:
        """An engine of these sizes, with a new cache."""
        drafts = None if self.draft_depth is None else Drafts(self.draft_depth)
        return Engine(model, self.rows, self.width, AdaptiveCache(self.layout, self.capacity), drafts)


@final
class Processor:
    """Has the interface of transformers' batch processor, and runs requests with an `Engine`."""

    use_async_batching = False
    inputs_and_outputs = None

    def __init__(self, manager: "AdaptiveBatchingManager", engine: Engine) -> None:
        self.manager, self.engine = manager, engine
        self.states: dict[Request, Any] = {}
        self.events: list[Event] = []

    def prepare_next_batch(self) -> bool:
        """Take new and cancelled requests from the queues. Returns whether any request is waiting or in progress."""
        status = self.manager.background_thread_status
        status.update_with_tp_status(status.local_status)
        if status.tp_status == status.HARD_STOP:
            return False
        if status.is_pause_requested():
            status.pause_and_wait()
        for state in _drained(self.manager.input_queue):
            *children, _ = answers(state.request_id, state.num_children + 1)
            for number, name in enumerate(children, 1):
                self._add(state.fork(name), number)
            self._add(state, 0)
        for request_id in _drained(self.manager.cancel_queue):
            names = answers(request_id, self.manager.num_return_sequences)
            for request in [one for one, state in self.states.items() if state.request_id in names]:
                self._end(request)
            for name in names:
                self.manager.forget_handler(name)
        return self.has_pending_requests()

    def has_pending_requests(self) -> bool:
        """Whether any request is waiting or in progress."""
        return bool(self.states)

    def _generation_step(self, _model: Any) -> None:
        began = perf_counter()
        with torch.inference_mode(False):
            self.events = self.engine.step()
        self.engine.counts.seconds += perf_counter() - began

    def update_batch(self) -> None:
        """Deliver the results of the last step."""
        outputs = [output for event in self.events if (output := self._take(event)) is not None]
        self.events = []
        self.manager.output_router.deliver_batch(outputs)

    def fail_all_requests(self, error: Exception) -> None:
        """End all requests with an error."""
        failed = [_failed(state, error, request.depth) for request, state in self.states.items()]
        self.manager.output_router.deliver_batch(failed)
        for request in list(self.states):
            self._end(request)

    def _handle_request_error(self, error: Exception, state: Any) -> None:
        self.manager.output_router.deliver(_failed(state, error, []))

    def reset(self) -> None:
        """Does nothing: when a session ends, all its requests have ended."""

    def warmup(self, _model: Any) -> None:
        """Does nothing: no CUDA graphs are captured."""

    def _add(self, state: Any, number: int) -> None:
        """Add a request, or copy `number` of it if it asks for several answers. If it cannot run, it fails."""
        options = dict(state.logit_processor_kwargs)
        if options.get("seed") is not None:
            options["seed"] += number
        try:
            request = self.manager.request(state, options)
            self.engine.add(request)
        except Exception as error:
            self._handle_request_error(error, state)
        else:
            self.states[request] = state

    def _end(self, request: Request) -> None:
        del self.states[request]
        self.engine.end(request)

    def _take(self, event: Event) -> AdaptiveGenerationOutput | None:
        """Update a request with an event. Returns the output to deliver, if any."""
        request, state = event.request, self.states[event.request]
        if isinstance(event, Refused):
            del self.states[request]
            return _failed(state, event.error, request.depth)
        if state.generated_len() == 0:
            state.status = RequestStatus.DECODING
        done: bool = state.update_and_check_completion(event.token, event.logprob)
        if done:
            self._end(request)
        else:
            self.engine.go_on(request)
        return _output(state, request.depth) if done or state.streaming else None


@final
class AdaptiveBatchingManager(ContinuousBatchingManager):
    """transformers' manager of requests, for an adapted model.

    `model.init_continuous_batching` makes it, with an engine of these `sizes`. Results are `AdaptiveGenerationOutput`s.
    `defaults` are the depths, rule and seed of requests that name none.
    """

    batch_processor: Processor | None

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        batching: ContinuousBatchingConfig,
        sizes: Sizes,
        defaults: dict[str, Any],
    ) -> None:
        super().__init__(model, GenerationConfig(), batching)  # each request has its own logits processors
        self.sizes = sizes
        self.configure(generation_config, defaults)

    def configure(self, generation_config: GenerationConfig, defaults: dict[str, Any]) -> None:
        """Set the default options of later requests."""
        self.generation_config, self.defaults = generation_config, defaults
        self.num_return_sequences = generation_config.num_return_sequences or 1

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Does nothing: the attention of an adapted model goes through the loop."""

    def _create_batch_processor(self) -> Processor:
        if self.batch_processor is None:
            with torch.inference_mode(False):
                self.batch_processor = Processor(self, self.sizes.engine(self.model))
        return self.batch_processor

    def add_request(
        self,
        input_ids: list[int] | Tensor,
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        **options: Any,
    ) -> str | None:
        """Add a request; returns its id, or None if the manager is stopping.

        Arguments:
            max_new_tokens: the most new tokens. None: as many as `max_length` allows, if it is among `options`;
                otherwise as in the manager's configuration.
            options: those of a `GenerationConfig`, for this request alone; `min_depth`, `max_depth` and `rule`, as
                `generate` takes them for a batch of one; and `seed`. With `seed`, sampling gives the same text as
                `generate` after `torch.manual_seed(seed)` for this prompt alone, whatever other requests there are.

        Raises: `ValueError` for unknown options. A wrong prompt or a wrong value of an option makes the request fail.
        """
        config, _ = configured(self.generation_config, options)
        ids = ids_of(input_ids)
        if max_new_tokens is None:
            if options.get("max_length") is not None:
                config.max_new_tokens = None  # a default, which the request's own limit replaces
            max_new_tokens = most_new_tokens(config, len(ids))
        added: str | None = super().add_request(
            ids, request_id, max_new_tokens, streaming, record_timestamps, eos_token_id, **self.defaults | options
        )
        return added

    @property
    def capacity(self) -> int:
        """The most tokens of a request, prompt and answer together."""
        return self.sizes.capacity if self.batch_processor is None else self.batch_processor.engine.capacity

    def check(self, ids: list[int], max_new_tokens: int | None, options: dict[str, Any]) -> None:
        """Check whether a request can be answered, without adding it. `warmup` must have run.

        Raises: `ValueError` for options, a prompt or a length that it cannot take.
        """
        assert self.batch_processor is not None, "warmup comes first"
        request = Request.of(self.model, self.generation_config, ids, max_new_tokens, False, self.defaults | options)
        self.batch_processor.engine.check(request)

    def forget_handler(self, request_id: str) -> None:
        """Remove the result handler of a cancelled request. transformers removes it only when a request completes."""
        with self.output_router._lock:
            self.output_router.result_handlers.pop(request_id, None)

    def request(self, state: Any, options: dict[str, Any]) -> Request:
        """The engine's request for transformers' state of a request.

        Raises: `ValueError` as `Request.of` does.
        """
        options["eos_token_id"] = sorted(state._eos_token_ids) or None
        logprobs = self.continuous_batching_config.return_logprobs
        ids, new = state.initial_tokens, state.max_new_tokens
        return Request.of(self.model, self.generation_config, ids, new, logprobs, options)


def answers(request_id: str, number: int) -> list[str]:
    """The ids of all answers to a request, `number` of them, as transformers numbers and orders them."""
    return [*(f"{request_id}__child#{i}" for i in range(number - 1)), request_id]


def _output(state: Any, depth: list[int]) -> AdaptiveGenerationOutput:
    return AdaptiveGenerationOutput(**vars(state.to_generation_output()), depth=[*depth])


def _failed(state: Any, error: Exception, depth: list[int]) -> AdaptiveGenerationOutput:
    own = str(error) if isinstance(error, ValueError) else ""
    state.status, state.error = RequestStatus.FAILED, own or text_of(error)
    return _output(state, depth)


def _drained(queue: "Queue[T]") -> Iterator[T]:
    """All items that are in a queue now."""
    while not queue.empty():
        yield queue.get_nowait()
