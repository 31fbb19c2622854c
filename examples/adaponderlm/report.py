"""What a sweep says: a table in the terminal, one JSON, one page, and verdicts in words, whoever wins."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table as Printed
from scipy import stats

from .compare import Difference, Point, Result, Table, best_mixture, difference, mean_of, spread

if TYPE_CHECKING:
    from .sweep import Claim, Sweep

COLUMNS = (
    "run",
    "loss",
    "depth",
    "FLOPs",
    "µs/token",
    "− fixed depth",
    "− line of fixed",
    "− chance",
    "− criteria",
)
LEARNED = "gate", "router"


class Entry(NamedTuple):
    """A line of the table: a run as trained or at a budget, over seeds; differences to others at equal FLOPs.

    `judged`: whether verdicts speak of it. They speak of a run as it was trained; if nobody left then, of its budgets.
    """

    run: str
    name: str
    decides: str
    policy: str
    judged: bool
    loss: float
    spread: float | None
    depth: float
    flops: float
    seeds: int
    saved: float | None
    micros: float | None
    fixed: Difference | None
    line: Difference | None
    chance: Difference | None
    criteria: Difference | None

    @property
    def title(self) -> str:
        return self.run if self.name == "own" else f"{self.run} {self.name.removeprefix('own ')}"

    def cells(self) -> tuple[str, ...]:
        """As text, for both tables."""
        loss = f"{self.loss:.4f}" + ("" if self.spread is None else f" ({self.spread:.4f})")
        micros = "" if self.micros is None else f"{self.micros:.1f}"
        against = ("" if each is None else str(each) for each in (self.fixed, self.line, self.chance, self.criteria))
        return self.title, loss, f"{self.depth:.2f}", f"{self.flops:.2f}×", micros, *against


class Report(NamedTuple):
    """All that is said of a sweep."""

    entries: list[Entry]
    budgets: list[dict[str, Any]]
    verdicts: list[str]
    claims: list[dict[str, Any]]


def make(table: Table, sweep: "Sweep", times: dict[str, Any]) -> Report:
    """Compare all runs."""
    against = deepest(table, sweep)
    entries = [entry for name in table.results for entry in _entries(table, sweep, name, against, times)]
    budgets = [] if against is None else [_budget(table, against, depth) for depth in sweep.budgets]
    said = [*_verdicts(entries, table), *_winners(budgets)]
    return Report(entries, budgets, said, [_claim(table, claim) for claim in sweep.claims])


def deepest(table: Table, sweep: "Sweep") -> str | None:
    """The fixed depth that all are held against: the one that is named, or of the deepest the best on other text."""
    if sweep.against in table.results:
        return sweep.against
    own = {name: [r.own for r in table.results[name].values()] for name in table.decided_by("fixed")}
    return max(own, key=lambda name: (round(own[name][0].depth, 6), -own[name][0].choice), default=None)


def _entries(table: Table, sweep: "Sweep", run: str, against: str | None, times: dict[str, Any]) -> Iterator[Entry]:
    results = table.results[run]
    first = next(iter(results.values()))
    against = sweep.runs[run].against or against if run in sweep.runs else against
    fixed = {} if against is None or against == run else {s: r.own for s, r in table.results.get(against, {}).items()}
    decides = first.found["decides"]
    exits = decides != "fixed" and any(r.own.depth < r.found["steps"] for r in results.values())
    for name in _common(results):
        points = {seed: point for seed, result in results.items() for point in result.curve if point.name == name}
        pairs = [(point, fixed[seed]) for seed, point in points.items() if seed in fixed]
        mean, deviation = spread([point.nats for point in points.values()])
        micros = times.get(first.folder.name, {}).get("packed") if name == "own" else None
        yield Entry(
            run=run,
            name=name,
            decides=decides,
            policy=first.found["policy"],
            judged=(name == "own") == (exits or decides == "fixed"),
            loss=mean,
            spread=deviation,
            depth=spread([point.depth for point in points.values()])[0],
            flops=spread([point.flops for point in points.values()])[0],
            seeds=len(points),
            saved=1 - spread([mine.flops / other.flops for mine, other in pairs])[0] if pairs else None,
            micros=None if micros is None else 1e6 * micros,
            fixed=difference(pairs) if pairs else None,
            line=table.against(points, table.fixed) if decides != "fixed" else None,
            chance=table.against(points, table.chance) if decides not in ("fixed", "chance") else None,
            criteria=table.against(points, table.criteria) if decides in LEARNED else None,
        )


def _common(results: dict[int, Result]) -> list[str]:
    """What all seeds reach, by name."""
    each = [[point.name for point in result.curve] for result in results.values()]
    return [name for name in each[0] if all(name in names for names in each)]


def _budget(table: Table, against: str, depth: float) -> dict[str, Any]:
    """What each loses for the FLOPs of fixed depth `depth`, in the order that they have on other text."""
    forced = next(iter(table.results[against].values())).found["forced"]
    first, last = forced[0]["relative_flops"], forced[-1]["relative_flops"]
    flops = first + (last - first) * (depth - 1) / (len(forced) - 1)
    groups = {"fixed depths": table.fixed, "depths by chance": table.chance, "criteria": table.criteria}
    groups |= {"gates": table.gates, "routers": table.routers}
    seeds = sorted(table.results[against])
    found = {name: {seed: best_mixture(points(seed), flops) for seed in seeds} for name, points in groups.items()}
    whole = {name: points for name, each in found.items() if (points := _whole(each))}
    means = {name: sum(point.nats for point in each.values()) / len(each) for name, each in whole.items()}
    order = sorted(means, key=lambda name: sum(point.choice for point in whole[name].values()))
    lead = _lead(whole, order) if len(order) > 1 else None
    return {"depth": depth, "relative_flops": flops, "loss": {name: means[name] for name in order}, "lead": lead}


def _whole(found: dict[int, Point | None]) -> dict[int, Point]:
    """The points of all seeds, or nothing."""
    points = {seed: point for seed, point in found.items() if point is not None}
    return points if len(points) == len(found) else {}


def _lead(found: dict[str, dict[int, Point]], order: list[str]) -> Difference:
    first, second = found[order[0]], found[order[1]]
    return difference([(point, second[seed]) for seed, point in first.items()])


def _winners(budgets: list[dict[str, Any]]) -> Iterator[str]:
    for budget in budgets:
        order, lead = list(budget["loss"]), budget["lead"]
        if lead is None:
            continue
        yield (
            f"At the FLOPs of depth {budget['depth']:g} ({budget['relative_flops']:.2f}×) {order[0]} are {lead.word} "
            f"{order[1]}, which are next: {lead} nats."
        )


def _verdicts(entries: list[Entry], table: Table) -> Iterator[str]:
    """Each learned run against what it has to beat, and whether a quarter of the FLOPs is saved for nothing."""
    for entry in entries:
        if entry.decides in ("fixed", "chance") or not entry.judged or entry.fixed is None:
            continue
        untold = ", untold," if entry.policy.endswith(", told") else ""
        others = {
            "fixed depths at equal FLOPs": entry.line,
            f"depths by chance{untold}": entry.chance,
            f"exit criteria{untold}": entry.criteria,
        }
        said = [f"{each.word} {name} ({each})" for name, each in others.items() if each is not None]
        changed = f"{abs(entry.saved or 0):.0%} {'fewer' if (entry.saved or 0) >= 0 else 'more'} FLOPs"
        yield f"{entry.title}: {changed}, {entry.fixed.word} fixed depth ({entry.fixed}); {'; '.join(said)}."
    yield from _free(entries)
    if table.decided_by(*LEARNED):
        yield _recommended(entries)


def _free(entries: list[Entry]) -> Iterator[str]:
    """What saves a quarter of the FLOPs for nothing; a shallower fixed depth that does says that depth does not pay."""
    against = [(e, e.fixed, e.saved) for e in entries if e.judged and e.fixed is not None and e.saved is not None]
    if not against:
        yield "No fixed depth to hold the others against was trained."
        return
    free = [(e, fixed, saved) for e, fixed, saved in against if saved >= 0.25 and fixed.mean <= fixed.error]
    exits = [each for each in free if each[0].decides != "fixed"]
    if len(free) > len(exits):
        names = ", ".join(f"{e.title} ({fixed})" for e, fixed, _ in free if e.decides == "fixed")
        yield f"Depth does not pay here, and a saving says little: within error of the deepest or better are {names}."
    if not exits:
        yield "No exits save a quarter of the FLOPs of fixed depth at a loss within one standard error of it."
    for e, fixed, saved in exits:
        word = "no worse" if fixed.mean <= 0 else "the same, within one standard error,"
        yield f"{e.title} ({e.policy}) saves {saved:.0%} of the FLOPs at {word} loss: {fixed}."


def _recommended(entries: list[Entry]) -> str:
    """Learned exits if they beat what needs no learning; else what does."""
    learned = [e for e in entries if e.decides in LEARNED and e.line is not None]
    others = [(e, (e.line, e.chance, e.criteria)) for e in learned]
    if won := [e for e, each in others if all(d is None or d.word == "better than" for d in each)]:
        names = ", ".join(e.title for e in won)
        return f"Below all others at equal FLOPs, by more than their error: {names}."
    return "No learned exit is below fixed depths, chance and criteria by more than its error: use those."


def figure(table: Table, run: str, by: str) -> dict[int, float]:
    """One number for each seed of a run; less is better.

    "loss"; "excess", the loss above fixed depths at equal FLOPs, a mean over all budgets; "wobble", how much the mean
    depth changes between two lines of the metrics once tokens leave.
    """
    results = table.results[run]
    if by == "wobble":
        return {seed: _wobble(result.found["training"]) for seed, result in results.items()}
    if by == "loss":
        return {seed: result.own.nats for seed, result in results.items()}
    names = _common(results)
    found = {}
    for seed, result in results.items():
        points = [point for point in result.curve if point.name in (names[1:] or names)]
        lines = [best_mixture(table.fixed(seed), point.flops) for point in points]
        if all(lines):
            found[seed] = sum(p.nats - line.nats for p, line in zip(points, lines, strict=True) if line) / len(points)
    return found


def _wobble(training: dict[str, Any]) -> float:
    last, stages = training["stage"][-1], zip(training["depth"], training["stage"], strict=True)
    depths = [depth for depth, stage in stages if stage == last]
    return sum(abs(b - a) for a, b in pairwise(depths)) / max(1, len(depths) - 1)


def _claim(table: Table, claim: "Claim") -> dict[str, Any]:
    """Whether the figures agree with what a paper says, at 5 %: by a t-test, of "spread" by an F-test."""
    said = {"says": claim.says, "by": claim.by, "worse": claim.worse, "better": claim.better}
    if not {claim.worse, claim.better} <= set(table.results):
        return said | {"agrees": "not run"}
    by = "loss" if claim.by == "spread" else claim.by
    worse, better = figure(table, claim.worse, by), figure(table, claim.better, by)
    seeds = sorted(worse.keys() & better.keys())
    if len(seeds) < 2:
        return said | {"agrees": "too few seeds"}
    (bad, loud), (good, quiet) = (spread([each[seed] for seed in seeds]) for each in (worse, better))
    if claim.by == "spread":
        ratio, free = (loud or 0.0) / max(quiet or 0.0, 1e-12), len(seeds) - 1
        limit = float(stats.f.ppf(0.975, free, free)) ** 0.5
        agrees = "yes" if ratio > limit else "no" if ratio < 1 / limit else "within error"
        return said | {"worse is": loud, "better is": quiet, "ratio": ratio, "limit": limit, "agrees": agrees}
    found = mean_of([worse[seed] - better[seed] for seed in seeds])
    agrees = {"worse than": "yes", "better than": "no"}.get(found.word, "within error")
    return said | {"worse is": bad, "better is": good, **found._asdict(), "agrees": agrees}


def write(out: Path, sweep: "Sweep", seeds: Sequence[int], console: Console) -> None:
    """Print the table, and leave report.json and report.html in `out`."""
    names = [name for name, run in sweep.runs.items() if run.stop is None]
    table = Table.read(out, names, seeds)
    if not table.results:
        console.print("Nothing is evaluated yet: there is nothing to report.")
        return
    path = out / "time.json"
    report = make(table, sweep, json.loads(path.read_text("utf-8")) if path.exists() else {})
    show(console, report)
    (out / "report.json").write_text(json.dumps(as_json(report, table), indent=1), "utf-8")
    from . import html

    (out / "report.html").write_text(html.page(out.name, report, table, sweep), "utf-8")
    console.print(f"\n{out / 'report.json'}, {out / 'report.html'}", soft_wrap=True)


def as_json(report: Report, table: Table) -> dict[str, Any]:
    """The report, and of every run and seed what was found."""
    entries = [entry._asdict() for entry in report.entries]
    for entry in entries:
        entry |= {key: value._asdict() for key, value in entry.items() if isinstance(value, Difference)}
    budgets = [budget | {"lead": budget["lead"] and budget["lead"]._asdict()} for budget in report.budgets]
    runs = {name: {seed: result.found for seed, result in each.items()} for name, each in table.results.items()}
    return {"entries": entries, "budgets": budgets, "verdicts": report.verdicts, "claims": report.claims, "runs": runs}


WIDTH = 150  # of the table


def show(console: Console, report: Report) -> None:
    """In the terminal."""
    printed = Printed(title="Held-out loss, nats per token, at what cost", title_justify="left")
    for i, column in enumerate(COLUMNS):
        printed.add_column(column, justify="right" if i else "left")
    for entry, after in zip(report.entries, [*report.entries[1:], None], strict=True):
        printed.add_row(*entry.cells(), end_section=after is None or after.run != entry.run)
    Console(file=console.file, width=max(console.width, WIDTH)).print(printed)
    for line in report.verdicts:
        console.print(line, soft_wrap=True)
    for claim in report.claims:
        said = f"{claim['says']}: {claim['agrees']} ({claim['worse']} against {claim['better']}, {claim['by']})"
        console.print(said, soft_wrap=True)
