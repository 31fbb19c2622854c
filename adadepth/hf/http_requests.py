"""Requests over HTTP, added to a manager: each has its own options, and gets its own depths."""

import asyncio
import json
import logging
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, final

from transformers.cli.serving import utils

from .manager import AdaptiveBatchingManager
from .requests import most_new_tokens

LOG = logging.getLogger("adadepth.serve")
_NEW = 1024  # the most new tokens of a request that has no limit, as in transformers


@final
@dataclass
class HttpRequest:
    """A request over HTTP.

    Attributes:
        options: further arguments of `add_request`.
        limited: whether the request limits its new tokens.
        added: whether it is with the manager. Before, its body is being read.
        depth: so far, as in `AdaptiveGenerationOutput`.
        began: when it came, in seconds of `perf_counter`.
    """

    options: dict[str, Any] = field(default_factory=dict)
    limited: bool = False
    added: bool = False
    depth: list[int] = field(default_factory=list)
    began: float = field(default_factory=perf_counter)


CURRENT: ContextVar[HttpRequest] = ContextVar("request")  # each task serves one request
_BATCHES = utils.CBGenerateManager  # transformers' own; the server replaces the name by `Batches`


@final
class Batches(utils.CBGenerateManager):
    """Checks each request, and adds it to the manager with its own options."""

    _cb: Any

    def init_cb(self, model: Any, gen_config: Any) -> None:
        """Start a manager with the model's own generation configuration; `gen_config` is that of the first request."""
        if self._cb is None:
            self._cb = model.init_continuous_batching(model.generation_config, self._cb_config)
            self._cb.warmup()
            self._cb.start()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **options: Any
    ) -> Any:
        """Start a request. Returns a queue of texts, and the streamer that fills it."""
        return self._for_request(inputs, gen_config).generate_streaming(
            model, processor, inputs, gen_config, request_id, **options
        )

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        """The text, the length of the prompt, and the new ids. If the client goes away, the request is cancelled."""
        one = self._for_request(inputs, gen_config)
        try:
            return await one.generate_non_streaming(model, processor, inputs, gen_config, request_id)
        except asyncio.CancelledError:
            one._cb.cancel_request(request_id)
            raise

    def _for_request(self, inputs: Any, config: Any) -> utils.CBGenerateManager:
        """An instance of transformers' class for a single request.

        Raises: `ValueError` if the request cannot be served.
        """
        one, request = _BATCHES(self._cb_config), CURRENT.get()
        ids, manager = inputs["input_ids"], self._cb
        if request.limited:
            config.max_new_tokens = most_new_tokens(config, len(ids))
        else:  # as many new tokens as its row has room for
            config.max_new_tokens = max(1, min(config.max_new_tokens or _NEW, manager.capacity + 1 - len(ids)))
        manager.check(ids, config.max_new_tokens, dict(request.options))
        one._cb = OneRequest(manager, request, config)
        return one


@final
class OneRequest:
    """The manager for one request: adds it with its own options, and records its depths and why it ended."""

    def __init__(self, manager: AdaptiveBatchingManager, request: HttpRequest, config: Any) -> None:
        self.manager, self.request, self.config = manager, request, config
        ends = manager.generation_config.eos_token_id if config.eos_token_id is None else config.eos_token_id
        self.ends = {*ends} if isinstance(ends, list) else {ends}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.manager, name)

    def add_request(self, ids: list[int], **given: Any) -> str | None:
        """Add the request."""
        added = self.manager.add_request(ids, **given, **self.request.options)
        self.request.added = True
        return added

    def register_result_handler(self, request_id: str, callback: Any) -> None:
        """Call `callback` with each output of the request."""

        def told(output: Any) -> None:
            self.request.depth = output.depth
            if output.is_finished():
                _log(output, self.request, self.manager)
            if self.ends.intersection(output.generated_tokens[-1:]):
                # transformers says "length" of an answer of the greatest length, even if it ends with an end token
                self.config.max_new_tokens = None
            if output.error is not None:
                output.error = json.dumps(output.error)[1:-1]  # it is put between quotes
            callback(output)

        self.manager.register_result_handler(request_id, told)


def _log(output: Any, request: HttpRequest, manager: Any) -> None:
    """Log a line about a request that has ended."""
    new, depth, engine = len(output.generated_tokens), output.depth, manager.batch_processor.engine
    LOG.info(
        "request %s: %s, prompt %d, new %d, mean depth %.2f, %.1f tokens/s; in progress %d, waiting %d",
        output.request_id,
        output.error or "done",
        len(output.prompt_ids),
        new,
        sum(depth) / max(len(depth), 1),
        new / (perf_counter() - request.began),
        engine.in_progress,
        engine.waiting,
    )
