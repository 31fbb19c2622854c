"""The flagship's sweeps, evaluation and report, on runs of a few steps."""

import json
import math
import os
import re
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("omegaconf")

import torch
from narrow import the
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

import adadepth as ad
from adadepth.diagnostics import Measured, mixture
from examples.adaponderlm import analysis, evaluate, harness, html, report, routers, sweep, train
from examples.adaponderlm.compare import Difference, Point, Result, Table, best_mixture, difference
from examples.adaponderlm.config import BadInput
from examples.adaponderlm.evaluate import Options
from examples.adaponderlm.processes import Job, Now, run_all
from examples.adaponderlm.routers import Window
from examples.adaponderlm.text import held_out
from examples.adaponderlm.trained import load, own_depths, score_at

ROOT = Path(__file__).parent.parent
WORDS = "the quick brown fox jumps over 13 lazy dogs, and then (again) it rests until\nthe next day begins\n"
FITTING = 100  # steps of fitting a router
OPTIONS = Options(windows=8, choice=8, batch=4, depths=(2.0, 2.5), repeats=1)

SWEEP = """
base: [small.yaml]
set:
  - model.shape.hidden_size=32
  - model.shape.intermediate_size=64
  - model.shape.num_attention_heads=2
  - train.steps=10
  - train.batch=4
  - train.save=10
  - train.log=2
  - data.window=32
  - model.steps=3
seeds: [0]
budgets: [2.0, 2.5]
evaluate: [--windows, "8", --choice, "8", --batch, "4", --repeats, "1"]
against: fixed-3
runs:
  trunk: {files: [loop.yaml], stop: 0.4}
  fixed-1: {files: [loop.yaml], set: [stages.all.depth=1]}
  fixed-3: {files: [loop.yaml], after: trunk}
  gate: {files: [survival.yaml], after: trunk, set: [model.gate.tau=0.98, model.gate.first=1]}
  router: {files: [router.yaml], set: [model.router.probed=16, model.router.mean=2.5, model.router.first=1]}
  told: {files: [told.yaml], set: [model.router.probed=16, model.router.mean=2.5, model.router.first=1]}
  criterion: {files: [criterion.yaml], after: trunk, set: [model.gate.first=1]}
  uniform: {files: [uniform.yaml], after: trunk, set: [stages.exits.mean=2.0]}
claims:
  - {says: gates lose, worse: gate, better: fixed-3}
  - {says: nobody ran this, worse: other, better: fixed-3}
"""


