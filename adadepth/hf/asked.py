"""Requests over HTTP on their way into a manager: each with its own options, and what becomes of it."""

import asyncio
import json
import logging
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, final

from transformers.cli.serving import utils

from .manager import AdaptiveBatchingManager

LOG = logging.getLogger("adadepth.serve")


@final
@dataclass
class Asked:
    """A request over HTTP: what it asks for, and what became of it so far.

    Attributes:
        options: of `add_request`.
        limited: whether it says how many new tokens it wants at most.
        depth: as of `AdaptiveGenerationOutput`.
    """

    options: dict[str, Any] = field(default_factory=dict)
    limited: bool = False
    depth: list[int] = field(default_factory=list)
    began: float = field(default_factory=perf_counter)


ASKED: ContextVar[Asked] = ContextVar("asked")  # of the task that serves it
_BATCHES = utils.CBGenerateManager  # before the server puts ours in its place


@final
class Batches(utils.CBGenerateManager):
    """Adds each request with its own options, once it is known that they can be served."""

    _cb: Any

    def init_cb(self, model: Any, gen_config: Any) -> None:
        """Begin a manager for a model, with the model's own configuration: that of a request is for it alone."""
        if self._cb is None:
            self._cb = model.init_continuous_batching(model.generation_config, self._cb_config)
            self._cb.warmup()
            self._cb.start()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **options: Any
    ) -> Any:
        """Begin a request; a queue of texts, and what fills it."""
        return self._alone(inputs, gen_config).generate_streaming(
            model, processor, inputs, gen_config, request_id, **options
        )

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        """Text, length of the prompt, and new ids; a client that goes away ends its request."""
        one = self._alone(inputs, gen_config)
        try:
            return await one.generate_non_streaming(model, processor, inputs, gen_config, request_id)
        except asyncio.CancelledError:
            one._cb.cancel_request(request_id)
            raise

    def _alone(self, inputs: Any, config: Any) -> utils.CBGenerateManager:
        """transformers' class once more, about a single request.

        Raises: `ValueError` for a request that cannot be served.
        """
        one, asked = _BATCHES(self._cb_config), ASKED.get()
        ids, manager = inputs["input_ids"], self._cb
        if not asked.limited:  # then what its row has room for
            config.max_new_tokens = max(1, min(config.max_new_tokens, manager.capacity + 1 - len(ids)))
        manager.check(ids, config.max_new_tokens, dict(asked.options))
        one._cb = OneRequest(manager, asked)
        return one


@final
class OneRequest:
    """A manager as one request sees it, which is added with its own options, and is told what became of it."""

    def __init__(self, manager: AdaptiveBatchingManager, asked: Asked) -> None:
        self.manager, self.asked = manager, asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self.manager, name)

    def add_request(self, ids: list[int], **given: Any) -> str | None:
        """Add it."""
        return self.manager.add_request(ids, **given, **self.asked.options)

    def register_result_handler(self, request_id: str, callback: Any) -> None:
        """Have `callback` told of it."""

        def told(output: Any) -> None:
            self.asked.depth = output.depth
            if output.is_finished():
                _log(output, self.asked, self.manager)
            if output.error is not None:
                output.error = json.dumps(output.error)[1:-1]  # it is put between quotes
            callback(output)

        self.manager.register_result_handler(request_id, told)


def _log(output: Any, asked: Asked, manager: Any) -> None:
    """A line about a request that has ended."""
    new, depth, engine = len(output.generated_tokens), output.depth, manager.batch_processor.engine
    LOG.info(
        "request %s: %s, prompt %d, new %d, mean depth %.2f, %.1f tokens/s; in progress %d, waiting %d",
        output.request_id,
        output.error or "done",
        len(output.prompt_ids),
        new,
        sum(depth) / max(len(depth), 1),
        new / (perf_counter() - asked.began),
        engine.in_progress,
        engine.waiting,
    )
