"""The server for saved adapted models, asked by OpenAI's own client."""

import asyncio
import inspect
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import adadepth as ad

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import openai
import transformers
from hf_words import tokenizer
from hf_zoo import EOS, STEPS, spread
from transformers import GenerationConfig
from transformers.cli import serve
from transformers.cli.serving import chat_completion, completion, response, utils
from transformers.generation.continuous_batching import ContinuousBatchingManager

from adadepth.hf import AdaptiveCache, AdaptiveForCausalLM
from adadepth.hf.cache import CACHE
from adadepth.hf.clients import Departures
from adadepth.hf.counts import Counts, metrics
from adadepth.hf.http_fields import CHAT, COMPLETION, RESPONSE, WrongField, check, check_messages
from adadepth.hf.http_requests import CURRENT as OPTIONS
from adadepth.hf.http_requests import Batches, HttpRequest
from adadepth.hf.memory import bytes_of, cost_of
from adadepth.hf.serve import main, prepared
from adadepth.hf.server import REPLACED, Completions, Handles
from examples.ask import ask

NEW, CAPACITY = 8, 2000
GREEDY: dict[str, Any] = {"max_tokens": NEW, "temperature": 0}
# What single requests ask for, as their body says it, and as `generate` is told.
ASKED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"max_depth": 1}, {"max_depth": 1}),
    ({"min_depth": STEPS, "max_tokens": 5}, {"min_depth": STEPS, "max_new_tokens": 5}),
    ({"threshold": 0.7}, {"rule": ad.Threshold(0.7)}),
    ({"temperature": 1.5, "seed": 4}, {"do_sample": True, "temperature": 1.5, "seed": 4}),
    ({"temperature": 0.5, "top_p": 0.9, "seed": 5}, {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "seed": 5}),
]
WORDS = ["abc", "hello there", "a", "who are you ?", "zzz"]
MANY = [(WORDS[i % 5], *ASKED[i % len(ASKED)], i % 2 == 1, i % 3 == 2) for i in range(34)]

