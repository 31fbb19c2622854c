"""The small examples run and print what they are to show. The demo has a file of its own."""

import importlib
from pathlib import Path

import pytest
import torch

import adadepth as ad
from examples import adapt_hf, decode_by_hand

EXAMPLES = Path(__file__).parent.parent / "examples"
SWEEP = "examples.adaponderlm.sweep"
SIDE_BY_SIDE = [
    ".".join(path.relative_to(EXAMPLES.parent).with_suffix("").parts)
    for path in sorted(EXAMPLES.rglob("*.py"))
    if '"--processes", type=int' in path.read_text("utf-8")
]

BY_HAND = """\
the:1 cat:1 saw:2 a:1 that:4 bird:4 cat:1 saw:3 cat:1 the:1
a:4 dog:4 cat:1 saw:3 cat:1 saw:2 cat:1 saw:2
cache: 18 tokens, 37 entries, 10352 bytes
one pass without a cache: the same
"""


def test_a_decode_loop_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    decode_by_hand.main()
    assert capsys.readouterr().out == BY_HAND


def test_the_decode_loop_refuses_padding_on_the_right() -> None:
    embed, head = torch.nn.Embedding(4, 8), torch.nn.Linear(8, 4)
    looped = ad.RecurrentWrapper(decode_by_hand.Block(8, 2), 2)
    with pytest.raises(ValueError, match="padding") as error:
        decode_by_hand.generate(embed, looped, head, torch.ones(1, 2).long(), torch.tensor([[True, False]]), 1)
    assert str(error.value) == "generate expected padding on the left, got a row that ends in padding. Pad on the left."


def test_an_adapted_model_generates_to_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    adapt_hf.main(["--new", "4"])
    threshold, depths, long, short = capsys.readouterr().out.splitlines()
    assert threshold.startswith("threshold 0.9")
    assert "relative FLOPs 1.8" in threshold
    assert depths.split() == ["depth", "1", "2", "3", "4"]
    assert long.startswith(adapt_hf.PROMPTS[0])
    assert short.startswith(adapt_hf.PROMPTS[1])
    assert len(long.split()) == len(adapt_hf.PROMPTS[0].split()) + 3  # the newest has not run
    assert len(short.split()) == len(adapt_hf.PROMPTS[1].split()) + 3  # the newest has not run


def test_any_model_or_an_adapted_one_is_loaded(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = adapt_hf.small()
    plain, adapted = f"{tmp_path}/plain", f"{tmp_path}/adapted"
    model.save_pretrained(adapted)
    model.base.save_pretrained(plain)
    for path, layers in ((plain, [1, 3]), (adapted, None)):
        tokenizer.save_pretrained(path)
        loaded, _ = adapt_hf.load(path, layers)
        assert loaded.config.span == [1, 3]
        assert all(torch.equal(a, b) for a, b in zip(loaded.base.parameters(), model.base.parameters(), strict=True))
    adapt_hf.main(["--model", adapted, "--new", "2"])
    assert capsys.readouterr().out.startswith("depth  1  2  3  4 \n" + adapt_hf.PROMPTS[0])
    with pytest.raises(SystemExit, match=r"--layers expected a model that is not adapted yet"):
        adapt_hf.main(["--model", adapted, "--layers", "1", "3"])


def test_layers_of_no_model_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        adapt_hf.main(["--layers", "1", "3"])
    assert "error: --layers expected --model as well" in capsys.readouterr().err


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_a_run_in_no_processes_is_refused(name: str, number: int) -> None:
    if name.startswith("examples.retrofit"):
        pytest.importorskip("peft")
    command = importlib.import_module(name)
    with pytest.raises(SystemExit) as error:
        command.main([*(["small.yaml"] if name == SWEEP else []), "--processes", str(number)])
    assert str(error.value) == f"error: --processes expected at least 1, got {number}"


def test_a_question_without_its_arguments_or_its_server_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    asking = importlib.import_module("examples.ask")
    with pytest.raises(SystemExit):
        asking.main(["a-model"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "python -m examples.ask: error: the following arguments are required: prompt"
    with pytest.raises(SystemExit) as error:
        asking.main(["a-model", "Hello", "http://localhost:9/v1"])
    assert str(error.value) == "error: http://localhost:9/v1: Connection error."
