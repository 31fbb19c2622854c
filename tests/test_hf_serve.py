"""The server for saved adapted models, asked by OpenAI's own client."""

import asyncio
import inspect
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import adadepth as ad

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

import transformers
from hf_words import tokenizer
from hf_zoo import EOS, STEPS, spread
from transformers import GenerationConfig
from transformers.cli.serving import completion, utils

from adadepth.hf import AdaptiveCache, AdaptiveForCausalLM
from adadepth.hf.cache import CACHE
from adadepth.hf.clients import Departures
from adadepth.hf.counts import Counts, metrics
from adadepth.hf.memory import bytes_of, bytes_per_token
from adadepth.hf.serve import prepared
from adadepth.hf.server import REPLACED, Asks

NEW, CAPACITY = 8, 100
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("saved")
    model = spread("llama", slice(1, 3))
    model.loop.rule = ad.Threshold(0.5)  # one that can be saved
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
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

    def client(self, retries: int = 0) -> Any:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=retries, timeout=60)

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
    known = {name: options.pop(name) for name in [*options] if name not in ("min_depth", "max_depth", "threshold")}
    given = {"model": None, **GREEDY, **known, "extra_body": options, "stream": stream}
    given["model"] = client.folder
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
    why = "length" if len(new) >= options["max_new_tokens"] else "stop"
    return words.decode(new, skip_special_tokens=True), cache.depth[0, : len(out) - 1].tolist(), why


def of(server: Server, retries: int = 0) -> Any:
    client = server.client(retries)
    client.folder = server.folder
    return client


async def _idle(server: Server) -> dict[str, float]:
    """The metrics once nothing is in progress."""
    for _ in range(300):
        said = await asyncio.to_thread(server.metrics)
        if said["adadepth_requests_in_progress"] == said["adadepth_requests_waiting"] == 0:
            break
        await asyncio.sleep(0.05)
    return said


async def _cancelled(client: Any, stream: bool) -> str:
    """A request that would take long, given up."""
    begun = asyncio.ensure_future(asked(client, "b", stream=stream, max_tokens=CAPACITY - 1, logit_bias=None))
    await asyncio.sleep(0.05)
    begun.cancel()
    await asyncio.wait([begun])
    return "cancelled" if begun.cancelled() else "done"


async def _refused(client: Any, **options: Any) -> tuple[int, str]:
    try:
        await asked(client, **options)
    except openai.APIStatusError as error:
        return error.status_code, error.body["message"] if isinstance(error.body, dict) else str(error.body)
    except openai.APIError as error:  # in a stream
        return 0, str(error)
    return 200, ""


INVALID: list[tuple[dict[str, Any], str]] = [
    (
        {"prompt": "abc" * 40},
        "The request needs room for 127 tokens, of its prompt and of all new ones but the last, got a capacity of 100. "
        "Pass a larger capacity=, as far as the model knows positions, or ask for fewer new tokens.",
    ),
    ({"prompt": "abc", "max_depth": 9, "stream": True}, ""),
    ({"prompt": "abc", "max_depth": "two"}, "A request expected max_depth to be of type int, got 'two'."),
    ({"prompt": "abc", "max_tokens": 0}, "A request expected 1 or more new tokens, got 0."),
    (
        {"prompt": "abc", "stop": ["a"]},
        "Requests are served greedily or by sampling, got stop_strings. Call model.generate for all else.",
    ),
    ({"prompt": ""}, "A request expected the ids of a prompt, each from 0 to 36, got none."),
]
NAN = {"prompt": "abc", "temperature": 1e-40}


def test_concurrent_clients(server: Server, model: Any) -> None:
    async def all_at_once() -> tuple[list[Any], ...]:
        async with of(server) as client:
            good = [asked(client, word, chat, stream, **body) for word, body, _, chat, stream in MANY]
            gone = [_cancelled(client, stream) for stream in (False, True)]
            bad = [_refused(client, **body) for body, _ in INVALID]
            nan = [_refused(client, **NAN, stream=stream) for stream in (False, True)]
            groups = (good, gone, bad, nan)
            return tuple(await asyncio.gather(*(asyncio.gather(*some) for some in groups)))

    for some in asyncio.run(all_at_once()): print(*some, sep="\n")
    print(server.metrics())
    print(server.log.read_text()[-3000:])