# Many a template allows a role only in its place.
REFUSES = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('A chat begins with its user.') }}{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("saved")
    model = spread("llama", slice(1, 3))
    model.loop.rule = ad.Threshold(0.5)  # one that can be saved
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(path)
    words = tokenizer()
    words.chat_template = f"{REFUSES}{words.chat_template}"
    words.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    return AdaptiveForCausalLM.from_pretrained(folder, dtype="auto").eval()


class Server:
    """A process that serves, and clients of it."""

    def __init__(self, folder: str) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url = folder, f"http://localhost:{self.port}"
        self.log = Path(folder) / "log.txt"
        self.begin()

    def begin(self) -> None:
        sizes = ["--rows", "4", "--width", "3", "--capacity", str(CAPACITY)]
        command = [sys.executable, "-m", "adadepth.hf.serve", self.folder, *sizes, "--port", str(self.port)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu", "--log-level", "error"], stdout=log, stderr=log
            )

    def wait(self) -> None:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)

    def client(self) -> Any:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0, timeout=60)

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}

    def memory(self) -> int:
        """Kilobytes that are resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(the_number(r"VmRSS:\s+(\d+) kB", status))


def the_number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, text
    return found[1]


@pytest.fixture(scope="module")
def server(folder: str) -> Iterator[Server]:
    one = Server(folder)
    one.wait()
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait(30)


async def asked(client: Any, prompt: str, chat: bool = False, stream: bool = False, **options: Any) -> Any:
    """Text, depths and why it ended."""
    extra = ("min_depth", "max_depth", "threshold", "generation_config")
    known = {name: options.pop(name) for name in [*options] if name not in extra}
    given = {**GREEDY, **known, "extra_body": options, "stream": stream}
    given |= {"model": client.folder, "extra_headers": {"X-Request-ID": "all the same"}}
    if chat:
        answer = await client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **given)
    else:
        answer = await client.completions.create(prompt=prompt, **given)
    if not stream:
        (choice,) = answer.choices
        return (choice.message.content if chat else choice.text), answer.usage.depth, choice.finish_reason
    parts = [part async for part in answer]
    texts = [(part.choices[0].delta.content if chat else part.choices[0].text) or "" for part in parts]
    return "".join(texts), parts[-1].usage.depth, parts[-1].choices[0].finish_reason


def wanted(model: Any, prompt: str, chat: bool = False, **options: Any) -> Any:
    words, cache = tokenizer(), AdaptiveCache()
    text = f"u:{prompt}|a:" if chat else prompt
    given = words(text, return_tensors="pt", return_token_type_ids=False)
    if "seed" in options:
        torch.manual_seed(options.pop("seed"))
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    out = model.generate(**given, **{CACHE: cache}, **options)[0]
    new = out[given.input_ids.shape[1] :]
    why = "stop" if new[-1] == EOS else "length"
    return words.decode(new, skip_special_tokens=True), cache.depth[0, : len(out) - 1].tolist(), why


def of(server: Server) -> Any:
    client = server.client()
    client.folder = server.folder
    return client


async def until(server: Server, **values: int) -> dict[str, float]:
    """The metrics, once these are what they should be."""
    for _ in range(300):
        said = await asyncio.to_thread(server.metrics)
        if all(said[f"adadepth_{name}"] == value for name, value in values.items()):
            return said
        await asyncio.sleep(0.05)
    raise AssertionError(said)


IDLE = {"requests_in_progress": 0, "requests_waiting": 0}
INVALID: list[tuple[dict[str, Any], str]] = [
    (
        {"prompt": "a" * CAPACITY},
        "The request needs room for 2007 tokens, of its prompt and of all new ones but the last, got a capacity of "
        "2000. Pass a larger capacity=, within the positions of the model, or ask for fewer new tokens.",
    ),
    ({"prompt": "abc", "max_depth": 9, "stream": True}, "max_depth expected an int from 1 to steps=3, got 9."),
    ({"prompt": "abc", "max_depth": "two"}, 'A request expected max_depth to be an integer, got "two".'),
    ({"prompt": "abc", "max_tokens": 0}, "A request expected max_tokens to be an integer of 1 or more, got 0."),
    (
        {"prompt": "abc", "stop": ["a"]},
        'A request expected stop to be "" or [], since the server supports nothing else, got ["a"].',
    ),
    ({"prompt": ""}, "A request expected the ids of a prompt, each from 0 to 36, got none."),
]
NAN: list[dict[str, Any]] = [{"prompt": "abc", "temperature": 1e-40, "stream": stream} for stream in (False, True)]
NAN_MESSAGE = (
    "The request's options turn the logits of its next token into NaN. Look for a temperature too close to 0, or for "
    "options that forbid every token."
)


async def refused(client: Any, **options: Any) -> tuple[int | None, str]:
    with pytest.raises(openai.APIError) as caught:
        await asked(client, **options)
    body: Any = caught.value.body
    return getattr(caught.value, "status_code", None), body if isinstance(body, str) else body["message"]


def together(*groups: list[Any]) -> Any:
    return asyncio.gather(*(asyncio.gather(*group) for group in groups))


def test_each_of_many_clients_gets_what_generate_gives(server: Server, model: Any) -> None:
    async def at_once(client: Any) -> Any:
        endless: dict[str, Any] = {"chat": True, "max_tokens": CAPACITY - 9, "logit_bias": {str(EOS): -100}}
        gone = [asyncio.ensure_future(asked(client, "b", stream=stream, **endless)) for stream in (False, True)]
        await until(server, requests_in_progress=2)
        good = [asked(client, word, chat, stream, **body) for word, body, _, chat, stream in MANY]
        bad, nan = [refused(client, **body) for body, _ in INVALID], [refused(client, **body) for body in NAN]
        answers = asyncio.ensure_future(together(good, bad, nan))
        await asyncio.sleep(0.1)
        for one in gone:
            one.cancel()
        return await answers

    async def run() -> Any:
        async with of(server) as client:
            return await at_once(client), await until(server, **IDLE)

    (good, bad, nan), said = asyncio.run(run())
    assert [*good] == [wanted(model, word, chat, **options) for word, _, options, chat, _ in MANY]
    assert len({tuple(depth) for _, depth, _ in good}) > 15
    assert bad == [(400, message) for _, message in INVALID]
    assert nan[0][0] == 500 and nan[0][1].endswith(f": {NAN_MESSAGE}") and nan[1] == (None, NAN_MESSAGE)
    assert (
        said["adadepth_failed_total"] == 2 and said["adadepth_tokens_total"] < 2 * CAPACITY * 0.9
    )  # two were cancelled
    assert said["adadepth_calls_total"] > 50 and 1 < said["adadepth_mean_depth"] < STEPS
    assert said["adadepth_iterations_total"] >= said["adadepth_depth_total"]
    assert re.search(
        r"done, prompt \d+, new 8, mean depth \d\.\d\d, .* tokens/s; in progress \d", server.log.read_text()
    )


def test_other_ways_of_asking(server: Server, model: Any) -> None:
    async def run() -> Any:
        async with of(server) as client:
            free = await client.completions.create(model=server.folder, prompt="a" * (CAPACITY - 4), temperature=0)
            said = await client.responses.create(
                model=server.folder,
                input="abc",
                temperature=0,
                max_output_tokens=NEW,
                extra_body={"max_depth": 1},
            )
            with pytest.raises(openai.BadRequestError, match="expected messages to be a list of objects, got null"):
                await client.post("/chat/completions", body={"model": server.folder}, cast_to=object)
            with pytest.raises(openai.UnprocessableEntityError, match="max_dpeth"):
                await client.completions.create(model=server.folder, prompt="a", extra_body={"max_dpeth": 1})
            return free, said, await asyncio.to_thread(ask, server.folder, "abc", f"{server.url}/v1")

    free, said, example = asyncio.run(run())
    assert len(free.usage.depth) == free.usage.total_tokens - 1 <= CAPACITY
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "seed": 1, "max_depth": 2}
    assert example == wanted(model, "abc", **sampled)[:2]
    assert (said.output_text, said.usage.depth) == wanted(model, "abc", True, max_depth=1)[:2]


CONFIG = "a string with the JSON of an object, without a rule (send threshold instead)"
BIAS = "an object that maps ids of tokens to numbers"
ELSE, OUT = ", since the server supports nothing else", "left out, since the server does not support it"
OTHER: list[tuple[Any, str, Any, str]] = [
    (COMPLETION, "best_of", 3, f"1{ELSE}"),
    (COMPLETION, "echo", True, f"false{ELSE}"),
    (COMPLETION, "frequency_penalty", -1, "a number above -1"),
    *((COMPLETION, "generation_config", value, CONFIG) for value in ("[1]", "{", {"max_length": 9}, '{"rule": "x"}')),
    *((COMPLETION, "logit_bias", value, BIAS) for value in ({"-1": 1}, {"1": "x"}, {"1": True}, [1])),
    (COMPLETION, "logprobs", 0, f"false{ELSE}"),
    (COMPLETION, "max_depth", True, "an integer"),
    *((COMPLETION, "max_tokens", value, "an integer of 1 or more") for value in ([1], 2.7, 0)),
    (COMPLETION, "min_depth", 1.0, "an integer"),
    *((COMPLETION, "n", value, f"1{ELSE}") for value in (3, True)),
    (COMPLETION, "presence_penalty", 0.5, f"0{ELSE}"),
    (COMPLETION, "prompt", ["a", "b"], "a string"),
    *((COMPLETION, "seed", value, "an integer from -2**63 to 2**64 - 1") for value in (2**70, -(2**63) - 1, 0.5)),
    (COMPLETION, "stream", "yes", "true or false"),
    (COMPLETION, "suffix", 5, "a string"),
    *((COMPLETION, "temperature", value, "a number of 0 or more") for value in (True, float("nan"), -0.5)),
    (COMPLETION, "threshold", "x", "a number"),
    *((COMPLETION, "top_p", value, "a number from 0 to 1") for value in ([1], 2)),
    (CHAT, "chat_template_kwargs", "x", "an object"),
    (CHAT, "function_call", "auto", OUT),
    (CHAT, "logprobs", True, f"false{ELSE}"),
    (CHAT, "max_completion_tokens", "x", "an integer of 1 or more"),
    (CHAT, "messages", [5], "a list of objects"),
    (CHAT, "reasoning_effort", "low", OUT),
    (CHAT, "response_format", {"type": "json_object"}, f'{{"type": "text"}}{ELSE}'),
    (CHAT, "tool_choice", "required", f'"auto"{ELSE}'),
    (CHAT, "tools", [{"type": "web_search"}], "a list of functions"),
    (CHAT, "top_logprobs", 2, f"0{ELSE}"),
    (RESPONSE, "input", [5], "a string or a list of objects"),
    (RESPONSE, "instructions", 5, "a string"),
    (RESPONSE, "max_output_tokens", 0, "an integer of 1 or more"),
    (RESPONSE, "previous_response_id", "x", OUT),
    (RESPONSE, "prompt", {"id": "x"}, OUT),
    (RESPONSE, "text", {"format": {"type": "json_object"}}, f'{{}} or {{"format": {{"type": "text"}}}}{ELSE}'),
    (RESPONSE, "truncation", "auto", f'"disabled"{ELSE}'),
]


@pytest.mark.parametrize(("fields", "name", "value", "what"), OTHER, ids=[f"{one[1]}-{one[2]}" for one in OTHER])
def test_a_field_of_another_value_is_refused(fields: Any, name: str, value: Any, what: str) -> None:
    message = f"A request expected {name} to be {what}, got {json.dumps(value)}."
    with pytest.raises(WrongField, match=f"^{re.escape(message)}$") as caught:
        check({name: value}, fields, name)
    assert caught.value.param == name


def test_a_field_that_changes_nothing_is_taken() -> None:
    plain = {"model": "m", "user": "u", "metadata": {}, "stream_options": {"include_usage": True}, "store": True}
    whole = {"n": 1, "presence_penalty": 0.0, "logprobs": False, "top_logprobs": 0, "stop": [], "logit_bias": {"5": 1}}
    completion = {"prompt": "a", "best_of": 1, "echo": False, "suffix": "b", "max_tokens": 1}
    chat = {"messages": [], "response_format": {"type": "text"}, "tool_choice": "auto", "tools": [{"name": "f"}]}
    said = {"input": [{}], "text": {"format": {"type": "text"}}, "truncation": "disabled", "background": False}
    check({**plain, **whole, **completion}, COMPLETION, "prompt")
    check({**plain, **whole, **chat}, CHAT, "messages")
    check({**plain, **said, "reasoning": {}, "parallel_tool_calls": True}, RESPONSE, "input")
    text = "x" * 300
    with pytest.raises(WrongField, match=f'^A request expected n to be 1, .*, got "{text[:199]}[.][.][.][.]$'):
        check({"n": text}, COMPLETION, "n")
    with pytest.raises(WrongField, match=r"^A request expected prompt to be a string, got null\.$"):
        check({}, COMPLETION, "prompt")


TEXT = 'a string, or a list of parts {"type": "text", "text": a string}'
CALLS = 'a list of {"function": {"name": a string, "arguments": the JSON of an object}}'


@pytest.mark.parametrize(
    ("message", "name", "what"),
    [
        ({"role": "user", "content": 5}, "content", TEXT),
        ({"role": "user", "content": ["abc"]}, "content", TEXT),
        ({"role": "user", "content": [{"text": "abc"}]}, "content", TEXT),
        ({"role": "user", "content": [{"type": "text"}]}, "content", TEXT),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content", TEXT),
        ({"role": None, "content": "abc"}, "role", "a string"),
        ({"content": "abc"}, "role", "a string"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "tool_calls", CALLS),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "tool_calls", CALLS),
        ({"role": "assistant", "tool_calls": [{"function": "f"}]}, "tool_calls", CALLS),
        ({"role": "assistant", "tool_calls": "f"}, "tool_calls", CALLS),
    ],
    ids=str,
)
def test_a_message_that_no_template_could_read_is_refused(message: Any, name: str, what: str) -> None:
    wanted = f"A request expected messages[1].{name} to be {what}, got {json.dumps(message.get(name))}."
    with pytest.raises(WrongField, match=f"^{re.escape(wanted)}$"):
        check_messages([{"role": "user", "content": None}, message])


def test_messages_of_text_and_calls_are_taken() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, {"type": "output_text", "text": "c"}]
    check_messages(
        [
            {"role": "system", "content": parts},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call, {"name": "f", "arguments": {}}],
                "refusal": None,
            },
            {"role": "tool", "tool_call_id": "c", "content": "1"},
        ]
    )


def sent(server: Server, path: str, body: Any, method: str = "POST", content: str = "application/json") -> Any:
    """The status and the answer of a request that no client would send."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}{path}", raw, {"Content-Type": content}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


