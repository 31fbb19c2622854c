"""The demonstration in examples/demo: text, trainings, policies, figures, and what it refuses."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NoReturn

import pytest
import torch
from narrow import last_maps, the
from torch import Tensor, nn

import adadepth as ad
from adadepth.diagnostics import measure
from examples.demo import __main__ as demo
from examples.demo import evaluate, known, text
from examples.demo.exits import LONG, Gated, Probed, Routed, WordRouter, letters_seen, policy
from examples.demo.jobs import Trained, score_with
from examples.demo.model import AdaptiveLM, Shape
from examples.demo.train import Progress, Recipe, Training, nll, schedule

SMALL = Shape(dim=16, heads=2)
TINY = Recipe(10, batch=2, window=16, probed=4)
NOTHING = Probed(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 4))


def small_model(exits: Gated | None = None, shape: Shape = SMALL) -> AdaptiveLM:
    torch.manual_seed(0)
    model = AdaptiveLM(shape)
    if exits is not None:
        exits.begin(model, lambda: NOTHING)
        for last in last_maps(model.looped.gate):  # spread the scores, so that depths are mixed
            last.weight.data.normal_(std=5.0)
            last.bias.data.zero_()
    return model.eval()


def some_bytes(count: int) -> Tensor:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def rows(output: str) -> dict[str, list[str]]:
    """The cells of every table row, by its first cell."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {first: rest for first, *rest in cells}


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.every)])
def test_a_quick_run_prints_every_figure_and_writes_the_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forked: bool
) -> None:
    if forked and not torch.cuda.is_available():  # copies of this process, which has imported everything
        monkeypatch.setattr("examples.demo.jobs.get_context", lambda _: get_context("fork"))
    monkeypatch.setattr(demo, "Shape", partial(Shape, dim=32))
    demo.main(["--quick", "--steps", "10", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    table = rows(output)
    assert list(table)[:16] == [
        "exits",
        next(name for name in table if name.startswith("line at")),
        *(f"trained at {i}" for i in range(1, 5)),
        *(f"forced to {i}" for i in range(1, 5)),
        "confidence (top probability)",
        "convergence (relative change)",
        "KL of successive predictions",
        "uniform pruning",
        "geometric pruning",
        "oracle",
    ]
    depth, flops, nats, _ = table["exits"]
    assert 2 < float(depth) < 3.6
    assert 1.9 < float(flops) < float(depth)  # the head runs once
    assert 2 < float(nats) < 5.6
    assert [table[f"trained at {i}"][0] for i in range(1, 5)] == ["1.00", "2.00", "3.00", "4.00"]
    for name in ("line at", "uniform", "geometric"):
        row = next(cells for first, cells in table.items() if first.startswith(name))
        assert float(row[1]) == pytest.approx(float(flops), abs=0.06)
    assert sum(float(table[str(i)][0].rstrip("%")) for i in range(1, 5)) == pytest.approx(100, abs=0.3)
    assert "Python's standard library" in output
    assert "Evaluated on 8,192 held-out bytes" in output
    *_, last = output.strip().splitlines()
    assert last == f"Report: {tmp_path / 'report.html'}"
    report = (tmp_path / "report.html").read_text()
    assert report.startswith("<!DOCTYPE html>")
    assert not re.search(r"src=|href=.(?!#)|url\((?!#)|@import|<script", report)
    for cell in ("exits", "KL of successive predictions", nats, "A fixed table", "Held-out loss", "Training"):
        assert cell in report
    assert report.index("numbers mean nothing") < report.index("The depth of each byte") < report.index("<table>")
    assert output.count("The numbers mean nothing.") == 2  # before and after
    assert "first stage: step 4 of 4" in output  # in a pipe, a line for each quarter
    assert "exits: step 10 of 10" in output
    assert [name for name in table if name.startswith("programs")] == list(known.NAMES)
    assert [table[name][0] for name in known.FIXED] == ["2.00", "3.00"]
    assert "Programs: gates that learn the depth" in report


@pytest.mark.every
@pytest.mark.parametrize("wait", [pytest.param(1, id="while processes start"), pytest.param(6, id="in training")])
def test_an_interrupt_leaves_a_report_of_what_there_is(tmp_path: Path, wait: int) -> None:
    command = [sys.executable, "-m", "examples.demo", "--quick", "--steps", "2000", "--out", str(tmp_path)]
    root = Path(demo.__file__).parents[2]
    run = subprocess.Popen(
        command,
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it is ignored
    )
    try:
        for _ in range(600):
            if (tmp_path / "text.pt").exists():
                break
            time.sleep(0.1)
        time.sleep(wait)
        os.killpg(run.pid, signal.SIGINT)
        output, _ = run.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 0
    assert "Stopped early; this is what there is." in output
    assert re.search(r"fixed 3 stopped after \d+ of 2000 steps\.", output)
    assert "Exits were not trained yet: there is nothing to evaluate." in output
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_an_interrupted_evaluation_leaves_the_curves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*args: object) -> NoReturn:
        raise KeyboardInterrupt

    history = [Progress(step, 5.0 - step / 100, 4.0) for step in range(1, 31)]
    monkeypatch.setattr(demo, "train_all", lambda *args: iter([("exits", history[-1])]))
    monkeypatch.setattr(demo, "load", lambda setup: {"exits": Trained(small_model(), history, None)})
    monkeypatch.setattr(demo, "evaluate", interrupted)
    demo.main(["--quick", "--steps", "30", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert "The evaluation was stopped." in output
    assert output.strip().endswith("report.html")
    assert "<svg" in (tmp_path / "report.html").read_text()


ERRORS = {
    "missing": (None, "error: cannot read {path}: No such file or directory"),
    "empty": (b"", "error: the text is empty"),
    "binary": (b"\x7fELF\0\0", "error: {path} is not text: 3 of its 6 bytes are control characters"),
    "short": (
        b"x" * 2569,
        "error: the text is too short: 2,569 bytes, expected at least 2,570, so that the part held out fills two "
        "windows of 128 bytes",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_text_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    data, message = ERRORS[case]
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SystemExit) as e:
        demo.main(["--text", str(path), "--out", str(tmp_path / "out")])
    assert str(e.value) == message.format(path=path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as e:
        demo.main(["--text", str(tmp_path), "--out", str(tmp_path / "out")])
    assert str(e.value) == f"error: cannot read {tmp_path}: Is a directory"


def test_too_few_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as e:
        demo.main(["--steps", "2", "--out", str(tmp_path)])
    assert str(e.value) == "error: --steps expected at least 3, some for each stage, got 2"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as e:
        demo.main(["--out", str(tmp_path / "file")])
    assert str(e.value) == f"error: cannot write to {tmp_path / 'file'}: File exists"


def test_a_python_without_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit) as e:
        demo.main(["--out", str(tmp_path / "out")])
    assert str(e.value) == (
        "error: this Python has no library sources to train on; give a text of your own: --text FILE"
    )


def test_the_shortest_text_that_fits_gives_one_window() -> None:
    data = some_bytes(257)
    assert text.even_windows(data, 9, 256).equal(data.long().unsqueeze(0))
    assert text.random_windows(data, 3, 256, torch.Generator()).equal(data.long().expand(3, -1))


def test_the_standard_library_is_split_by_files_and_always_alike() -> None:
    training, held_out = text.stdlib_files()
    assert (training, held_out) == text.stdlib_files()
    assert not set(training) & set(held_out)
    every = list(training)
    for i, path in enumerate(held_out):
        every.insert(16 * i + 15, path)
    assert len(every) // 16 == len(held_out)
    assert every == sorted(every, key=lambda path: (path.parent.parts, path.name))
    root = Path(sysconfig.get_path("stdlib"))
    assert root / "argparse.py" in every
    names = {part for path in every for part in path.relative_to(root).parts}
    assert not names & {"test", "tests", "idle_test", "site-packages", "encodings"}
    whole = text.stdlib_text(256)
    assert whole.train.numpy().tobytes() == b"".join(path.read_bytes() for path in training)
    assert whole.held_out.numpy().tobytes() == b"".join(path.read_bytes() for path in held_out)


def test_the_last_tenth_of_files_is_held_out(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, letter in zip(paths, b"ab", strict=True):
        path.write_bytes(bytes([letter]) * 500)
    whole = text.file_text(paths, 16)
    assert whole.train.numpy().tobytes() == b"a" * 500 + b"b" * 400
    assert whole.held_out.numpy().tobytes() == b"b" * 100


def test_windows_are_spread_and_do_not_overlap() -> None:
    data = torch.arange(101, dtype=torch.uint8)
    assert text.even_windows(data, 3, 10)[:, [0, -1]].tolist() == [[0, 10], [30, 40], [60, 70]]
    assert text.even_windows(data, 99, 10)[:, 0].tolist() == list(range(0, 100, 10))


def trained(exits: str | None, seed: int = 0, shape: Shape = SMALL) -> Training:
    """All of the tiny recipe: at full depth, or with exits in its second stage."""
    data, training = some_bytes(500), Training(shape, TINY, seed)
    for _ in range(TINY.first):
        training.fixed(data, 4)
    if exits is None:
        for _ in range(TINY.steps - TINY.first):
            training.fixed(data, 4)
    else:
        training.begin(chosen := policy(exits), data)
        for _ in range(TINY.steps - TINY.first):
            training.adaptive(data, chosen)
    return training


def weights(training: Training) -> Tensor:
    return torch.cat([p.detach().flatten() for p in training.model.parameters()])


@pytest.mark.parametrize("exits", ["router", "survival", "paper", None])
def test_training_is_repeatable_and_a_function_of_the_seed(exits: str | None) -> None:
    assert torch.equal(weights(trained(exits)), weights(trained(exits)))
    assert not torch.equal(weights(trained(exits)), weights(trained(exits, seed=1)))


def test_the_probe_leaves_the_training_as_it_was() -> None:
    training, data = Training(SMALL, TINY, 0), some_bytes(500)
    before, state = weights(training), training.generator.get_state()
    ids, losses = training.probe(data)
    assert ids.shape == (4, 16)
    assert losses.shape == (4, 16, 4)
    assert torch.equal(weights(training), before)
    assert torch.equal(training.generator.get_state(), state)


def test_a_resumed_training_is_the_same(tmp_path: Path) -> None:
    training, data = Training(SMALL, TINY, 0), some_bytes(500)
    for _ in range(4):
        training.fixed(data, 4)
    training.save(tmp_path / "trunk.pt")
    other = Training(SMALL, TINY, seed=9)
    other.resume(tmp_path / "trunk.pt")
    for _ in range(TINY.steps - 4):
        assert training.fixed(data, 4) == other.fixed(data, 4)
    assert torch.equal(weights(training), weights(other))
    assert torch.equal(weights(trained(None)), weights(training))


@pytest.mark.parametrize("update", ["interpolate", "ponder"])
@pytest.mark.parametrize("exits", ["router", "survival", "paper"])
def test_every_policy_trains_with_every_update(exits: str, update: Literal["interpolate", "ponder"]) -> None:
    model = trained(exits, shape=SMALL._replace(update=update)).model
    assert all(p.isfinite().all() for p in model.parameters())
    assert (model.router is None) == (exits != "router")
    assert isinstance(model.looped.update, ad.SurvivalScaled) == (exits == "survival")
    assert (model.looped.gate is None) == (exits == "router")
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names))


def test_gates_move_slowly() -> None:
    data, training, exits = some_bytes(500), Training(SMALL, TINY, 0), policy("survival")
    training.step = TINY.first
    training.begin(exits, data)
    model = training.model
    gate = the(nn.Module, model.looped.gate)
    before = [p.detach().clone() for p in (*gate.parameters(), *model.head.parameters())]
    for _ in range(6):
        training.adaptive(data, exits)
    after = (*gate.parameters(), *model.head.parameters())
    moved = [(p - b).abs().max() for p, b in zip(after, before, strict=True)]
    assert all(0 < m < moved[-1] / 4 for m in moved[:-1])


@pytest.mark.parametrize("survival", [True, False])
def test_going_on_costs_the_smallest_values(survival: bool) -> None:
    scores = torch.tensor([[0.5, 0.4], [0.9, 0.3]])
    live = torch.tensor([[True, True, True], [True, True, False]])
    trace = ad.Trace(live[None], scores[None], torch.zeros(1, 2, 3))
    exits = Gated(survival, weight=2.0, penalty=ad.BottomKPenalty(0.75, warmup=(200, 600)))
    assert exits.cost(trace, 200).item() == 0
    second = 0.2 if survival else 0.4  # of the first byte; the second byte left there, which counts as 0
    assert exits.cost(trace, 400).item() == pytest.approx(2 * second / 2)  # k = 0.375: two of four
    assert exits.cost(trace, 900).item() == pytest.approx(2 * (second + 0.5) / 3)
    assert Routed().cost(trace, 900).item() == 0


def test_letters_are_counted_from_the_start_of_the_word() -> None:
    lines = [b"a big_word, 42x (b)", b"   abcdefghijk l..mn"[:19]]
    want = []
    for line in lines:
        count, counts = 0, []
        for byte in line.decode():
            count = count + 1 if byte.isalnum() or byte == "_" else 0
            counts.append(min(count, LONG))
        want.append(counts)
    assert letters_seen(torch.tensor([list(line) for line in lines])).tolist() == want


def test_a_router_goes_deep_where_the_last_iterations_gain() -> None:
    ids = torch.tensor([list(b"the longest words ")])
    seen = letters_seen(ids)
    losses = torch.zeros(1, ids.shape[1], 4)
    losses[..., 1] = seen  # the later in its word, the more a byte gains
    router = WordRouter.fit(ids, losses)
    depth = router(ids)
    assert depth.equal(router.depths[seen])
    assert depth.min() == 2
    assert depth.max() == 4
    assert (router.depths.diff() >= 0).all()
    losses[..., 1] = -seen  # words that gain less further on are no shallower there
    assert (WordRouter.fit(ids, losses).depths.diff() >= 0).all()


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [schedule(step, 200) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return text.random_windows(some_bytes(2000), 40, 32, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def result(windows: Tensor) -> evaluate.Evaluation:
    models = {"exits": small_model(Gated(survival=True, tau=0.1))}
    for i in range(1, 5):
        torch.manual_seed(i)
        models[f"fixed {i}"] = AdaptiveLM(SMALL).eval()
    each = {
        name: Trained(
            model, [], None if name == "exits" else measure(score_with(model), [windows], max_depth=int(name[-1]))
        )
        for name, model in models.items()
    }
    return evaluate.evaluate(each, windows, windows, seed=0, repeats=1)


def test_figures_are_those_of_the_policies_they_name(result: evaluate.Evaluation, windows: Tensor) -> None:
    ids, targets = windows[:, :-1], windows[:, 1:]
    model = small_model(Gated(survival=True, tau=0.1))
    with torch.no_grad():
        out = model(ids)
        assert set(out.trace.depth.flatten().tolist()) == {2, 3, 4}
        torch.testing.assert_close(result.exits.measured.loss, nll(out.logits, targets))
        model.looped.gate = model.looped.rule = None
        for depth, row in enumerate(result.forced, 1):
            torch.testing.assert_close(row.measured.loss, nll(model(ids, max_depth=depth).logits, targets))
    mean = result.exits.measured.mean_depth
    for row in (*result.criteria, *result.elsewhere):
        assert row.measured.mean_depth == pytest.approx(mean, rel=0.05)
        assert row.measured.depth.min() >= 2
    for row in result.random:
        assert row.measured.depth.min() == 2
        assert row.flops.total == pytest.approx(result.exits.flops.total, rel=0.05)
    assert the(evaluate.Row, result.line).flops.total == pytest.approx(result.exits.flops.total, rel=1e-6)
    assert result.timed.live == pytest.approx(mean / 4)
    best = torch.stack([row.measured.loss for row in result.forced]).amin(0)
    assert torch.equal(result.oracle.measured.loss, best)


def test_the_line_is_the_best_mixture_of_two_trained_depths(result: evaluate.Evaluation) -> None:
    line = the(evaluate.Row, result.line)
    depth, nats = line.measured.mean_depth, [row.measured.nats for row in result.trained]
    pairs = [(low, high) for low in range(1, 5) for high in range(low + 1, 5) if low <= depth <= high]
    mixed = [nats[low - 1] + (nats[high - 1] - nats[low - 1]) * (depth - low) / (high - low) for low, high in pairs]
    assert line.measured.nats == pytest.approx(min(mixed))
    assert line.name == f"line at {depth:.2f}"


def test_without_a_whole_ladder_there_is_no_line(windows: Tensor) -> None:
    model = small_model(Gated(survival=False, tau=0.1))
    result = evaluate.evaluate({"exits": Trained(model, [], None)}, windows, windows, seed=0, repeats=1)
    assert result.line is None
    assert result.trained == result.elsewhere == []


def test_exits_are_switched_off_and_on_again() -> None:
    model = small_model(Gated(survival=True))
    before = model.looped.gate, model.looped.rule, model.looped.update
    with evaluate.without_exits(model):
        assert model(some_bytes(12)[None].long()).trace.depth.unique().tolist() == [4]
    assert before == (model.looped.gate, model.looped.rule, model.looped.update)
