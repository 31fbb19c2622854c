"""`python -m examples.adaponderlm.sweep small.yaml [--seeds 0 1 2] [key=value ...]`: many runs, judged together.

Every run of a seed has the same initial weights and the same batches in the same order, so that differences are
paired. What is finished is not run again, what was interrupted goes on.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from examples.adaponderlm import evaluate
from examples.adaponderlm.config import CONFIGS, BadInput, Config, read
from examples.adaponderlm.processes import Job, Now, python, run_all
from examples.options import at_least_one

SWEEPS = CONFIGS / "sweeps"


@dataclass
class Claim:
    """What a paper says: that the run `worse` is worse than `better` by one of the figures of `report.py`."""

    says: str
    worse: str
    better: str
    by: str = "loss"


@dataclass
class Run:
    """Configuration `files` after those of the sweep, and `set`, key=value.

    `after`: the run whose newest checkpoint it goes on from. `stop`: end at this share of the steps, for others to go
    on from; such a run is not evaluated. `against`: the fixed depth that it is held against, in place of the sweep's.
    """

    files: list[str] = field(default_factory=list)
    set: list[str] = field(default_factory=list)
    after: str | None = None
    stop: float | None = None
    against: str | None = None


@dataclass
class Sweep:
    """`base` and `set` are for all runs, `quick` what `--quick` sets; `evaluate`, flags of `evaluate.py`.

    `against`: the run of fixed depth that others are held against. `budgets`: the mean depths at whose cost in FLOPs
    all are compared.
    """

    base: list[str] = field(default_factory=list)
    set: list[str] = field(default_factory=list)
    quick: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    evaluate: list[str] = field(default_factory=list)
    evaluate_quick: list[str] = field(default_factory=list)
    against: str | None = None
    budgets: list[float] = field(default_factory=lambda: [2.4, 2.8, 3.2])
    runs: dict[str, Run] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)


def load(name: str) -> Sweep:
    """A sweep by its path, or by its name among ours.

    Raises: `BadInput`, in one line.
    """
    path = next((path for path in (Path(name), SWEEPS / name) if path.is_file()), None)
    if path is None:
        raise BadInput(f"there is no sweep {name}, here or in {SWEEPS.parent.name}/{SWEEPS.name}/")
    try:
        sweep: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Sweep), OmegaConf.load(path)))
    except OmegaConfBaseException as error:
        key = f" at {error.full_key}" if error.full_key else ""
        raise BadInput(f"{path}: {str(error).splitlines()[0]}{key}") from None
    for name, run in sweep.runs.items():
        other = sweep.runs.get(run.after)
        if run.after is not None and (other is None or other.stop is None):
            raise BadInput(f"{path}: runs.{name}.after expected a run that stops, got {run.after}")
    return sweep


def trainings(sweep: Sweep, out: Path, seeds: Sequence[int], overrides: Sequence[str]) -> list[Job]:
    """The training of every run and seed.

    Raises: `BadInput` for a folder that holds a run with other settings.
    """
    jobs = []
    for name, run in sweep.runs.items():
        files, values = [*sweep.base, *run.files], [*sweep.set, *run.set, *overrides]
        config = read(files, values)
        if run.stop is not None:
            values.append(f"train.stop={round(run.stop * config.train.steps)}")
            config.train.stop = round(run.stop * config.train.steps)
        jobs += [_training(sweep, name, out, seed, config, ["--config", *files, *values]) for seed in seeds]
    return jobs


def _training(sweep: Sweep, name: str, out: Path, seed: int, config: Config, words: list[str]) -> Job:
    run, folder, steps = sweep.runs[name], _folder(out, name, seed), config.train.steps
    begin = None if run.after is None else str(_folder(out, run.after, seed))
    config = replace(config, seed=seed, out=str(folder), begin=begin)
    if (path := folder / "config.yaml").exists() and read([str(path)]) != config:
        raise BadInput(f"{folder} holds a run with other settings: give another --out, or remove it")
    last, first = config.train.stop or steps, 0.0 if run.after is None else sweep.runs[run.after].stop or 0.0
    own = [f"seed={seed}", f"out={folder}", *(() if begin is None else [f"begin={begin}"])]
    return Job(
        name=_title(name, seed),
        command=python("train.py", *words, *own),
        folder=folder,
        finished=lambda: is_trained(folder, config),
        now=lambda: _progress(folder, last),
        after=None if run.after is None else _title(run.after, seed),
        weight=(last - first * steps) * _depth(config),
    )


def is_trained(folder: Path, config: Config) -> bool:
    """Whether a run has come to its end."""
    stop = config.train.stop
    if stop is None or stop == config.train.steps:
        return (folder / "model").is_dir()
    return (folder / "checkpoints" / f"step-{stop:08d}").is_dir()


def evaluations(sweep: Sweep, out: Path, seeds: Sequence[int], flags: Sequence[str]) -> list[Job]:
    """The evaluation of every run that has a model."""
    folders = {
        _title(name, seed): _folder(out, name, seed)
        for seed in seeds
        for name, run in sweep.runs.items()
        if run.stop is None
    }
    words = ["--depths", *map(str, sweep.budgets), *sweep.evaluate, *flags]
    options = json.loads(json.dumps(asdict(evaluate.options_of(evaluate.arguments(["", *words])))))
    return [
        Job(
            name=f"evaluation of {title}",
            command=python("evaluate.py", str(folder), *words),
            folder=folder,
            finished=partial(_is_evaluated, folder, options),
            now=partial(_verdict, folder),
        )
        for title, folder in folders.items()
        if (folder / "model").is_dir()
    ]


def timing(jobs: Sequence[Job], out: Path, flags: Sequence[str]) -> Job:
    """All runs of one seed in turn, in one process."""
    folders, file = [job.folder for job in jobs], out / "time.json"
    return Job(
        name="time per token",
        command=python("evaluate.py", *map(str, folders), "--together", str(file), *flags),
        folder=out,
        finished=lambda: file.exists() and all(_is_newer(file, folder / "model") for folder in folders),
        now=lambda: Now(int(file.exists()), 1),
    )


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / _title(name, seed)


def _title(name: str, seed: int) -> str:
    return f"{name}-{seed}"


def _depth(config: Config) -> float:
    """About how deep its steps are."""
    depths = ((stage.share, stage.depth) for stage in config.stages.values())
    return sum(share * (depth if isinstance(depth, int) else config.model.steps) for share, depth in depths)


def _progress(folder: Path, last: int) -> Now:
    """What the last line of the metrics says."""
    try:
        line = json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    except (OSError, IndexError, ValueError):  # not yet, or not all of it
        return Now(0, last)
    return Now(line["step"], last, f"loss {line['loss']:.4f} depth {line['depth']:.2f} {line['relative_flops']:.2f}×")


def _verdict(folder: Path) -> Now:
    try:
        own = json.loads((folder / "evaluation.json").read_text("utf-8"))["own"]
    except (OSError, ValueError, KeyError):
        return Now(0, 1)
    return Now(1, 1, f"held-out loss {own['loss']:.4f} depth {own['depth']:.2f} {own['relative_flops']:.2f}×")


def _is_evaluated(folder: Path, options: dict[str, Any]) -> bool:
    """Whether the model has been looked at as it is to be."""
    path = folder / "evaluation.json"
    return _is_newer(path, folder / "model") and bool(json.loads(path.read_text("utf-8")).get("options") == options)


def _is_newer(path: Path, than: Path) -> bool:
    return path.exists() and path.stat().st_mtime >= than.stat().st_mtime


def arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.adaponderlm.sweep", description=__doc__)
    parser.add_argument("sweep", metavar="FILE", help="YAML, a path or a name in configs/sweeps/")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="in place of those of the sweep")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="runs at a time, a thread each")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for all runs (default: out/NAME, out/NAME-quick)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="in place of the standard library")
    parser.add_argument("--report", action="store_true", help="train and evaluate nothing: report what there is")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs")
    parsed = parser.parse_intermixed_args(args)
    at_least_one({"--processes": parsed.processes})
    return parsed


def run(parsed: argparse.Namespace, console: Console) -> None:
    """Train, evaluate, report."""
    from examples.adaponderlm import report

    sweep = load(parsed.sweep)
    out = parsed.out or Path("out") / (Path(parsed.sweep).stem + ("-quick" if parsed.quick else ""))
    seeds = sweep.seeds if parsed.seeds is None else parsed.seeds
    values = list(sweep.quick) if parsed.quick else []
    values += [f"data.source={','.join(parsed.text)}"] if parsed.text else []
    failed: dict[str, str] = {}
    if not parsed.report:
        jobs = trainings(sweep, out, seeds, [*values, *parsed.overrides])
        failed = run_all(jobs, parsed.processes, console)
        flags = sweep.evaluate_quick if parsed.quick else ()
        jobs = evaluations(sweep, out, seeds, flags)
        failed |= run_all(jobs, parsed.processes, console)
        if first := [job for job in jobs if job.name.endswith(f"-{seeds[0]}") and job.finished()]:
            failed |= run_all([timing(first, out, flags)], 1, console)
    report.write(out, sweep, seeds, console)
    if failed:
        raise SystemExit("\n".join(f"{name} failed: {said}" for name, said in failed.items()))


def main(args: Sequence[str] | None = None) -> None:
    """The command line; what cannot be done is refused in one line."""
    try:
        run(arguments(args), Console(markup=False, emoji=False, highlight=False))
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("Stopped. The same command goes on from here.") from None


if __name__ == "__main__":
    main()
