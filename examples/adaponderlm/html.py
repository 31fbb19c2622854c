"""The same as one page that needs nothing else, with pictures."""

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

import torch

from adadepth import viz

from .compare import Result, Table, spread
from .report import COLUMNS, LEARNED, Report

if TYPE_CHECKING:
    from .sweep import Sweep

SHOWN = 6  # windows in the heat map
Curve = tuple[list[float], list[float]]


def page(title: str, report: Report, table: Table, sweep: "Sweep") -> str:
    """All of it."""
    sections = [
        ("Verdict", "".join(f"<p>{escape(line)}</p>" for line in report.verdicts)),
        ("Held-out loss, nats per token, at what cost", _entries(report)),
        ("Loss against relative FLOPs", viz.svg(_frontier(report, table))),
        ("At equal FLOPs", _budgets(report)),
        *([("What the papers say", _claims(report))] if report.claims else []),
        ("Loss by exit", _by_exit(table)),
        *_groups(table),
        ("Training", viz.svg(viz.plot_curves(_training(table), marks=None))),
        ("lm-eval", _harness(table)),
        *_texts(report, table),
    ]
    return viz.page(f"Adaptive depth: {title}", *((name, html) for name, html in sections if html))


def _entries(report: Report) -> str:
    said = (
        "Means over seeds, the deviation of the loss over seeds in brackets. FLOPs are in passes of the model with one "
        "iteration. Differences are nats more than: fixed depth, the deepest that was trained alike, told the same; "
        "line of fixed, depths each trained as such, told or not, or the best mixture of two of them at equal FLOPs; "
        "chance, uniform and geometric depths trained in; criteria, the best exit criterion, trained in or put on "
        "afterwards, what it reads taken to cost nothing. Chance and criteria are never told. ± one standard error."
    )
    policies = "; ".join(f"{e.run}: {e.policy}" for e in report.entries if e.name == "own")
    table = viz.table(COLUMNS, [entry.cells() for entry in report.entries])
    return f"{table}<p>Who says how deep a token goes: {escape(policies)}.</p><p>{said}</p>"


def _frontier(report: Report, table: Table) -> Any:
    """Everything in one plot: as trained, points; what can be tuned afterwards, lines."""
    points = {e.run: (e.flops, e.loss) for e in report.entries if e.name == "own"}
    exits = [each for name, each in table.results.items() if name not in table.decided_by("fixed")]
    if oracles := [_mean_of(each, lambda r: r.found["oracle"]) for each in exits]:
        points["best oracle"] = min(oracles, key=lambda place: place[1])
    fixed = [(e.flops, e.loss) for e in report.entries if e.decides == "fixed"]
    lines: dict[str, Curve] = {"best fixed depths, trained as such": _curve(below(fixed))} if fixed else {}
    for name in table.decided_by("chance", "criterion", *LEARNED):
        own = sorted((e.flops, e.loss) for e in report.entries if e.run == name)
        if len(own) > 1:
            lines[name] = _curve(own)
    best = _criteria(table)
    return viz.plot_frontier(points, lines | best, y="held-out loss, nats per token")


