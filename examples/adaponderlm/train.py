"""`accelerate launch examples/adaponderlm/train.py --config tiny.yaml [more.yaml] [key.sub=value ...]`: train a model.

Run again, it goes on from the newest checkpoint in `out`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from examples.adaponderlm.config import BadInput, Config, read
from examples.adaponderlm.trainer import Diverged, Trainer

SAYS = "{task.description} {task.completed}/{task.total} {task.fields[now]}"


def arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    parser.add_argument("--config", nargs="+", required=True, metavar="FILE", help="YAML, a path or a name in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values in place of those in the files")
    parsed = parser.parse_intermixed_args(args)
    # `--config a.yaml key=value`: what is no file is a value
    parsed.overrides = [*(each for each in parsed.config if "=" in each), *parsed.overrides]
    parsed.config = [each for each in parsed.config if "=" not in each]
    return parsed


def run(config: Config, console: Console) -> None:
    """Train to the end, under a bar."""
    accelerator = accelerator_of(config)
    trainer = Trainer(config, accelerator)
    accelerator.init_trackers(Path(config.out).name, init_kwargs={})
    columns = TextColumn(SAYS), BarColumn(bar_width=20), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not accelerator.is_main_process) as bar:
        task = bar.add_task(Path(config.out).name, total=trainer.last, completed=trainer.step, now="")
        for line in trainer.steps():
            now = "loss {loss:.4f} depth {depth:.2f} FLOPs {relative_flops:.2f}× {tokens_per_second:,.0f} tokens/s"
            bar.update(task, completed=line["step"], now=now.format(**line), description=line["stage"])
    accelerator.end_training()


def accelerator_of(config: Config) -> Accelerator:
    """What `accelerate launch` was told. Raises: `BadInput` if that is not what runs, or not for this trainer."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # every rank makes its weights: buffers do not survive it
    names, here = config.train.trackers, [str(tracker) for tracker in get_available_trackers()]
    if lacking := [name for name in names if name not in here]:
        raise BadInput(f"there is no tracker {lacking[0]} here, train.trackers may have: {', '.join(here) or 'none'}")
    precision = "no" if config.train.precision == "fp32" else config.train.precision  # YAML reads no as false
    accelerator = Accelerator(mixed_precision=precision, log_with=names or None, project_dir=config.out)
    started, kind = int(os.environ.get("WORLD_SIZE", "1")), accelerator.distributed_type
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and kind != DistributedType.FSDP:
        raise BadInput("accelerate shards on accelerators alone: without one, start it without FSDP")
    if started > accelerator.num_processes:
        raise BadInput(f"{started} processes were started, each by itself: on CPUs give accelerate launch --cpu")
    ours = kind == DistributedType.NO or kind.value.startswith("MULTI_") or accelerator.is_fsdp2
    if not ours:
        raise BadInput(f"expected one process, DDP or FSDP with fsdp_version: 2, got {kind.value}")
    return accelerator


def main(args: Sequence[str] | None = None) -> None:
    """The command line; what cannot be done is refused in one line."""
    parsed = arguments(args)
    try:
        run(read(parsed.config, parsed.overrides), Console())
    except (BadInput, Diverged) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("Stopped. The same command goes on from the newest checkpoint.") from None


if __name__ == "__main__":
    main()