NO_OBJECT = "A request expected a JSON object as its body, with the header Content-Type: application/json, got "
NO_PATH = (
    "The server expected POST /v1/completions, /v1/chat/completions or /v1/responses, or GET /v1/models, /metrics or "
    "/health, got "
)
UNREADABLE = "A request expected a body as OpenAI's clients send it, got one that raises "
BODIES: list[tuple[str, Any, str, str | None]] = [
    ("completions", b"{oops", f"{NO_OBJECT}invalid JSON: Expecting property name enclosed in double quotes.", None),
    ("completions", b"", f"{NO_OBJECT}none.", None),
    ("chat/completions", b"null", f"{NO_OBJECT}null.", None),
    ("responses", b"[1, 2]", f"{NO_OBJECT}[1, 2].", None),
    ("completions", {}, "A request expected prompt to be a string, got null.", "prompt"),
    (
        "completions",
        {"prompt": "a", "n": 3},
        "A request expected n to be 1, since the server supports nothing else, got 3.",
        "n",
    ),
    ("responses", {}, "A request expected input to be a string or a list of objects, got null.", "input"),
    (
        "responses",
        {"input": [{"type": "input_image", "image_url": "x"}]},
        f'A request expected messages[0].content to be {TEXT}, got [{{"type": "input_image", "image_url": "x"}}].',
        "messages[0].content",
    ),
    (
        "chat/completions",
        {"messages": [{"role": None}]},
        "A request expected messages[0].role to be a string, got null.",
        "messages[0].role",
    ),
    *(
        (
            path,
            given | {"logit_bias": {"999": 100}},
            'A request expected logit_bias to be of ids from 0 to 36, got "999".',
            "logit_bias",
        )
        for path, given in (
            ("completions", {"prompt": "a"}),
            ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        )
    ),
    (
        "completions",
        {"prompt": "a", "generation_config": '{"max_new_tokens": "x"}'},
        f"{UNREADABLE}TypeError: '<=' not supported between instances of 'str' and 'int'",
        None,
    ),
    (
        "completions",
        {"prompt": "a", "generation_config": '{"max_new_tokens": 0}'},
        "`max_new_tokens` must be greater than 0, but is 0.",
        None,
    ),
    ("responses", {"input": [{"role": "user"}, {"type": "function_call"}]}, f"{UNREADABLE}KeyError: 'call_id'", None),
    (
        "chat/completions",
        {"messages": [{"role": "tool"}]},
        f"{UNREADABLE}TemplateError: A chat begins with its user.",
        None,
    ),
]


