"""`python -m examples.adaponderlm.evaluate out/run`: a trained run under every policy, into evaluation.json.

Nothing is chosen on the windows that are reported: thresholds, prices and who is the best of many are found on the
other half of the text held out. Losses of each window, for paired comparisons, are in windows.pt beside it.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

import adadepth as ad
from adadepth import viz
from adadepth.diagnostics import Measured, Score, measure, oracle
from adadepth.hf import OutOfReach, calibrate
from adadepth.hf.flops import relative
from examples.adaponderlm import analysis
from examples.adaponderlm.config import BadInput
from examples.adaponderlm.model import CRITERIA, head_of, rule_of
from examples.adaponderlm.routers import Router
from examples.adaponderlm.text import held_out
from examples.adaponderlm.trained import Depths, Trained, drawn, load, own_depths, score_at

RESULT, WINDOWS = "evaluation.json", "windows.pt"
SHOWN = 8  # windows of which every token is kept
EARLIEST = 2  # what leaves after one iteration shows others the keys of a bare embedding
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How much is looked at: `windows` reported, `choice` chosen on, `batch` at once, at the mean `depths`."""

    windows: int = 400
    choice: int = 128
    batch: int = 32
    depths: tuple[float, ...] = (2.4, 2.8, 3.2)
    repeats: int = 5