def below(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (FLOPs, loss) those that no other, and no mixture of two others, undercuts."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(places):
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _criteria(table: Table) -> dict[str, Curve]:
    """On the deepest fixed weights, the two criteria that lose least."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name in table.decided_by("fixed"):
        each = table.results[name]
        for i, row in enumerate(next(iter(each.values())).found["criteria"]):
            if all(len(result.found["criteria"]) > i for result in each.values()):
                place = _mean_of(each, lambda r, i=i: r.found["criteria"][i])
                found.setdefault(f"{row['kind']} on {name}", []).append(place)
    kept = sorted(found, key=lambda name: min(loss for _, loss in found[name]))[:2]
    return {name: _curve(sorted(found[name])) for name in kept}


def _mean_of(each: dict[int, Result], row: Any) -> tuple[float, float]:
    rows = [row(result) for result in each.values()]
    return spread([r["relative_flops"] for r in rows])[0], spread([r["loss"] for r in rows])[0]


def _curve(places: list[tuple[float, float]]) -> Curve:
    return [x for x, _ in places], [y for _, y in places]


def _budgets(report: Report) -> str:
    names = list(dict.fromkeys(name for budget in report.budgets for name in budget["loss"]))
    heads = [f"depth {budget['depth']:g}, {budget['relative_flops']:.2f}×" for budget in report.budgets]
    rows = [[name, *(f"{b['loss'][name]:.4f}" if name in b["loss"] else "–" for b in report.budgets)] for name in names]
    return viz.table(["for the FLOPs of", *heads], rows) if rows else ""


def _claims(report: Report) -> str:
    columns = "claim", "measured by", "this", "against", "difference", "agrees?"
    rows = []
    for claim in report.claims:
        this, other = (f"{claim[key]}" + (f": {claim[n]:.4f}" if n in claim else "") for key, n in _CLAIM)
        more = f"{claim['mean']:+.4f} ± {claim['error']:.4f}" if "mean" in claim else "–"
        more = f"{claim['ratio']:.1f} times; {claim['limit']:.1f} is chance" if "ratio" in claim else more
        rows.append((claim["says"], claim["by"], this, other, more, claim["agrees"]))
    return viz.table(columns, rows)


_CLAIM = ("worse", "worse is"), ("better", "better is")


def _by_exit(table: Table) -> str:
    """Share and loss of those that leave after each iteration, over seeds."""
    rows = []
    for name in table.decided_by("chance", "criterion", *LEARNED):
        each = table.results[name].values()
        steps = next(iter(each)).found["steps"]
        cells = []
        for depth in range(1, steps + 1):
            found = [row for result in each for row in result.found["by_exit"] if row["depth"] == depth]
            share = sum(row["share"] for row in found) / len(each)
            loss = sum(row["share"] * row["loss"] for row in found) / max(1e-12, share * len(each))
            cells.append(f"{share:.1%}: {loss:.3f}" if found else "–")
        rows.append([name, *cells])
    if not rows:
        return ""
    columns = ["run", *(f"after {depth}" for depth in range(1, len(rows[0])))]
    return viz.table(columns, rows) + "<p>Share of tokens that leave there, and their mean loss.</p>"


def _groups(table: Table) -> Iterator[tuple[str, str]]:
    """Depth and loss by kind and by frequency of the token, of the first seed."""
    names = table.decided_by("criterion", *LEARNED)
    for key, heading in (("by_kind", "Depth by kind of token"), ("by_frequency", "Depth by frequency of token")):
        firsts = {name: next(iter(table.results[name].values())).found[key] for name in names}
        found = {name: {row["name"]: row for row in rows} for name, rows in firsts.items()}
        if not found:
            return
        first = next(iter(found.values()))
        rows = [
            [kind, f"{row['share']:.1%}", *(_depth(found[name].get(kind)) for name in names)]
            for kind, row in first.items()
        ]
        said = "<p>Mean depth and, in brackets, the mean loss of the token after it. First seed.</p>"
        yield heading, viz.table(["token", "share", *names], rows) + said


def _depth(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['depth']:.2f} ({row['loss']:.3f})"


def _training(table: Table) -> dict[str, dict[str, Curve]]:
    """Loss, depth and gates' scores over training, of the first seed."""
    panels: dict[str, dict[str, Curve]] = {"loss, nats": {}, "mean depth": {}}
    scores: dict[str, Curve] = {}
    for name, each in table.results.items():
        found = next(iter(each.values())).found
        columns = found["training"]
        panels["loss, nats"][name] = columns["step"], columns["loss"]
        if found["decides"] != "fixed":
            panels["mean depth"][name] = columns["step"], columns["depth"]
        if found["decides"] == "gate":
            mean = [sum(score) / len(score) for score in columns["scores"]]
            scores[name] = columns["step"], mean
    full = {"mean score of gates": scores} if scores else {}
    return {title: curves for title, curves in (panels | full).items() if curves}


def _harness(table: Table) -> str:
    """What `harness.py` found, of every run and seed that was asked."""
    rows = [
        [result.folder.name, shots, f"{found['mean_depth']:.2f}", task, name, float(value)]
        for each in table.results.values()
        for result in each.values()
        for shots, found in result.found.get("harness", {}).items()
        for task, values in found["tasks"].items()
        for name, value in values.items()
        if not name.endswith("stderr") and name != "sample_len"
    ]
    return viz.table(("run", "examples", "mean depth", "task", "figure", "value"), rows) if rows else ""


def _texts(report: Report, table: Table) -> Iterator[tuple[str, str]]:
    """A passage held out, and one written by the model, of the learned run that loses least."""
    own = [e for e in report.entries if e.name == "own" and e.decides in LEARNED] or [
        e for e in report.entries if e.name == "own" and e.decides != "fixed"
    ]
    if not own:
        return
    best = min(own, key=lambda e: e.loss if e.line is None else e.line.mean)
    result = next(iter(table.results[best.run].values()))
    steps, kept, text = result.found["steps"], result.kept, result.found["continuation"]
    picture = viz.heat_map(kept["pieces"][:SHOWN], kept["depth"][:SHOWN], steps, nll=kept["loss"][:SHOWN])
    yield f"A passage, by {best.run}", "<p>A token’s depth is that at which it predicts the next one.</p>" + picture
    if text is not None:
        written = viz.heat_map(text["tokens"], torch.tensor(text["depth"]), steps)
        said = f"<p>The first {text['prompt']} tokens are given, each of the others is the likeliest.</p>"
        yield f"What {best.run} writes", said + written
