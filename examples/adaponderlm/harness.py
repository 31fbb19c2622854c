"""`python -m examples.adaponderlm.harness out/run`: lm-eval's tasks on a run, zero- and few-shot, as deep as it goes.

The scores join the run's evaluation.json, beside the mean depth that they took.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from examples.adaponderlm.config import BadInput
from examples.adaponderlm.evaluate import RESULT
from examples.adaponderlm.trained import Trained, load, own_depths

# The paper's, by lm-eval's names.
TASKS = (
    "lambada_openai",
    "lambada_standard",
    "piqa",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "sciq",
    "hellaswag",
    "race",
)


def run_tasks(
    run: Trained,
    tasks: Sequence[str] = TASKS,
    shots: Sequence[int] = (0, 5),
    include: str | None = None,
    limit: int | None = None,
    batch: int = 8,
) -> dict[str, Any]:
    """By number of examples in the prompt: each task's scores, and what depth they took.

    Arguments: `include`, a folder of tasks beside lm-eval's; `limit`, so many questions of each.
    Raises: `ImportError` without lm-eval; `BadInput` for a run whose depths are drawn by chance, and for tasks that
    cannot be had.
    """
    if run.decides == "chance":
        raise BadInput(f"{run.folder} draws depths by chance, for which a score means nothing")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    if lost := [task for task in tasks if task not in manager.all_tasks]:
        raise BadInput(f"lm-eval has no task {', '.join(lost)}")
    found: dict[str, Any] = {}
    for count in shots:
        model = lm_of(run, batch)
        try:
            done = simple_evaluate(
                model, tasks=list(tasks), num_fewshot=count, limit=limit, task_manager=manager, log_samples=False
            )
        except (OSError, ConnectionError) as error:
            raise BadInput(f"the data of the tasks cannot be had: {str(error).splitlines()[0]}") from None
        info = model.get_model_info()
        cost = {name: info[name] for name in ("mean_depth", "relative_flops", "depth_tokens")}
        found[f"{count}-shot"] = {"tasks": {name: _numbers(row) for name, row in done["results"].items()}, **cost}
    return found


def lm_of(run: Trained, batch: int) -> Any:
    """The run as lm-eval takes a model, on a GPU if there is one."""
    from adadepth.hf.harness import AdaptiveLM

    for part in (run.model, run.router, run.told):
        if part is not None:
            part.to("cuda" if torch.cuda.is_available() else "cpu")
    depth = own_depths(run)
    return AdaptiveLM(
        run.model, min_depth=run.says or depth, max_depth=depth, tokenizer=run.tokenizer, batch_size=batch
    )


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name.removesuffix(",none"): value for name, value in row.items() if isinstance(value, int | float)}


def write(folder: Path, found: dict[str, Any]) -> None:
    """Into the run's evaluation, which is made first."""
    path = folder / RESULT
    if not path.exists():
        raise BadInput(f"there is no {path}: run evaluate.py first")
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"harness": found}, indent=1), "utf-8")
    part.replace(path)


def main(args: Sequence[str] | None = None) -> None:
    """The command line; what cannot be done is refused in one line."""
    parser = argparse.ArgumentParser(prog="python -m examples.adaponderlm.harness", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="folders of runs that are evaluated")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="by lm-eval's names (default: the paper's)")
    parser.add_argument("--shots", type=int, nargs="+", default=(0, 5), help="examples in the prompt")
    parser.add_argument("--include", metavar="DIR", help="tasks of your own")
    parser.add_argument("--limit", type=int, help="so many questions of each task")
    parser.add_argument("--batch", type=int, default=8, help="texts at once")
    parsed = parser.parse_args(args)
    try:
        for folder in parsed.runs:
            found = run_tasks(load(folder), parsed.tasks, parsed.shots, parsed.include, parsed.limit, parsed.batch)
            write(folder, found)
            for shots, result in found.items():
                print(f"{folder}, {shots}, mean depth {result['mean_depth']:.2f}: {json.dumps(result['tasks'])}")
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
