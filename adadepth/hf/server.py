"""What transformers' server does otherwise for an adapted model.

Each request is served with its own depths and sampling options; what cannot be served is refused with status 400; an
answer says its depths; `/metrics` says what was done. transformers has no hooks for this: `install` puts subclasses in
place of the classes that it builds its server of. tests/test_hf_serve.py lists the private names that this stands on.
"""

import json
import uuid
from functools import lru_cache
from typing import Any, ClassVar, final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers.cli.serving import chat_completion, completion, response, server, utils

from .._given import text_of
from ..rules import Threshold
from .clients import Departures
from .counts import metrics
from .http_fields import CHAT, COMPLETION, OWN, RESPONSE, Kind, WrongField, check, check_messages, shown
from .http_requests import CURRENT, LOG, Batches, HttpRequest

_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# Given to the manager by themselves, or about a cache that is not ours.
_APART = ("max_new_tokens", "eos_token_id", "use_cache", "cache_implementation")
# What a body raises that has something else than expected where `check` does not look.
_UNREADABLE = (TypeError, LookupError, AttributeError, ArithmeticError, TemplateError)
_PATHS = "POST /v1/completions, /v1/chat/completions or /v1/responses, or GET /v1/models, /metrics or /health"
_BUILD = server.build_server  # before `install`


@lru_cache(64)
def _threshold(tau: float) -> Threshold:
    """One rule for all requests of a threshold: they then run in one pass."""
    return Threshold(tau)


class Handles:
    """In front of a handler of transformers' server: checks and takes fields, and says depths."""

    fields: ClassVar[dict[str, Kind]]
    needed: ClassVar[str]  # the field without which there is nothing to do

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Serve a request, under an id of ours: two clients may choose the same.

        Raises: `ValueError` for a body that cannot be read.
        """
        request = HttpRequest()
        CURRENT.set(request)
        # null means a default; that of `stream` differs between transformers and OpenAI
        given = {"stream": False} | {name: value for name, value in body.items() if value is not None}
        try:
            answer = await super().handle_request(given, f"{request_id}-{uuid.uuid4().hex[:8]}")  # type: ignore[misc]
        except _UNREADABLE as error:
            if request.added:
                raise
            LOG.warning("a body could not be read", exc_info=error)
            raise ValueError(
                f"A request expected a body as OpenAI's clients send it, got one that raises {text_of(error)}"
            ) from error
        if not isinstance(answer, JSONResponse):
            return answer
        content = json.loads(bytes(answer.body))
        content["usage"]["depth"] = request.depth
        return JSONResponse(content)

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(_without(body))  # type: ignore[misc]
        check(body, self.fields, self.needed)

    def _resolve_model(self, body: dict[str, Any]) -> Any:
        model_id, model, processor = super()._resolve_model(body)  # type: ignore[misc]
        words = model.get_input_embeddings().weight.shape[0]
        for word in body.get("logit_bias", ()):
            if int(word) >= words:
                raise WrongField("logit_bias", f"of ids from 0 to {words - 1}", word)
        return model_id, model, processor

    def get_processor_inputs_from_messages(self, messages: list[dict[str, Any]], modality: Any) -> Any:
        """The messages as a chat template reads them."""
        check_messages(messages)
        return super().get_processor_inputs_from_messages(messages, modality)  # type: ignore[misc]

    def _build_generation_config(self, body: dict[str, Any], usual: Any, use_cb: bool = False) -> Any:
        config = super()._build_generation_config(_without(body), usual, use_cb=use_cb)  # type: ignore[misc]
        if body.get("temperature") or (body.get("temperature") is None and body.get("top_p") is not None):
            config.do_sample = True  # as any client expects that asks for a temperature
        if config.do_sample is False:  # transformers warns of sampling options in greedy search
            config.temperature = config.top_p = config.top_k = None
        if "logit_bias" in body:  # transformers reads it in chats alone, and takes no whole numbers
            config.sequence_bias = {(int(word),): float(bias) for word, bias in body["logit_bias"].items()} or None
        before = vars(usual)
        changed = {name: value for name, value in vars(config).items() if value != before.get(name)}
        own = {name: body[name] for name in OWN if body.get(name) is not None}
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

    fields, needed = COMPLETION, "prompt"


@final
class Chats(Handles, chat_completion.ChatCompletionHandler):
    """`/v1/chat/completions`."""

    fields, needed = CHAT, "messages"


@final
class Responses(Handles, response.ResponseHandler):
    """`/v1/responses`."""

    fields, needed = RESPONSE, "input"


def _without(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in OWN}


def build_server(model_manager: Any, *handlers: Any, generation_state: Any, **options: Any) -> Any:
    """transformers' server for a model that is ready, with errors as OpenAI's clients read them, and `/metrics`."""
    if model_manager.force_model is None:
        raise ValueError("The server expected a saved adapted model, got none. Pass its folder first.")
    app = _BUILD(model_manager, *handlers, generation_state=generation_state, **options)
    app.exception_handler(ValueError)(lambda _, error: _refused(400, error, getattr(error, "param", None)))
    app.exception_handler(RequestValidationError)(lambda _, error: _refused(400, _of_no_object(error)))
    app.exception_handler(HTTPException)(_refused_by_framework)
    app.exception_handler(RuntimeError)(lambda _, error: _refused(500, error))
    app.exception_handler(utils.CBWorkerDeadError)(lambda _, error: _refused(503, error))
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


def _refused(status: int, message: object, param: str | None = None, headers: Any = None) -> JSONResponse:
    """An error in the form that OpenAI's clients read."""
    if status >= 500:
        LOG.error("%s", message)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": str(message), "type": kind, "param": param, "code": None}
    return JSONResponse({"error": error}, status, headers)


def _of_no_object(error: RequestValidationError) -> str:
    first = error.errors()[0]
    match first["type"]:
        case "json_invalid":
            got = f"invalid JSON: {first['ctx']['error']}"
        case "missing":
            got = "none"
        case _:
            got = shown(first["input"])
    return f"A request expected a JSON object as its body, with the header Content-Type: application/json, got {got}."


def _refused_by_framework(request: Request, error: HTTPException) -> JSONResponse:
    message = error.detail
    if error.status_code in (404, 405):
        message = f"The server expected {_PATHS}, got {request.method} {request.url.path}: {message}."
    return _refused(error.status_code, message, headers=error.headers)


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
