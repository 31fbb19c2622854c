"""The demonstration in examples/adaponderlm: its text, its training, its figures, and what it refuses."""

import sysconfig
from pathlib import Path

import pytest
import torch

import adadepth as ad
from examples.adaponderlm import __main__ as demo
from examples.adaponderlm import evaluate, text
from examples.adaponderlm.model import AdaptiveLM, Shape
from examples.adaponderlm.train import Recipe, allow_exits, nll, penalty, schedule, train

SMALL = Shape(dim=16, heads=2)


def small_model(tau: float | None = None) -> AdaptiveLM:
    torch.manual_seed(0)
    model = AdaptiveLM(SMALL)
    if tau is not None:
        allow_exits(model, Recipe(2, tau=tau))
        for mlp in model.looped.gate.mlps:  # spread the scores, so that depths are mixed
            mlp[-1].weight.data.normal_(std=5.0)
            mlp[-1].bias.data.zero_()
    return model.eval()


def some_bytes(count: int) -> torch.Tensor:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def rows(output: str) -> dict[str, list[str]]:
    """The cells of every table row, by its first cell."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {first: rest for first, *rest in cells}


def test_quick_run_prints_every_figure(capsys):
    demo.main(["--quick", "--steps", "8"])
    output = capsys.readouterr().out
    table = rows(output)
    assert list(table)[:7] == [
        "learned",
        "fixed 3 or 4",
        "random, from 2",
        *(f"fixed {i}" for i in range(1, 5)),
    ]
    assert [table[str(i)][0] for i in range(1, 5)] == ["0.0%", "0.0%", "0.0%", "100.0%"]  # eight steps close no gate
    assert table["learned"][:3] == table["fixed 4"][:3]
    nats, bits = float(table["learned"][1]), float(table["learned"][2])
    assert 2 < nats < 5.6
    assert bits == pytest.approx(nats / 0.6931, abs=2e-3)
    assert "Python's standard library" in output
    assert "Evaluated on 4,096 held-out bytes" in output
    assert "1.00 of the 4 iterations, which would be its share of the dense time" in " ".join(output.split())


def test_an_interrupt_evaluates_what_is_there(capsys, monkeypatch, tmp_path):
    def interrupted(*args):
        steps = train(*args)
        yield from (next(steps) for _ in range(2))
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    path = tmp_path / "book.txt"
    path.write_bytes(b"It is a truth universally acknowledged. " * 400)
    demo.main(["--quick", "--text", str(path)])
    output = capsys.readouterr().out
    assert "Stopped after 2 of 20 steps; this is what there is.\n" in output
    assert "Exits were not trained yet: every byte goes to full depth.\n" in output
    assert rows(output)["learned"][0] == "4.00"


ERRORS = {
    "missing": (None, "error: cannot read {path}: No such file or directory"),
    "empty": (b"", "error: the text is empty"),
    "binary": (b"\x7fELF\0\0", "error: {path} is not text: it holds zero bytes"),
    "short": (
        b"x" * 2569,
        "error: the text is too short: 2,569 bytes, expected at least 2,570, so that the part held out fills two "
        "windows of 128 bytes",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_text_is_refused_in_one_line(case, tmp_path):
    data, message = ERRORS[case]
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SystemExit) as e:
        demo.main(["--text", str(path)])
    assert str(e.value) == message.format(path=path)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(SystemExit) as e:
        demo.main(["--text", str(tmp_path)])
    assert str(e.value) == f"error: cannot read {tmp_path}: Is a directory"


def test_one_step_is_refused():
    with pytest.raises(SystemExit) as e:
        demo.main(["--steps", "1"])
    assert str(e.value) == "error: --steps expected at least 2, one for each stage, got 1"


def test_a_python_without_sources_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit) as e:
        demo.main([])
    assert str(e.value) == (
        "error: this Python has no library sources to train on; give a text of your own: --text FILE"
    )


def test_the_shortest_text_that_fits_gives_one_window():
    data = some_bytes(257)
    assert text.even_windows(data, 9, 256).equal(data.long().unsqueeze(0))
    assert text.random_windows(data, 3, 256, torch.Generator()).equal(data.long().expand(3, -1))


def test_the_standard_library_is_split_by_files_and_always_alike():
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


def test_the_last_tenth_of_files_is_held_out(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, letter in zip(paths, b"ab", strict=True):
        path.write_bytes(bytes([letter]) * 500)
    whole = text.file_text(paths, 16)
    assert whole.train.numpy().tobytes() == b"a" * 500 + b"b" * 400
    assert whole.held_out.numpy().tobytes() == b"b" * 100


def test_windows_are_spread_and_do_not_overlap():
    data = torch.arange(101, dtype=torch.uint8)
    assert text.even_windows(data, 3, 10)[:, [0, -1]].tolist() == [[0, 10], [30, 40], [60, 70]]
    assert text.even_windows(data, 99, 10)[:, 0].tolist() == list(range(0, 100, 10))


def test_exits_come_in_the_second_stage_and_training_is_repeatable():
    def steps(seed):
        recipe = Recipe(10, batch=2, window=16, tau=0.97)  # survival 0.982, 0.964 of fresh gates: all leave at 2
        return list(train(small_model(), some_bytes(500), recipe, torch.Generator().manual_seed(seed)))

    done = steps(0)
    assert [progress.stage for progress in done] == [1] * 4 + [2] * 6
    assert [progress.depth for progress in done] == [4.0] * 4 + [2.0] * 6
    assert steps(0) == done
    assert steps(1) != done


def test_training_moves_the_gates_slowly():
    model, recipe = small_model(), Recipe(10, batch=2, window=16, k_max=1.0, weight=1.0)
    done = train(model, some_bytes(500), recipe, torch.Generator().manual_seed(0))
    for _ in range(5):
        next(done)
    gate = model.looped.gate
    before = [p.detach().clone() for p in (*gate.parameters(), *model.head.parameters())]
    *_, last = done
    moved = [(p - b).abs().max() for p, b in zip((*gate.parameters(), *model.head.parameters()), before, strict=True)]
    assert last.stage == 2
    assert all(0 < m < moved[-1] / 4 for m in moved[:-1])


def test_the_penalty_is_the_mean_of_the_smallest_survival_values():
    survival = torch.tensor([[0.5, 0.2], [0.9, 0.0]])
    scores = torch.tensor([[0.5, 0.4], [0.9, 0.3]])
    live = torch.tensor([[True, True, True], [True, True, False]])
    trace = ad.Trace(live[None], scores[None], torch.zeros(1, 2, 3))
    torch.testing.assert_close(trace.survival[0], survival)
    recipe = Recipe(10, weight=2.0, k_max=0.75, warm=(0.2, 0.6))
    assert penalty(trace, recipe, 0.2).item() == 0
    assert penalty(trace, recipe, 0.4).item() == pytest.approx(2 * 0.1)  # k = 0.375: two of four
    assert penalty(trace, recipe, 0.9).item() == pytest.approx(2 * 0.7 / 3)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [schedule(step, 200) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_figures_are_those_of_the_policies_they_name():
    model = small_model(tau=0.1)
    windows = text.random_windows(some_bytes(2000), 40, 32, torch.Generator().manual_seed(0))
    result = evaluate.evaluate(model, windows, torch.Generator().manual_seed(0), repeats=1)
    ids, targets = windows[:, :-1], windows[:, 1:]
    with torch.no_grad():
        learned = model(ids)
        assert set(learned.trace.depth.flatten().tolist()) == {2, 3, 4}
        torch.testing.assert_close(result.learned.loss, nll(learned.logits, targets))
        for depth, fixed in enumerate(result.forced, 1):
            plain = model(ids, min_depth=depth, max_depth=depth)
            torch.testing.assert_close(fixed.loss, nll(plain.logits, targets))
            assert fixed.mean_depth == depth
    mean = result.learned.mean_depth
    assert result.random.depth.min() == 2
    assert result.random.mean_depth == pytest.approx(mean, abs=0.1)
    assert result.mixture.mean_depth == pytest.approx(mean)
    low = int(mean)
    between = sorted(result.forced[i].nats for i in (low - 1, low))
    assert between[0] <= result.mixture.nats <= between[1]
    assert result.timed.live == pytest.approx(mean / 4)
    assert model.looped.skip


def test_the_standard_error_is_that_of_windows():
    a, b = (
        evaluate.Measured(torch.tensor(loss), torch.ones(2, 2))
        for loss in ([[1.0, 3.0], [5.0, 5.0]], [[1.0, 1.0], [2.0, 2.0]])
    )
    more, error = a.against(b)
    assert (more, error) == pytest.approx((2.0, 1.0))  # windows differ by 1 and 3
