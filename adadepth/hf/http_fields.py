"""The fields that the body of a request over HTTP may have, and the values that the server takes for each.

A field whose value would change the answer is either obeyed or refused. Fields that cannot change it are ignored.
"""

import json
from collections.abc import Callable
from math import inf, nextafter
from typing import Any, NamedTuple, final

_LONGEST = 200  # characters of a value in an error message


class Kind(NamedTuple):
    """What the value of a field is expected to be, in words, and whether a value is that."""

    what: str
    fits: Callable[[Any], bool]


@final
class WrongField(ValueError):
    """The error for a field whose value the server does not take; `param` is its name."""

    def __init__(self, name: str, what: str, given: Any) -> None:
        super().__init__(f"A request expected {name} to be {what}, got {shown(given)}.")
        self.param = name


def shown(given: Any) -> str:
    """The beginning of the JSON of a value."""
    text = json.dumps(given, default=repr)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def check(body: dict[str, Any], fields: dict[str, Kind], needed: str, path: str = "") -> None:
    """Check the fields of an object, one of which is needed; `path` is its place in the body.

    Raises: `WrongField` for the first that is missing, unknown or of a wrong value.
    """
    for name, value in ({needed: None} | body).items():
        kind = fields.get(name, _UNSUPPORTED)
        if not kind.fits(value):
            raise WrongField(path + name, kind.what, value)


def check_messages(messages: list[dict[str, Any]]) -> None:
    """Check the messages of a chat, or those that the input of a response stands for.

    Raises: `WrongField`.
    """
    for i, message in enumerate(messages):
        given = {name: message[name] for name in _MESSAGE if message.get(name) is not None}
        check(given, _MESSAGE, "role", f"messages[{i}].")


def _number(least: float = -inf, most: float = inf, kind: type = float) -> Callable[[Any], bool]:
    """Whether a value is of the kind or an int, and in a range. A bool is neither, and NaN is in no range."""
    return lambda value: type(value) in (int, kind) and least <= value <= most


def _only(*values: Any) -> Kind:
    """The values by which a field has no effect. In Python, but not in JSON, True equals 1."""
    known = " or ".join(map(json.dumps, values))
    return Kind(
        f"{known}, since the server supports nothing else",
        lambda value: any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values),
    )


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _parsed(text: Any) -> Any:
    """The object of which `text` is the JSON; None: it is not that of an object."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _is_configuration(value: Any) -> bool:
    known = _parsed(value)
    return known is not None and "rule" not in known


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(word.isdecimal() and _NUMBER.fits(bias) for word, bias in value.items())


def _is_text(part: dict[str, Any]) -> bool:
    return part.get("type") in ("text", "input_text", "output_text") and isinstance(part.get("text"), str)


def _is_call(call: dict[str, Any]) -> bool:
    function = call.get("function") or call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    return isinstance(function.get("arguments"), dict) or _parsed(function.get("arguments")) is not None


_ANYTHING = Kind("anything", lambda _: True)
_UNSUPPORTED = Kind("left out, since the server does not support it", lambda _: False)
_STRING = Kind("a string", lambda value: isinstance(value, str))
_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_OBJECT = Kind("an object", lambda value: isinstance(value, dict))
_INTEGER = Kind("an integer", _number(kind=int))
_LENGTH = Kind("an integer of 1 or more", _number(1, kind=int))
_NUMBER = Kind("a number", _number())
_LIST = Kind("a list of objects", _objects)

_MESSAGE = {
    "role": _STRING,
    "content": Kind(
        'a string, or a list of parts {"type": "text", "text": a string}',
        lambda value: isinstance(value, str) or (_objects(value) and all(map(_is_text, value))),
    ),
    "tool_calls": Kind(
        'a list of {"function": {"name": a string, "arguments": the JSON of an object}}',
        lambda value: _objects(value) and all(map(_is_call, value)),
    ),
}

# adadepth's own, of every endpoint.
OWN = {
    "min_depth": _INTEGER,
    "max_depth": _INTEGER,
    "threshold": _NUMBER,
    "seed": Kind("an integer from -2**63 to 2**64 - 1", _number(-(2**63), 2**64 - 1, int)),
}
_EVERY = {
    **OWN,
    "model": _STRING,
    "stream": _FLAG,
    "temperature": Kind("a number of 0 or more", _number(0)),
    "top_p": Kind("a number from 0 to 1", _number(0, 1)),
    "generation_config": Kind(
        "a string with the JSON of an object, without a rule (send threshold instead)", _is_configuration
    ),
    "top_logprobs": _only(0),
    # Of the service around a model, which this server is not.
    **dict.fromkeys(("metadata", "service_tier", "store", "stream_options", "user", "safety_identifier"), _ANYTHING),
    **dict.fromkeys(("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"), _ANYTHING),
}
_COMPLETED = {
    **_EVERY,
    "max_tokens": _LENGTH,
    "frequency_penalty": Kind("a number above -1", _number(nextafter(-1, 0))),
    "logit_bias": Kind("an object that maps ids of tokens to numbers", _is_bias),
    "logprobs": _only(False),
    "n": _only(1),
    "presence_penalty": _only(0),
    "stop": _only("", []),
}
_WITH_TOOLS = {
    "tools": Kind(
        "a list of functions",
        lambda value: _objects(value) and all(one.get("type", "function") == "function" for one in value),
    ),
    "tool_choice": _only("auto"),
    "parallel_tool_calls": _only(True),
}

COMPLETION = {**_COMPLETED, "prompt": _STRING, "suffix": _STRING, "best_of": _only(1), "echo": _only(False)}
CHAT = {
    **_COMPLETED,
    **_WITH_TOOLS,
    "messages": _LIST,
    "max_completion_tokens": _LENGTH,
    "chat_template_kwargs": _OBJECT,
    "functions": _only([]),
    "modalities": _only(["text"]),
    "prediction": _ANYTHING,  # it could only save time
    "response_format": _only({"type": "text"}),
    "verbosity": _only("medium"),
}
RESPONSE = {
    **_EVERY,
    **_WITH_TOOLS,
    "input": Kind("a string or a list of objects", lambda value: isinstance(value, str) or _objects(value)),
    "instructions": _STRING,
    "max_output_tokens": _LENGTH,
    "background": _only(False),
    "include": _only([]),
    "reasoning": _only({}),
    "text": _only({}, {"format": {"type": "text"}}),
    "truncation": _only("disabled"),
}