def test_whatever_is_refused_is_refused_as_clients_read_it(server: Server) -> None:
    def error(message: str, param: str | None = None) -> Any:
        return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}

    for path, body, message, param in BODIES:
        assert sent(server, f"/v1/{path}", body) == (400, error(message, param))
    plain = sent(server, "/v1/completions", b"abc", content="text/plain")
    assert plain == (400, error(f"""{NO_OBJECT}"b'abc'"."""))
    assert sent(server, "/v1/nothing", {}) == (404, error(f"{NO_PATH}POST /v1/nothing: Not Found."))
    assert sent(server, "/v1/responses", {}, "PUT") == (405, error(f"{NO_PATH}PUT /v1/responses: Method Not Allowed."))
    assert sent(server, "/load_model", {}) == (422, error("Missing `model` field in the request body."))


def test_null_is_as_if_the_field_were_not_there(server: Server) -> None:
    asked = {"input": "a", "max_output_tokens": 2, "temperature": 0}
    others = dict.fromkeys(("stream", "parallel_tool_calls", "seed", "max_depth"))
    texts = [sent(server, "/v1/responses", body)[1]["output"][0]["content"] for body in (asked, asked | others)]
    assert texts[0] == texts[1]
    status, _ = sent(
        server, "/v1/chat/completions", {"messages": [{"role": "user"}], "max_tokens": 1, "chat_template_kwargs": None}
    )
    assert status == 200