class Evaluation:
    """All that is asked of a run, on windows `(n, window + 1)` to report and others to choose on."""

    def __init__(self, run: Trained, test: Tensor, choice: Tensor, options: Options) -> None:
        self.run, self.options, self.test = run, options, test.split(options.batch)
        self.choice = choice.split(max(1, min(options.batch, len(choice) // 4)))
        self.steps = run.config.model.steps
        self.bytes_per_token = analysis.bytes_per_token(run.tokenizer, test[:, 1:])
        self.windows: dict[str, Tensor] = {}

    def ask(self, name: str, score: Score, **more: Any) -> tuple[Row, Measured]:
        """What a policy loses and costs, by the loop as it is now."""
        measured = measure(score, self.test)
        return self.row(name, measured, choice=measure(score, self.choice).nats, **more), measured

    def row(self, name: str, measured: Measured, **more: Any) -> Row:
        """The figures of a policy; its losses are kept by window."""
        loss = measured.nats
        flops = self.run.flops.count(ad.depth_mask(measured.depth.long(), self.steps))
        self.windows[name] = measured.loss.double().mean(1)
        return {
            "name": name,
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
            "depth": measured.mean_depth,
            "relative_flops": flops.relative,
            "ungated_flops": (flops.total - flops.gate) / flops.one_pass,
        } | more

    def own(self) -> tuple[Row, Measured]:
        """As it was trained last."""
        return self.ask("own", score_at(self.run, own_depths(self.run)))

    def forced(self) -> tuple[list[Row], Row]:
        """Everybody at depth 1, 2, …, and the best of these for each token, chosen by its label."""
        depths = range(1, self.steps + 1)
        asked = [self.ask(f"forced to {d}", score_at(self.run, _held(d))) for d in depths]
        best, better = oracle([measured for _, measured in asked])
        return [row for row, _ in asked], self.row("oracle", best, better=better)

    def budgets(self) -> list[Row]:
        """The run's own gate, router or chance at other mean depths."""
        run, depths = self.run, self.options.depths
        if run.decides == "router" and run.router is not None:
            return [self._aimed(run.router, depth) for depth in depths]
        if run.decides == "chance":
            return [self._at(f"own at {depth:g}", drawn(run, str(run.last.depth), depth, 1)) for depth in depths]
        if run.decides == "fixed":
            return []
        rows = (self._calibrated("own", depth, lambda tau: rule_of(run.config.model.gate, tau)) for depth in depths)
        return [row for row in rows if row is not None]

    def _at(self, name: str, depths: Depths, **more: Any) -> Row:
        """Depths from outside."""
        return self.ask(name, score_at(self.run, depths), **more)[0]

    def _aimed(self, router: Router, mean: float) -> Row:
        """The router with the price at which depths have this mean on the text to choose on."""
        price = router.price.clone()
        router.aim(torch.cat(self.choice)[:, :-1], mean)
        row = self._at(f"own at {mean:g}", router, wanted=mean)
        router.price.copy_(price)
        return row

    def _calibrated(self, name: str, depth: float, rule: Callable[[float], ad.Rule]) -> Row | None:
        """The loop's gate with the threshold of a mean depth; None where it cannot be had."""
        try:
            found = calibrate(self.run.model, self.choice, relative(self.run.model, depth), rule)
        except OutOfReach:
            return None
        return self.ask(f"{name} at {depth:g}", score_at(self.run, rule=found.rule), wanted=depth, tau=found.tau)[0]

    def criteria(self, depths: Sequence[float]) -> list[Row]:
        """Exits by what the model predicts, whatever it was trained with.

        None on weights that are told: what they are told would be a least depth to a gate.
        """
        if self.run.says is not None:
            return []
        head, rows = head_of(self.run.model.base, self.run.config.model.layers), []
        with self._without_exits() as loop:
            for name, make in CRITERIA.items():
                loop.gate = make(head)
                found = (
                    self._calibrated(name, depth, lambda tau: ad.NotBefore(EARLIEST, ad.Threshold(tau)))
                    for depth in depths
                )
                rows += [row | {"kind": name} for row in found if row is not None]
        return rows

    def random(self, depths: Sequence[float]) -> list[Row]:
        """Exits by chance."""
        with self._without_exits():
            return [
                self._at(f"{kind} at {depth:g}", drawn(self.run, kind, depth, EARLIEST), kind=kind)
                for kind in ("uniform", "geometric")
                for depth in depths
            ]

    @contextmanager
    def _without_exits(self) -> Iterator[ad.RecurrentWrapper]:
        """The same weights, every update at its full scale, and nobody leaving by themselves."""
        loop = self.run.model.loop
        before = loop.gate, loop.rule, loop.update
        loop.gate, loop.rule, loop.update = None, None, ad.Ungated(loop.update)
        try:
            yield loop
        finally:
            loop.gate, loop.rule, loop.update = before


@torch.no_grad()
def _held(depth: int) -> Depths:
    """All tokens at one depth."""
    return lambda ids: depth


def time_together(runs: Sequence[Trained], test: Tensor, repeats: int) -> Row:
    """Seconds per token of what each run predicts by itself, of all tokens at all iterations and of live ones alone.

    In one process and in turn, so that a slow moment of the machine meets all; best of `repeats`.
    """
    scores = {run.folder.name: (run.model.loop, score_at(run, own_depths(run))) for run in runs}
    best = {name: dict.fromkeys((False, True), math.inf) for name in scores}
    for _ in range(repeats + 1):  # the first is slower
        for name, (loop, score) in scores.items():
            for skip in (False, True):
                loop.skip, start = skip, time.perf_counter()
                score(test)
                best[name][skip] = min(best[name][skip], time.perf_counter() - start)
            loop.skip = True
    tokens = test[:, 1:].numel()
    return {name: {"dense": each[False] / tokens, "packed": each[True] / tokens} for name, each in best.items()}


def evaluate(run: Trained, options: Options) -> tuple[Row, dict[str, Any]]:
    """Everything about a run as JSON; and losses by window, and of the first windows by token."""
    config, given = run.config, (run.config.data, run.tokenizer)
    test, choice = held_out(*given, options.windows, "test"), held_out(*given, options.choice, "choice")
    if len(choice) < 2:
        raise BadInput(
            f"expected 2 windows or more to choose on, of which thresholds are fitted on one half, got {len(choice)}: "
            "ask for more with --choice, or train on a longer text"
        )
    asked = Evaluation(run, test, choice, options)
    own, measured = asked.own()
    depths = _depths(run, options, own["depth"])
    curve, best = asked.forced()
    result = {
        "run": run.folder.name,
        "seed": config.seed,
        "steps": config.model.steps,
        "decides": run.decides,
        "policy": run.policy,
        "options": asdict(options),
        "text": {"source": config.data.source, "windows": len(test), "bytes_per_token": asked.bytes_per_token},
        "own": own,
        "forced": curve,
        "oracle": best,
        "budgets": asked.budgets(),
        "criteria": asked.criteria(depths),
        "random": asked.random(depths),
        "by_exit": analysis.by_exit(measured),
        "by_kind": analysis.by_kind(run.tokenizer, test[:, :-1], measured),
        "by_frequency": analysis.by_frequency(choice, test[:, :-1], measured),
        "training": analysis.training(run.folder),
        "time": time_together([run], test[: options.batch], options.repeats)[run.folder.name],
        "continuation": _continuation(run, test[0, :64]),
    }
    pieces = [viz.pieces(run.tokenizer.decode, row) for row in test[:SHOWN, :-1]]
    loss, depth = measured.loss[:SHOWN], measured.depth[:SHOWN]
    return result, {"windows": asked.windows, "pieces": pieces, "loss": loss, "depth": depth}


def _continuation(run: Trained, prompt: Tensor) -> Row | None:
    """None for depths by chance, which every token more would draw anew."""
    if run.decides == "chance":
        return None
    depths = own_depths(run)
    return analysis.continuation(run.model, run.tokenizer, prompt, run.says or depths, depths)


def _depths(run: Trained, options: Options, own: float) -> list[float]:
    """At which exits are put on: where the run has exits of its own, at their depth; on full depth, at all budgets."""
    steps = run.config.model.steps
    if run.last.depth in ("full", "random"):
        return [depth for depth in options.depths if EARLIEST <= depth <= steps]
    return [round(own, 2)] if EARLIEST <= own < steps and not isinstance(run.last.depth, int) else []


def write(folder: Path, options: Options) -> Row:
    """Evaluate a run into its folder."""
    result, kept = evaluate(load(folder), options)
    torch.save(kept, folder / WINDOWS)
    part = folder / f"{RESULT}.part"
    part.write_text(json.dumps(result, indent=1), "utf-8")
    part.replace(folder / RESULT)
    return result


def options_of(parsed: argparse.Namespace) -> Options:
    return Options(parsed.windows, parsed.choice, parsed.batch, tuple(parsed.depths), parsed.repeats)


def arguments(args: Sequence[str] | None) -> argparse.Namespace:
    default = Options()
    parser = argparse.ArgumentParser(prog="python -m examples.adaponderlm.evaluate", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="folders of runs that are done")
    parser.add_argument("--windows", type=int, default=default.windows, help="of text held out, to report")
    parser.add_argument("--choice", type=int, default=default.choice, help="of text held out, to choose on")
    parser.add_argument("--batch", type=int, default=default.batch, help="windows at once")
    parser.add_argument("--depths", type=float, nargs="+", default=default.depths, help="budgets, in mean depth")
    parser.add_argument("--repeats", type=int, default=default.repeats, help="of what is timed")
    parser.add_argument("--together", type=Path, metavar="FILE", help="only time all runs, in turn, into this file")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> None:
    """The command line; what cannot be done is refused in one line."""
    parsed = arguments(args)
    options = options_of(parsed)
    try:
        if parsed.together is not None:
            runs = [load(folder) for folder in parsed.runs]
            test = held_out(runs[0].config.data, runs[0].tokenizer, options.batch, "test")
            parsed.together.write_text(json.dumps(time_together(runs, test, options.repeats), indent=1), "utf-8")
            return
        for folder in parsed.runs:
            own = write(folder, options)["own"]
            print(f"{folder}: loss {own['loss']:.4f}, depth {own['depth']:.2f}, {own['relative_flops']:.2f}×")
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
