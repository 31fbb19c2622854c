"""What transformers' server does otherwise for an adapted model.

Each request is served with its own depths and sampling options; what cannot be served is refused with status 400; an
answer says its depths; `/metrics` says what was done. transformers has no hooks for this: `install` puts subclasses in
place of the classes that it builds its server of. tests/test_hf_serve.py lists the private names that this stands on.
"""

import json
import uuid
from functools import lru_cache
from typing import Any, final

from fastapi import HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse
from transformers.cli.serving import chat_completion, completion, response, server, utils

from ..rules import Threshold
from .clients import Departures
from .counts import metrics
from .http_requests import CURRENT, LOG, Batches, HttpRequest

# Fields of a body that are adadepth's own, and of what type.
FIELDS: dict[str, type] = {"min_depth": int, "max_depth": int, "threshold": float, "seed": int}
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# Given to the manager by themselves, or about a cache that is not ours.
_APART = ("max_new_tokens", "eos_token_id", "use_cache", "cache_implementation")
_BUILD = server.build_server  # before `install`


@lru_cache(64)
def _threshold(tau: float) -> Threshold:
    """One rule for all requests of a threshold: they then run in one pass."""
    return Threshold(tau)


class Handles:
    """In front of a handler of transformers' server: takes the fields that are adadepth's, and says depths."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Serve a request, under an id of ours: two clients may choose the same."""
        request = HttpRequest()
        CURRENT.set(request)
        answer = await super().handle_request(body, f"{request_id}-{uuid.uuid4().hex[:8]}")  # type: ignore[misc]
        if not isinstance(answer, JSONResponse):
            return answer
        content = json.loads(bytes(answer.body))
        content["usage"]["depth"] = request.depth
        return JSONResponse(content)

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(_without(body))  # type: ignore[misc]
        for name, kind in FIELDS.items():
            value = body.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, kind))):
                raise ValueError(f"A request expected {name} to be of type {kind.__name__}, got {value!r}.")

    def _build_generation_config(self, body: dict[str, Any], usual: Any, use_cb: bool = False) -> Any:
        config = super()._build_generation_config(_without(body), usual, use_cb=use_cb)  # type: ignore[misc]
        if body.get("temperature") or (body.get("temperature") is None and body.get("top_p") is not None):
            config.do_sample = True  # as any client expects that asks for a temperature
        if config.do_sample is False:  # transformers warns of sampling options in greedy search
            config.temperature = config.top_p = config.top_k = None
        if config.sequence_bias:  # of a body's logit_bias, in which whole numbers are usual
            config.sequence_bias = {ids: float(bias) for ids, bias in config.sequence_bias.items()}
        if config.max_new_tokens is not None and config.max_new_tokens < 1:
            raise ValueError(f"A request expected 1 or more new tokens, got {config.max_new_tokens}.")
        before = vars(usual)
        changed = {name: value for name, value in vars(config).items() if value != before.get(name)}
        own = {name: body[name] for name in FIELDS if body.get(name) is not None}
        if "threshold" in own:
            own["rule"] = _threshold(float(own.pop("threshold")))
        request = CURRENT.get()
        request.options = {
            name: value for name, value in (changed | own).items() if name not in _APART and not name.startswith("_")
        }
        whole = body.get("generation_config") is not None  # one without defaults
        request.limited = any(body.get(name) is not None for name in _LIMITS) or (
            whole and (config.max_new_tokens or config.max_length) is not None
        )
        return config

    def _build_chunk_sse(self, *args: Any, usage: Any = None, **options: Any) -> Any:
        if usage is not None:
            usage.depth = CURRENT.get().depth
        return super()._build_chunk_sse(*args, usage=usage, **options)  # type: ignore[misc]


@final
class Completions(Handles, completion.CompletionHandler):
    """`/v1/completions`."""


@final
class Chats(Handles, chat_completion.ChatCompletionHandler):
    """`/v1/chat/completions`."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
            raise ValueError(f"A chat expected messages, a list of objects with a role each, got {messages!r}.")


@final
class Responses(Handles, response.ResponseHandler):
    """`/v1/responses`."""


def _without(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in FIELDS}


def build_server(model_manager: Any, *handlers: Any, generation_state: Any, **options: Any) -> Any:
    """transformers' server for a model that is ready, with errors as OpenAI's clients read them, and `/metrics`."""
    if model_manager.force_model is None:
        raise ValueError("The server expected a saved adapted model, got none. Pass its folder first.")
    app = _BUILD(model_manager, *handlers, generation_state=generation_state, **options)
    app.exception_handler(ValueError)(lambda _, error: _refused(400, "invalid_request_error", error))
    app.exception_handler(HTTPException)(lambda _, error: _refused(error.status_code, "invalid_request_error", error))
    app.exception_handler(RuntimeError)(lambda _, error: _refused(500, "server_error", error))
    app.add_middleware(Departures)
    model_id = model_manager.process_model_name(model_manager.force_model)
    model, _ = model_manager.load_model_and_processor(model_id)
    batches = generation_state.get_manager(model_id, use_cb=True)
    batches.init_cb(model, None)

    @app.get("/metrics")
    def said() -> PlainTextResponse:
        engine = batches._cb.batch_processor.engine
        return PlainTextResponse(metrics(engine.counts, engine.in_progress, engine.waiting, engine.drafts))

    return app


def _refused(status: int, kind: str, error: Exception) -> JSONResponse:
    if status >= 500:
        LOG.error("%s", error)
    message = str(getattr(error, "detail", error))
    return JSONResponse({"error": {"message": message, "type": kind}}, status)


REPLACED = (
    (completion, "CompletionHandler", Completions),
    (chat_completion, "ChatCompletionHandler", Chats),
    (response, "ResponseHandler", Responses),
    (utils, "CBGenerateManager", Batches),
    (server, "build_server", build_server),
)


def install() -> None:
    """From now on, transformers builds its server of these."""
    for module, name, ours in REPLACED:
        setattr(module, name, ours)