def test_the_end_token_ends_an_answer_even_if_it_is_the_last_one_allowed(server: Server) -> None:
    letter = tokenizer().convert_tokens_to_ids("q")
    whole = {"do_sample": False, "sequence_bias": [[[letter], 1000.0]]}
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"logit_bias": {str(EOS): 1000}, "max_tokens": 1}, "", "stop"),
        ({"logit_bias": {str(EOS): 1000}}, "", "stop"),
        ({"logit_bias": {str(letter): 1000}, "max_tokens": 2}, "qq", "length"),
        ({"generation_config": json.dumps(whole | {"eos_token_id": [letter]}), "max_tokens": 1}, "q", "stop"),
        ({"generation_config": json.dumps(whole | {"eos_token_id": -1}), "max_tokens": 1}, "q", "length"),
    ]

    async def run() -> Any:
        async with of(server) as client:
            for body, text, why in cases:
                for chat in (False, True):
                    for stream in (False, True):
                        answer, _, reason = await asked(client, "abc", chat, stream, **body)
                        assert (answer, reason) == (text, why), (body, chat, stream)

    asyncio.run(run())


@pytest.mark.parametrize("added", [False, True])
def test_only_what_is_raised_while_a_body_is_read_is_the_fault_of_the_body(added: bool) -> None:
    class Raises:
        async def handle_request(self, _body: Any, _request_id: str) -> None:
            OPTIONS.get().added = added
            raise TypeError("told")

    class Handler(Handles, Raises):
        pass

    with pytest.raises(TypeError if added else ValueError, match="told"):
        asyncio.run(Handler().handle_request({}, "id"))


