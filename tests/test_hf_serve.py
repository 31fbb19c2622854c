"""The server for saved adapted models, over HTTP where its dependencies are installed."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import adadepth as ad

pytest.importorskip("transformers")

import transformers
from hf_words import tokenizer
from hf_zoo import EOS, spread

from adadepth.hf import AdaptiveForCausalLM
from adadepth.hf.serve import prepared

PROMPTS = ["abc", "hello there", "a", "who are you ?", "zzz"]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    model = spread("llama", slice(1, 3), torch.float32)
    model.loop.rule = ad.Threshold(0.5)  # one that can be saved
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_loader_finds_the_class_and_the_sizes(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "AdaptiveForCausalLM", None, raising=False)
    assert prepared([folder, "--rows", "3", "--port", "1"]) == [folder, "--port", "1", "--continuous-batching"]
    assert prepared(["--continuous-batching"]) == ["--continuous-batching"]
    prepared([folder, "--rows", "3", "--capacity", "64"])
    model = transformers.AdaptiveForCausalLM.from_pretrained(folder)
    assert model.init_continuous_batching().sizes == (3, 8, 64, "filled")


@pytest.fixture
def url(folder: str) -> Iterator[str]:
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "adadepth.hf.serve", folder, "--rows", "4", "--width", "2", "--capacity", "100"]
    server = subprocess.Popen([*command, "--port", str(port), "--device", "cpu", "--log-level", "error"])
    try:
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait(30)


def asked(url: str, folder: str, prompt: str, **options: Any) -> str:
    body = {"model": folder, "prompt": prompt, "max_tokens": 12, "temperature": 0, **options}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = answer.read().decode()
    return text


def test_concurrent_requests_over_http(url: str, folder: str) -> None:
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            break
        except OSError:
            time.sleep(0.5)
    with ThreadPoolExecutor(10) as pool:
        answers = [*pool.map(lambda prompt: json.loads(asked(url, folder, prompt)), PROMPTS * 3)]
    model, words = AdaptiveForCausalLM.from_pretrained(folder).eval(), tokenizer()
    for prompt, answer in zip(PROMPTS * 3, answers, strict=True):
        given = words(prompt, return_tensors="pt", return_token_type_ids=False)
        new = model.generate(**given, max_new_tokens=12, do_sample=False)[0, given.input_ids.shape[1] :]
        assert answer["choices"][0]["text"] == words.decode(new, skip_special_tokens=True)
    assert asked(url, folder, "abc", stream=True).count("data: ") > 3
    with pytest.raises(urllib.error.HTTPError, match="500"):
        asked(url, folder, "abc" * 40)
    assert asked(url, folder, "abc") is not None