class Swept(SimpleNamespace):
    out: Path
    sweep: sweep.Sweep
    jobs: list[Job]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """All runs of a small sweep, trained and evaluated in this process."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "text.txt").write_text("".join(f"{i} {WORDS}" for i in range(300)))
    (folder / "mine.yaml").write_text(SWEEP)
    loaded, out = sweep.load(str(folder / "mine.yaml")), folder / "out"
    overrides = [f"data.source={folder / 'text.txt'}", f"data.cache={folder / 'cache'}"]
    jobs = sweep.trainings(loaded, out, [0], overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routers, "STEPS", FITTING)
        for job in jobs:
            assert not job.finished()
            train.main(job.command[2:])
            assert job.finished()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "continuation", partial(analysis.continuation, length=24))
        for job in sweep.evaluations(loaded, out, [0], []):
            assert not job.finished()
            evaluate.main(job.command[2:])
            assert job.finished()
    return Swept(out=out, sweep=loaded, jobs=jobs, overrides=overrides)


def found(swept: Swept, run: str) -> dict[str, Any]:
    return json.loads((swept.out / f"{run}-0" / "evaluation.json").read_text())


RUNS = ["fixed-1", "fixed-3", "gate", "router", "told", "criterion", "uniform"]


@pytest.mark.parametrize("run", RUNS)
def test_figures_go_together(swept: Swept, run: str) -> None:
    result, kept = found(swept, run), torch.load(swept.out / f"{run}-0" / "windows.pt")
    rows = [result["own"], *result["forced"], *result["budgets"], *result["criteria"], *result["random"]]
    for row in [*rows, result["oracle"]]:
        windows = kept["windows"][row["name"]]
        assert len(windows) == OPTIONS.windows
        assert row["loss"] == pytest.approx(windows.mean().item(), rel=1e-9)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2))
    assert len({row["name"] for row in rows}) == len(rows)
    assert [row["depth"] for row in result["forced"]] == [1, 2, 3]
    assert all(a["relative_flops"] < b["relative_flops"] for a, b in pairwise(result["forced"]))
    if result["decides"] != "gate" and result["decides"] != "criterion":
        assert result["forced"][0]["relative_flops"] == pytest.approx(1)
    least = [kept["windows"][f"forced to {depth}"] for depth in (1, 2, 3)]
    assert bool((kept["windows"]["oracle"] <= torch.stack(least).amin(0) + 1e-9).all())
    for key in ("by_kind", "by_frequency", "by_exit"):
        assert sum(row["share"] for row in result[key]) == pytest.approx(1)
        assert sum(row["share"] * row["loss"] for row in result[key]) == pytest.approx(result["own"]["loss"], rel=1e-6)
        assert sum(row["share"] * row["depth"] for row in result[key]) == pytest.approx(result["own"]["depth"])
    assert result["time"].keys() == {"dense", "packed"}
    assert result["training"]["step"] == [2, 4, 6, 8, 10]
    assert {"letter", "digit", "space", "punctuation", "end of line"} <= {row["name"] for row in result["by_kind"]}


def test_who_decides(swept: Swept) -> None:
    assert {run: found(swept, run)["decides"] for run in RUNS} == {
        "fixed-1": "fixed",
        "fixed-3": "fixed",
        "gate": "gate",
        "router": "router",
        "told": "fixed",
        "criterion": "criterion",
        "uniform": "chance",
    }
    assert found(swept, "fixed-1")["own"]["loss"] == found(swept, "fixed-1")["forced"][0]["loss"]
    assert found(swept, "fixed-3")["own"]["loss"] == found(swept, "fixed-3")["forced"][2]["loss"]
    assert 1 < found(swept, "gate")["own"]["depth"] < 3
    assert found(swept, "uniform")["own"]["depth"] == pytest.approx(2, abs=0.15)
    assert {row["kind"] for row in found(swept, "fixed-3")["criteria"]} == {
        "entropy",
        "kl",
        "confidence",
        "margin",
        "convergence",
    }
    assert found(swept, "fixed-1")["criteria"] == []  # it has never seen a second iteration


@pytest.mark.parametrize("run", ["gate", "uniform", "criterion"])
def test_budgets_are_met_on_other_text(swept: Swept, run: str) -> None:
    budgets = found(swept, run)["budgets"]
    assert len(budgets) == 2
    for row, wanted in zip(budgets, OPTIONS.depths, strict=True):
        assert row["depth"] == pytest.approx(wanted, abs=0.25)


def test_a_router_is_as_it_was_after_other_budgets(swept: Swept) -> None:
    run = load(swept.out / "router-0")
    test = held_out(run.config.data, run.tokenizer, OPTIONS.windows, "test")
    asked = evaluate.Evaluation(run, test, held_out(run.config.data, run.tokenizer, OPTIONS.windows, "choice"), OPTIONS)
    assert run.router is not None
    before, price = asked.own()[0], run.router.price.clone()
    deep = [row["depth"] for row in asked.budgets()]
    assert deep[0] <= deep[1]
    assert run.router.price == price
    assert asked.own()[0] == before


def letters_seen(ids: Tensor) -> Tensor:
    """Of the word that each byte is in, its own with them; 0 for what is no letter, at most 8."""
    rows = []
    for row in ids.tolist():
        seen, counts = 0, []
        for byte in row:
            letter = (byte < 128 and (chr(byte).isalnum() or chr(byte) == "_")) or 127 < byte < 256
            seen = seen + 1 if letter else 0
            counts.append(min(seen, 8))
        rows.append(counts)
    return torch.tensor(rows)


@pytest.mark.parametrize("run", ["router", "told"])
def test_tokens_are_told_how_much_of_their_word_was_seen(swept: Swept, run: str) -> None:
    trained = load(swept.out / f"{run}-0")
    ids = held_out(trained.config.data, trained.tokenizer, 4, "test")
    assert trained.router is not None
    seen, deep = letters_seen(ids[:, :-1]), trained.router(ids[:, :-1])
    weight = torch.load(trained.folder / "model" / "router.pt")["told"]["kinds.weight"]
    assert len(deep.unique()) > 1 and len(seen.unique()) > 5 and weight[seen.unique()].abs().min() > 0
    embedded = trained.model.get_input_embeddings()(ids[:, :-1]) + weight[seen]
    with torch.no_grad():
        logits = trained.model(inputs_embeds=embedded, max_depth=deep if run == "router" else 3).logits
    wanted = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    loss, depth = score_at(trained, own_depths(trained))(ids)
    assert torch.equal(depth, deep if run == "router" else torch.full_like(deep, 3))
    assert torch.allclose(loss, wanted, atol=1e-6)


def test_a_window_says_its_depth_once_it_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "STEPS", FITTING)
    window, ids = Window(4, 2, window=3, vocabulary=50), torch.randint(50, (8, 16))
    assert window.kinds == 4 and window.kind(ids).unique().tolist() == [2]
    losses = torch.stack([torch.where(ids < 25, 1.0, 4.0 - depth) for depth in range(4)], -1)
    window.fit(ids, losses, mean=3.0)
    assert torch.equal(window.kind(ids), window(ids)) and len(window(ids).unique()) > 1


def test_exits_put_on_afterwards_leave_the_loop_as_it_was(swept: Swept) -> None:
    run = load(swept.out / "gate-0")
    test = held_out(run.config.data, run.tokenizer, OPTIONS.windows, "test")
    asked = evaluate.Evaluation(run, test, held_out(run.config.data, run.tokenizer, OPTIONS.windows, "choice"), OPTIONS)
    loop = run.model.loop
    before = loop.gate, loop.rule, loop.update
    own = asked.own()[0]
    assert len(asked.criteria([2.0])) == 5
    assert [row["kind"] for row in asked.random([2.0])] == ["uniform", "geometric"]
    assert (loop.gate, loop.rule, loop.update) == before
    assert asked.own()[0] == own


def test_nothing_is_chosen_on_what_is_reported(swept: Swept) -> None:
    run = load(swept.out / "gate-0")
    test, choice = (held_out(run.config.data, run.tokenizer, OPTIONS.windows, part) for part in ("test", "choice"))
    assert not {tuple(row.tolist()) for row in test} & {tuple(row.tolist()) for row in choice}
    cheap = Point("cheap", 1.0, 1.0, torch.tensor([3.0]), choice=2.0)
    lucky = Point("lucky", 1.0, 1.0, torch.tensor([1.0]), choice=2.5)
    assert best_mixture([cheap, lucky], 1.0) is cheap


@pytest.mark.parametrize("run", ["fixed-1", "gate", "router", "told"])
def test_a_continuation_is_the_likeliest_at_its_depths(swept: Swept, run: str) -> None:
    trained = load(swept.out / f"{run}-0")
    text = found(swept, run)["continuation"]
    ids = list("".join(text["tokens"]).encode())
    if len(ids) != len(text["tokens"]):
        pytest.skip("the bytes that it wrote are no text")
    with torch.no_grad():
        depths = own_depths(trained)
        depth = None if depths is None else depths(torch.tensor([ids]))
        said = depth if trained.says is None else trained.says(torch.tensor([ids]))
        out = trained.model(torch.tensor([ids]), min_depth=said, max_depth=depth)
    start = text["prompt"]
    assert out.trace.depth[0].tolist() == text["depth"]
    assert out.logits[0, start - 1 : -1].argmax(-1).tolist() == ids[start:]


def test_depth_of_a_row_is_what_was_asked(swept: Swept) -> None:
    run = load(swept.out / "fixed-3-0")
    ids = held_out(run.config.data, run.tokenizer, 2, "test")
    loss, depth = score_at(run, lambda ids: 2)(ids)
    assert depth.unique().tolist() == [2]
    assert loss.shape == (2, run.config.data.window)


def test_frequent_tokens_are_in_the_first_deciles() -> None:
    ids = torch.tensor([[0] * 6 + [1] * 3 + [2]])
    measured = Measured(torch.arange(10.0).view(1, 10), torch.tensor([[1] * 6 + [2] * 3 + [3]]))
    rows = {row["name"]: row for row in analysis.by_frequency(ids, ids, measured)}
    assert {name: (row["share"], row["depth"]) for name, row in rows.items()} == {
        "decile 4": (0.6, 1.0),
        "decile 8": (pytest.approx(0.3), 2.0),
        "decile 10": (pytest.approx(0.1), 3.0),
    }
    assert rows["decile 8"]["exits"] == [0.0, 1.0]


def test_both_ways_to_compute_are_timed_together(swept: Swept, tmp_path: Path) -> None:
    file = tmp_path / "time.json"
    folders = [str(swept.out / f"{run}-0") for run in ("fixed-1", "gate")]
    evaluate.main([*folders, "--together", str(file), "--repeats", "1", "--batch", "2"])
    times = json.loads(file.read_text())
    assert times.keys() == {"fixed-1-0", "gate-0"}
    assert all(seconds > 0 for each in times.values() for seconds in each.values())


def test_too_little_text_to_choose_on(swept: Swept) -> None:
    with pytest.raises(SystemExit) as error:
        evaluate.main([str(swept.out / "gate-0"), "--choice", "1"])
    assert str(error.value) == (
        "error: expected 2 windows or more to choose on, of which thresholds are fitted on one half, got 1: ask for "
        "more with --choice, or train on a longer text"
    )


def test_a_run_that_is_not_done(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        evaluate.main([str(tmp_path)])
    assert str(error.value) == f"error: there is no trained model in {tmp_path}: run train.py to its end"


def points(*losses: float, flops: list[float] | None = None) -> list[Point]:
    where = flops or [float(i) for i in range(1, len(losses) + 1)]
    noise = torch.tensor([-0.1, 0.0, 0.1], dtype=torch.float64)
    return [Point(f"p{i}", f, f, loss + noise, loss) for i, (f, loss) in enumerate(zip(where, losses, strict=True))]


@pytest.mark.parametrize("mean", [1.0, 1.4, 2.0, 2.5, 3.3, 4.0])
def test_the_line_is_that_of_the_diagnostics(mean: float) -> None:
    given = points(3.0, 2.9, 1.5, 1.4)
    fixed = [Measured(p.losses, torch.full_like(p.losses, i)) for i, p in enumerate(given, 1)]
    assert the(Point, best_mixture(given, mean)).nats == pytest.approx(mixture(fixed, mean).nats)


def test_a_line_never_costs_more_and_may_cost_less() -> None:
    given = points(1.0, 2.0, 1.5)
    assert best_mixture(given, 0.9) is None
    assert best_mixture(given, 2.7) is given[0]
    assert best_mixture(given, 99.0) is given[0]


def test_differences_are_paired() -> None:
    a, b = points(2.0, 1.5)
    one: object = difference([(a, b)])
    assert one == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-12), 3)  # the noise of a window is in both
    c, d = points(3.0, 2.3)
    two: object = difference([(a, b), (c, d)])
    assert two == (pytest.approx(0.6), pytest.approx(0.1), 2)


# what a table of Student's t has for 5 %: 12.706 with 2 values, 4.303 with 3, 1.984 with 100
@pytest.mark.parametrize(("count", "limit"), [(2, 12.706), (3, 4.303), (100, 1.984)])
def test_words_of_a_difference(count: int, limit: float) -> None:
    assert Difference(-1.001 * limit, 1.0, count).word == "better than"
    assert Difference(1.001 * limit, 1.0, count).word == "worse than"
    assert Difference(0.999 * limit, 1.0, count).word == "equal to, within error,"
    assert str(Difference(0.3, 0.1, count)) == "+0.3000 ± 0.1000"


def made(
    decides: str, *rows: tuple[float, float], seed: int = 0, depths: list[float] | None = None, policy: str = ""
) -> Result:
    """A run of three windows: its own (FLOPs, loss), then those at other budgets; of four iterations."""
    names = ["own", *(f"own at {i}" for i in range(1, len(rows)))]
    each: list[dict[str, Any]] = [
        {"name": name, "relative_flops": f, "ungated_flops": f - 0.5, "depth": f, "loss": loss, "choice": loss}
        for name, (f, loss) in zip(names, rows, strict=True)
    ]
    noise = torch.tensor([-1e-3, 0.0, 1e-3], dtype=torch.float64) * (1 + seed)
    kept = {"windows": {row["name"]: row["loss"] + noise * f for row, (f, _) in zip(each, rows, strict=True)}}
    forced = [{"relative_flops": float(i)} for i in range(1, 5)]
    training = {"depth": depths or [4.0, 4.0], "stage": ["exits"] * len(depths or [4.0, 4.0])}
    found = {"own": each[0], "budgets": each[1:], "criteria": [], "forced": forced, "training": training}
    return Result(Path(f"x-{seed}"), found | {"decides": decides, "policy": policy or decides, "steps": 4}, kept)


def small_table(router: float) -> Table:
    losses = {"fixed-2": ("fixed", (2, 1.5)), "fixed-4": ("fixed", (4, 1.0)), "chance": ("chance", (2.5, 1.6))}
    runs = {name: {s: made(kind, row, seed=s) for s in (0, 1)} for name, (kind, row) in losses.items()}
    runs["router"] = {s: made("router", (2.8, router + 0.001 * s), seed=s) for s in (0, 1)}
    return Table(runs)


def test_the_verdict_names_a_fixed_depth_that_wins() -> None:
    loaded = sweep.Sweep(against="fixed-4", budgets=[2.8])
    said = report.make(small_table(1.4), loaded, {}).verdicts
    assert said[0].startswith("router: 30% fewer FLOPs, worse than fixed depth (+0.4005 ± 0.0005)")
    assert "worse than fixed depths at equal FLOPs (+0.1005 ± 0.0005)" in said[0]
    assert "No exits save a quarter of the FLOPs of fixed depth at a loss within one standard error of it." in said
    assert said[-2] == ("No learned exit is below fixed depths, chance and criteria by more than its error: use those.")
    assert said[-1].startswith(
        "At the FLOPs of depth 2.8 (2.80×) fixed depths are better than routers, which are next: -0.10"
    )


def test_the_verdict_names_learned_exits_that_win() -> None:
    loaded = sweep.Sweep(against="fixed-4", budgets=[2.8])
    said = report.make(small_table(0.9), loaded, {}).verdicts
    assert "better than fixed depths at equal FLOPs (-0.3995 ± 0.0005)" in said[0]
    assert "router (router) saves 30% of the FLOPs at no worse loss: -0.0995 ± 0.0005." in said
    assert "Below all others at equal FLOPs, by more than their error: router." in said
    assert said[-1].startswith(
        "At the FLOPs of depth 2.8 (2.80×) routers are better than fixed depths, which are next: -0.39"
    )


def test_where_nobody_left_in_training_the_budgets_are_judged() -> None:
    table = small_table(1.4)
    table.results["gate"] = {s: made("gate", (4, 1.0), (2.4, 1.5), (2.8, 1.3 + 0.001 * s), seed=s) for s in (0, 1)}
    said = report.make(table, sweep.Sweep(against="fixed-4"), {}).verdicts
    assert [line.split(":")[0] for line in said if "fewer FLOPs" in line] == ["router", "gate at 1", "gate at 2"]


def test_a_verdict_says_that_its_opponents_were_not_told() -> None:
    table = small_table(1.4)
    table.results["router"] = {
        s: made("router", (2.8, 1.4), seed=s, policy="words router, told") for s in table.results["router"]
    }
    (said,) = [
        line for line in report.make(table, sweep.Sweep(against="fixed-4"), {}).verdicts if "router: 30%" in line
    ]
    assert "better than depths by chance, untold, (-" in said


def test_only_budgets_that_all_seeds_reach_are_in_the_table() -> None:
    table = small_table(1.4)
    table.results["gate"] = {0: made("gate", (3, 1.2), (2, 1.3), seed=0), 1: made("gate", (3, 1.2), seed=1)}
    entries = [e for e in report.make(table, sweep.Sweep(against="fixed-4"), {}).entries if e.run == "gate"]
    assert [(e.name, e.seeds) for e in entries] == [("own", 2)]


def test_who_comes_first_is_not_decided_on_what_is_reported() -> None:
    table = small_table(0.9)
    for result in table.results["router"].values():
        result.found["own"]["choice"] = 9.0
    (budget,) = report.make(table, sweep.Sweep(against="fixed-4", budgets=[2.8]), {}).budgets
    assert list(budget["loss"]) == ["fixed depths", "depths by chance", "routers"]
    assert budget["loss"]["routers"] < budget["loss"]["fixed depths"]


def test_what_criteria_read_costs_nothing() -> None:
    table = Table({"criterion": {0: made("criterion", (3.2, 1.2))}, "router": {0: made("router", (2.8, 1.1))}})
    (entry,) = [e for e in report.make(table, sweep.Sweep(), {}).entries if e.run == "router"]
    assert entry.criteria is not None and entry.criteria.mean == pytest.approx(-0.1)


def test_a_regime_in_which_depth_does_not_pay_is_called_one() -> None:
    runs = {"fixed-1": {0: made("fixed", (1, 1.0))}, "fixed-4": {0: made("fixed", (4, 1.0))}}
    said = report.make(Table(runs), sweep.Sweep(), {}).verdicts
    assert said[0].startswith("Depth does not pay here, and a saving says little")


@pytest.mark.parametrize(("by", "agrees"), [("loss", "yes"), ("spread", "yes"), ("wobble", "yes"), ("excess", "no")])
def test_claims_are_held_against_numbers(by: str, agrees: str) -> None:
    quiet = {s: made("gate", (3, 1.0 + 0.01 * s), seed=s, depths=[3.0, 3.1, 3.0 + 0.01 * s]) for s in (0, 1, 2)}
    loud = {s: made("gate", (2, 2.0 + 0.1 * s), seed=s, depths=[3.0, 2.0, 3.0 + 0.01 * s]) for s in (0, 1, 2)}
    fixed = {f"fixed-{f}": {s: made("fixed", (f, loss), seed=s) for s in (0, 1, 2)} for f, loss in ((2, 3.0), (3, 1.0))}
    table = Table({"quiet": quiet, "loud": loud, **fixed})
    claim = sweep.Claim("so it is said", worse="loud", better="quiet", by=by)
    (said,) = report.make(table, sweep.Sweep(claims=[claim]), {}).claims
    assert said["agrees"] == agrees
    turned = sweep.Claim("so it is said", worse="quiet", better="loud", by=by)
    (said,) = report.make(table, sweep.Sweep(claims=[turned]), {}).claims
    assert said["agrees"] == {"yes": "no", "no": "yes"}[agrees]


@pytest.mark.parametrize(("times", "agrees"), [(6.2, "within error"), (6.3, "yes"), (1 / 6.3, "no")])
def test_deviations_of_three_seeds_differ_from_sixfold_on(times: float, agrees: str) -> None:
    """F has 39.0 for 5 % with 2 and 2 degrees of freedom, two-sided: a ratio of 6.245."""
    quiet = {s: made("gate", (3, 1.0 + 0.01 * s), seed=s) for s in (0, 1, 2)}
    loud = {s: made("gate", (3, 1.0 + 0.01 * times * s), seed=s) for s in (0, 1, 2)}
    claim = sweep.Claim("it varies", worse="loud", better="quiet", by="spread")
    (said,) = report.make(Table({"quiet": quiet, "loud": loud}), sweep.Sweep(claims=[claim]), {}).claims
    assert said["agrees"] == agrees


def test_claims_compare_the_same_seeds() -> None:
    first = {s: made("gate", (3, 1.0 + s), seed=s) for s in (0, 1, 2)}
    other = {s: made("gate", (3, 1.1 + s + 0.001 * s), seed=s) for s in (1, 2, 3)}
    claim = sweep.Claim("it loses more", worse="other", better="first")
    (said,) = report.make(Table({"first": first, "other": other}), sweep.Sweep(claims=[claim]), {}).claims
    assert said["mean"] == pytest.approx(0.1015) and said["agrees"] == "yes"
    del first[1]
    (said,) = report.make(Table({"first": first, "other": other}), sweep.Sweep(claims=[claim]), {}).claims
    assert said["agrees"] == "too few seeds"


def test_the_report(swept: Swept, capsys: Any) -> None:
    report.write(swept.out, swept.sweep, [0], Console(markup=False, highlight=False))
    printed = capsys.readouterr().out
    read = json.loads((swept.out / "report.json").read_text())
    page = (swept.out / "report.html").read_text()
    for run in RUNS:
        own = found(swept, run)["own"]
        (entry,) = [e for e in read["entries"] if e["run"] == run and e["name"] == "own"]
        assert entry["loss"] == pytest.approx(own["loss"])
        assert re.search(rf"│ {run} +│ {own['loss']:.4f} │ +{own['depth']:.2f} │ {own['relative_flops']:.2f}×", printed)
        assert f"<td>{run}</td>" in page
        assert run in read["runs"]
    assert [claim["agrees"] for claim in read["claims"]][1] == "not run"
    assert "nobody ran this: not run" in printed
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert page.count("<svg") == 2
    assert "µs/token" in page


def test_nothing_to_report(swept: Swept, tmp_path: Path, capsys: Any) -> None:
    report.write(tmp_path, swept.sweep, [0], Console())
    assert capsys.readouterr().out == "Nothing is evaluated yet: there is nothing to report.\n"


def test_what_is_finished_is_not_run_again(swept: Swept) -> None:
    assert run_all(swept.jobs, 2, Console(quiet=True)) == {}
    assert all(job.process is None for job in swept.jobs)
    jobs = sweep.evaluations(swept.sweep, swept.out, [0], [])
    assert [job.name for job in jobs] == [f"evaluation of {run}-0" for run in RUNS]
    assert all(job.finished() for job in jobs)
    model = swept.out / "gate-0" / "model"
    os.utime(model, (time.time() + 100,) * 2)
    assert [job.name for job in jobs if not job.finished()] == ["evaluation of gate-0"]
    os.utime(model, (0, 0))


def test_seeds_are_paired(swept: Swept) -> None:
    first, second = ((swept.out / f"{run}-0" / "metrics.jsonl").read_text().splitlines() for run in ("gate", "fixed-3"))
    assert first[:2] == second[:2]  # of the first stage, which they share
    models = [load(swept.out / f"{run}-0").config for run in ("gate", "fixed-1")]
    assert models[0].seed == models[1].seed


def test_a_folder_of_other_settings_is_refused(swept: Swept) -> None:
    with pytest.raises(BadInput) as error:
        sweep.trainings(swept.sweep, swept.out, [0], [*swept.overrides, "train.rate=1"])
    assert str(error.value) == (
        f"{swept.out / 'trunk-0'} holds a run with other settings: give another --out, or remove it"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no sweep {path}, here or in configs/sweeps/"),
        ("runs: {a: {after: b}}", "{path}: runs.a.after expected a run that stops, got b"),
        ("runs: {a: {}, b: {after: a}}", "{path}: runs.b.after expected a run that stops, got a"),
        ("zzz: 1", "{path}: Key 'zzz' not in 'Sweep' at zzz"),
    ],
)
def test_a_sweep_that_cannot_be_run(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as error:
        sweep.main([str(path)])
    assert str(error.value) == "error: " + message.format(path=path)


@pytest.mark.parametrize(
    ("name", "quick", "count"),
    [
        ("ablation.yaml", False, 1),
        pytest.param("small.yaml", True, 1, marks=pytest.mark.every),
        pytest.param("small.yaml", False, 3, marks=pytest.mark.every),
        pytest.param("ablation.yaml", True, 1, marks=pytest.mark.every),
        pytest.param("ablation.yaml", False, 3, marks=pytest.mark.every),
    ],
)
def test_the_sweeps_that_are_here(name: str, quick: bool, count: int, tmp_path: Path) -> None:
    loaded = sweep.load(name)
    seeds = loaded.seeds[:count]
    jobs = sweep.trainings(loaded, tmp_path, seeds, loaded.quick if quick else [])
    assert len(loaded.seeds) == 3 and len(jobs) == len(loaded.runs) * len(seeds)
    names = {name for name, run in loaded.runs.items() if run.stop is None}
    assert loaded.against in names
    assert {each for claim in loaded.claims for each in (claim.worse, claim.better)} <= names
    assert {run.against for run in loaded.runs.values() if run.against} <= names
    for run in loaded.runs.values():
        if run.after is not None:
            before = loaded.runs[run.after].stop
            assert run.stop is None or (before is not None and run.stop > before)


def job(folder: Path, name: str, script: str, after: str | None = None, weight: float = 1.0) -> Job:
    done = folder / name / "done"
    script = f"import pathlib, time; {script}; pathlib.Path({str(done)!r}).touch()"
    return Job(name, [sys.executable, "-c", script], folder / name, done.exists, lambda: Now(0, 1), after, weight)


def test_jobs_wait_fail_and_are_skipped(tmp_path: Path) -> None:
    log = tmp_path / "log"
    say = f"open({str(log)!r}, 'a').write(%r)"
    jobs = [
        job(tmp_path, "light", say % "l"),
        job(tmp_path, "heavy", say % "h", weight=5),
        job(tmp_path, "next", say % "n", after="trunk", weight=5),
        job(tmp_path, "trunk", say % "t"),
        job(tmp_path, "fails", "print('so'); raise ValueError('bad')"),
        job(tmp_path, "lost", say % "x", after="fails"),
    ]
    failed = run_all(jobs, 1, Console(quiet=True))
    assert log.read_text() == "thnl"
    assert failed["lost"] == "needs fails"
    assert failed["fails"] == f"ValueError: bad (exit status 1; all of it is in {tmp_path / 'fails' / 'log.txt'})"
    assert run_all([each for each in jobs if each.name != "lost"], 1, Console(quiet=True)).keys() == {"fails"}
    assert log.read_text() == "thnl"


def test_an_interrupt_ends_what_runs(tmp_path: Path) -> None:
    long = job(tmp_path, "long", "time.sleep(100)")

    def now() -> Now:
        raise KeyboardInterrupt

    long.now = now
    with pytest.raises(KeyboardInterrupt):
        run_all([long], 1, Console(quiet=True))
    assert the(subprocess.Popen, long.process).returncode == -15


class Forked:
    """In place of `subprocess.Popen`: one of our programs in a copy of this process, which has imported everything."""

    def __init__(self, command: list[str], *, stdout: Any, env: dict[str, str], **options: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.environ.update(env)
                os.dup2(stdout.fileno(), 2)
                {"train": train, "evaluate": evaluate}[Path(command[1]).stem].main(command[2:])
                status = 0
            except BaseException as error:
                os.write(2, f"{error}\n".encode())
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG) if self.returncode is None else (0, 0)
        self.returncode = os.waitstatus_to_exitcode(status) if pid else self.returncode
        return self.returncode


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.every)])
def test_a_whole_sweep_in_processes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], forked: bool
) -> None:
    if forked and not torch.cuda.is_available():  # a copy of a process that trained on one cannot train
        monkeypatch.setattr("examples.adaponderlm.processes.subprocess.Popen", Forked)
    (tmp_path / "text.txt").write_text("".join(f"{i} {WORDS}" for i in range(300)))
    (tmp_path / "mine.yaml").write_text("""