def test_a_greedy_request_sets_no_sampling_options() -> None:
    """transformers warns of them."""
    handler: Any = object.__new__(Completions)
    handler.generation_state = SimpleNamespace(_compile=False)
    OPTIONS.set(HttpRequest())
    usual = GenerationConfig(do_sample=True, temperature=0.7, top_k=20, max_new_tokens=4)
    config = handler._build_generation_config({"temperature": 0, "top_p": 0.9, "max_tokens": 4}, usual)
    config.validate(strict=True)
    assert config.do_sample is False
    options = OPTIONS.get().options
    assert options == {"do_sample": False, "temperature": None, "top_k": None}


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ({}, (True, 0.7, 20, 1.2)),
        ({"temperature": 1.5}, (True, 1.5, 20, 1.2)),
        ({"top_p": 0.9}, (True, 0.7, 20, 1.2)),
        ({"temperature": 0}, (False, None, None, 1.2)),
        ({"generation_config": '{"do_sample": true, "top_k": 5}'}, (True, None, 5, None)),
    ],
    ids=str,
)
def test_sampling_options_that_a_request_does_not_name_are_the_models(body: dict[str, Any], want: Any) -> None:
    handler: Any = object.__new__(Completions)
    handler.generation_state = SimpleNamespace(_compile=False)
    OPTIONS.set(HttpRequest())
    usual = GenerationConfig(do_sample=True, temperature=0.7, top_k=20, repetition_penalty=1.2)
    config = handler._build_generation_config(body, usual)
    names = ("do_sample", "temperature", "top_k", "repetition_penalty")
    assert tuple(getattr(config, name) for name in names) == want
    for name, value in zip(names, want, strict=True):  # the manager begins with `usual`
        assert OPTIONS.get().options.get(name, getattr(usual, name)) == value


def test_a_whole_configuration_in_a_body_keeps_its_limit(model: Any) -> None:
    """`max_length` counts the prompt; without a limit, the answer takes the room of its row."""
    handler: Any = object.__new__(Completions)
    handler.generation_state = SimpleNamespace(_compile=False)
    given = {"input_ids": [5, 6, 7]}
    with model.continuous_batching_context_manager(GenerationConfig(), capacity=20) as manager:
        batches: Any = Batches(None)
        batches._cb = manager
        for body, new in (
            ({"generation_config": '{"max_length": 9}'}, 6),
            ({"generation_config": '{"max_new_tokens": 7, "max_length": 9}'}, 7),
            ({"generation_config": '{"max_length": 9}', "max_tokens": 2}, 2),
            ({"generation_config": '{"max_depth": 1}'}, 18),
            ({}, 18),
        ):
            OPTIONS.set(HttpRequest())
            config = handler._build_generation_config(body, model.generation_config)
            batches._for_request(given, config)
            assert config.max_new_tokens == new, body
        OPTIONS.set(HttpRequest())
        short = handler._build_generation_config({"generation_config": '{"max_length": 3}'}, model.generation_config)
        with pytest.raises(ValueError, match="room for 1 or more new tokens after its prompt of 3, got 0"):
            batches._for_request(given, short)
        several = handler._build_generation_config(
            {"generation_config": '{"do_sample": true, "num_return_sequences": 2}'}, model.generation_config
        )
        with pytest.raises(ValueError, match=r"^The manager has num_return_sequences=1 .* got 2 for one of them[.]"):
            batches._for_request(given, several)


@pytest.mark.parametrize("number", [60, pytest.param(1000, marks=pytest.mark.every)])
def test_memory_is_flat(server: Server, number: int) -> None:
    async def run(count: int) -> int:
        async with of(server) as client:
            for _ in range(0, count, 20):
                some = [(word, chat, stream, body | {"max_tokens": 2}) for word, body, _, chat, stream in MANY[:20]]
                await together([asked(client, word, chat, stream, **body) for word, chat, stream, body in some])
        await until(server, **IDLE)
        return server.memory()

    before = asyncio.run(run(20))
    after = asyncio.run(run(number))
    print(f"{number} requests: {before} kB, then {after} kB")
    assert after - before < 8_000


@pytest.mark.every
def test_a_killed_server_comes_back(server: Server, model: Any) -> None:
    async def patient(client: Any, word: str, **body: Any) -> Any:
        while True:
            try:
                return await asked(client, word, **body)
            except openai.APIConnectionError:
                await asyncio.sleep(0.2)

    async def run() -> Any:
        async with of(server) as client:
            some = [asyncio.ensure_future(patient(client, word, **body)) for word, body, *_ in MANY[:6]]
            await until(server, requests_in_progress=4)
            server.process.send_signal(signal.SIGKILL)
            server.process.wait(30)
            server.begin()
            return await asyncio.gather(*some)

    assert asyncio.run(run()) == [wanted(model, word, **options) for word, _, options, *_ in MANY[:6]]
    assert server.metrics()["adadepth_failed_total"] == 0


@pytest.mark.parametrize("layout", ["filled", "single", "compact"])
def test_the_bytes_of_a_token_are_those_of_a_run(layout: Any) -> None:
    model = spread("llama", slice(1, 3))
    each, tokens = cost_of(model, layout).each, 5 * 9
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    with model.continuous_batching_context_manager(config, memory=tokens * each, rows=5, layout=layout) as manager:
        assert manager.sizes[:3] == (5, 2, 9)
        for _ in range(7):
            manager.add_request([3] * 6, min_depth=STEPS)
        for _ in range(7):
            assert manager.get_result(timeout=30).error is None
        held = manager.batch_processor.engine.nbytes  # type: ignore[union-attr]
    assert held == tokens * each if layout != "compact" else held <= tokens * each
    assert model.init_continuous_batching(config, memory=f"{tokens * each}B", capacity=9, layout=layout).sizes[:2] == (
        5,
        2,
    )


def test_a_budget_of_bytes() -> None:
    assert [bytes_of(one) for one in (7, "7", "1.5GiB", "2 MB", "3KB")] == [7, 7, 3 * 2**29, 2_000_000, 3000]
    with pytest.raises(
        ValueError, match=r"^memory expected bytes, such as 2000000, '500MB' or '2GiB', got '2 apples'\.$"
    ):
        bytes_of("2 apples")
    model = spread("gpt2", slice(1, 3))
    each = cost_of(model).each
    assert model.init_continuous_batching(memory="1TiB").sizes[:3] == (256, 128, 64)  # the model knows 64 positions
    assert model.init_continuous_batching(memory="1TiB", rows=3).sizes[:3] == (3, 1, 64)
    message = (
        f"memory='1KB' has room for {1000 // each} tokens of {each} bytes, got rows=3 of capacity=9. Pass more memory, "
        "or fewer rows or a smaller capacity."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model.init_continuous_batching(memory="1KB", rows=3, capacity=9)


@pytest.mark.parametrize("layout", ["filled", "compact"])
def test_a_budget_of_pages(layout: Any) -> None:
    """In pages a row takes whole ones: a token of a full page costs the same, and a short row costs a page."""
    model = spread("llama", slice(1, 3))
    each = cost_of(model, layout).each
    for part in (model.prelude, model.loop, model.coda):
        assert part is not None
        part.one_call = True
    assert cost_of(model, layout) == (each, 256)
    row, config = 256 * each, GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)

    def sizes(memory: int, **chosen: int) -> Any:
        return model.init_continuous_batching(config, memory=memory, layout=layout, **chosen).sizes

    assert sizes(5 * row, capacity=9)[0] == sizes(6 * row - 1, capacity=256)[0] == 5
    assert sizes(5 * row, capacity=257)[0] == 2
    assert sizes(6 * row - 1, rows=2)[2] == min(512, model.config.max_position_embeddings)
    with pytest.raises(ValueError, match=r"got rows=2 of capacity=0\. Pass more memory"):
        sizes(2 * row - 1, rows=2)
    with model.continuous_batching_context_manager(config, memory=5 * row, capacity=9, layout=layout) as manager:
        manager.add_request([3] * 6, min_depth=STEPS)
        assert manager.get_result(timeout=30).error is None
        held = manager.batch_processor.engine.nbytes  # type: ignore[union-attr]
    assert held == 5 * row if layout == "filled" else held <= 5 * row