base: [small.yaml]
quick: [train.steps=4, train.batch=2, train.save=4, train.log=2, data.window=32, model.steps=2]
evaluate_quick: [--windows, "4", --choice, "4", --repeats, "1"]
runs:
  fixed-2: {files: [loop.yaml]}
  broken: {files: [loop.yaml], set: [data.validation=nowhere.txt]}
""")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^broken-0 failed: error: there is no file nowhere\.txt \(exit"):
        sweep.main(["mine.yaml", "--quick", "--out", "out", "--text", "text.txt"])
    assert "fixed-2-0: loss" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["entries"][0]["run"] == "fixed-2"
    assert (tmp_path / "out" / "time.json").exists()


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_lm_eval_goes_as_deep_as_the_run(swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    # Nothing is asked here of errors of the scores, 100,000 samples each, and of tasks that are not ours.
    monkeypatch.setattr(lm_eval, "simple_evaluate", partial(lm_eval.simple_evaluate, bootstrap_iters=0))
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.chdir(ROOT / "tests" / "harness_task")
    runs = [str(swept.out / f"{run}-0") for run in ("fixed-1", "router")]
    harness.main([*runs, "--tasks", "adadepth_choice", "adadepth_text", "--include", ".", "--shots", "1"])
    for run, low in (("fixed-1", 1), ("router", 1.0001)):
        scored = found(swept, run)["harness"]
        assert scored.keys() == {"1-shot"}
        for result in scored.values():
            assert 0 <= result["tasks"]["adadepth_choice"]["acc"] <= 1
            assert low <= result["mean_depth"] < 3
    assert found(swept, "fixed-1")["harness"]["1-shot"]["mean_depth"] == 1


@pytest.mark.parametrize("run", ["router", "told", "gate"])
def test_lm_eval_sees_the_losses_of_the_run(swept: Swept, run: str) -> None:
    pytest.importorskip("lm_eval")
    trained = load(swept.out / f"{run}-0")
    ids = held_out(trained.config.data, trained.tokenizer, 4, "test")
    wanted, _ = score_at(trained, own_depths(trained))(ids)
    logits = harness.lm_of(trained, 4)._model_call(ids[:, :-1])
    assert torch.allclose(cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"), wanted, atol=1e-5)


def test_a_report_asks_for_none_of_the_settings_of_its_runs(swept: Swept, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.main([str(swept.out.parent / "mine.yaml"), "--out", str(swept.out), "--report"])
    said = capsys.readouterr().out
    assert all(run in said for run in RUNS) and "gates lose: " in said


def test_other_windows_are_another_evaluation(swept: Swept) -> None:
    (job, *_) = sweep.evaluations(swept.sweep, swept.out, [0], [])
    (other, *_) = sweep.evaluations(swept.sweep, swept.out, [0], ["--windows", "6"])
    assert job.finished() and not other.finished()


def test_rules_of_the_gates_are_those_of_training(swept: Swept) -> None:
    assert isinstance(load(swept.out / "gate-0").model.loop.rule, ad.SurvivalThreshold)


def test_the_line_of_fixed_depths_is_what_nothing_undercuts() -> None:
    places = [(3.0, 1.2), (1.0, 2.0), (2.0, 1.9), (2.0, 1.5), (4.0, 1.1), (4.0, 1.3), (2.5, 1.45)]
    assert html.below(places) == [(1.0, 2.0), (2.0, 1.5), (3.0, 1.2), (4.0, 1.1)]
    assert html.below([(1.0, 1.0), (2.0, 1.0)]) == [(1.0, 1.0)]