@pytest.mark.parametrize("option", ["--rows", "--width", "--capacity", "--draft-depth"])
@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_sizes_are_1_or_more(option: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prepared([f"{option}={number}"])
    assert f"argument {option}: expected a number, 1 or more, got {number}" in capsys.readouterr().err


def test_the_loader_finds_the_class_and_the_sizes(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "AdaptiveForCausalLM", None, raising=False)
    assert prepared([folder, "--rows", "3", "--port", "1"]) == [folder, "--port", "1", "--continuous-batching"]
    assert prepared(["--continuous-batching"]) == ["--continuous-batching"]

    def sizes(*arguments: str) -> Any:
        prepared([folder, *arguments])
        return transformers.AdaptiveForCausalLM.from_pretrained(folder).init_continuous_batching().sizes

    assert sizes("--rows", "3", "--capacity", "64") == (3, 1, 64, "filled", None)
    assert sizes("--rows", "6", "--width", "4") == (6, 4, 2048, "filled", None)
    rows = 64 * 2**20 // 2048 // cost_of(spread("llama", slice(1, 3))).each
    assert sizes("--memory", "64MiB") == (rows, rows // 2, 2048, "filled", None)


def test_the_text_of_the_metrics() -> None:
    text = metrics(Counts(calls=2, ran=6, tokens=3, exits=4, depth=6, seconds=1.5), 1, 0, None)
    assert text.startswith("# HELP adadepth_tokens_total new tokens chosen\n# TYPE adadepth_tokens_total counter\n")
    for line in ("mean_depth 1.5", "tokens_per_call 3.0", "tokens_per_second 2.0", "requests_in_progress 1"):
        assert f"\nadadepth_{line}\n" in text


MOVED = (
    "transformers has moved what adadepth/hf/server.py and http_requests.py stand on: {}. Read its cli/serve.py and "
    "cli/serving, bring the classes in REPLACED up to date so that both the oldest and the newest version in "
    "pyproject.toml work, and correct this test."
)
PLAIN = utils.CBGenerateManager
NEEDED: list[tuple[Any, str]] = [
    *((serve, f"import {name}\n") for name in ("CompletionHandler", "ChatCompletionHandler", "ResponseHandler")),
    (serve, "import build_server\n"),
    (utils.GenerationState, "CBGenerateManager(cb_config=self._cb_config)"),
    (utils.BaseHandler, "def _validate_request(self, body: dict)"),
    *((module, "self._validate_request(body)\n") for module in (completion, chat_completion, response)),
    *((module, "self._resolve_model(body)\n") for module in (completion, chat_completion, response)),
    *((module, "self.get_processor_inputs_from_messages(") for module in (chat_completion, response)),
    *((module, "hit_max = gen_config.max_new_tokens is not None and ") for module in (completion, chat_completion)),
    *((module, "super()._build_generation_config(") for module in (completion, chat_completion, response)),
    *((module, "gen_manager.init_cb(model, gen_config)") for module in (completion, chat_completion, response)),
    *((module, "def _build_chunk_sse(") for module in (completion, chat_completion)),
    *((module, "usage=usage") for module in (completion, chat_completion)),
    *(
        (PLAIN, text)
        for text in ("cb = self._cb\n", "cb.add_request(", "cb.register_result_handler(", "self._cb_config")
    ),
    *((PLAIN, f"def {name}(") for name in ("init_cb", "generate_streaming", "generate_non_streaming")),
    (ContinuousBatchingManager, "self.output_router.result_handlers[request_id]"),
]


def test_the_private_names_that_the_server_stands_on() -> None:
    lost = [text for at, text in NEEDED if text not in inspect.getsource(at)]
    assert not lost, MOVED.format(f"{lost} are not there")
    assert all(issubclass(ours, getattr(module, name)) for module, name, ours in REPLACED[:4])


def test_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    message = "fastapi is not installed. Install it with: pip install 'adadepth[serving]'"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        main()


@pytest.mark.every
def test_a_client_that_is_gone_ends_what_is_done_for_it() -> None:
    ended: list[str] = []

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        assert [(await receive())["body"] for _ in range(2)] == [b"a", b"b"]
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    messages = [{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.request", "body": b"b"}]

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    asyncio.run(Departures(app)({"type": "http", "method": "POST"}, receive, None))
    assert ended == ["cancelled"]
