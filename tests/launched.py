"""Trainings on two ranks, one after the other: `launch(ACCELERATE.yaml, TRAININGS.json)`.

The ranks are given what `accelerate launch` gives them, and nothing is imported once more. Each training is
`{"sharded": whether by FSDP2, "halts": the row of a step from which on tokens leave at once, or null,
"arguments": those of train.py}`.
"""

import json
import os
import socket
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env

from examples.adaponderlm import routers, train
from examples.adaponderlm.objective import Objective

RANKS = 2
FITTING = 20  # steps: a router is asked to be the same everywhere, not to be good
FSDP = "ACCELERATE_USE_FSDP"


class Sharded(Accelerator):  # type: ignore[misc]
    """FSDP2 on CPUs: accelerate takes it on accelerators alone."""

    def __init__(self, **options: Any) -> None:
        os.environ[FSDP] = "true"
        super().__init__(cpu=True, **options)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # as the launcher was told
        if self.mixed_precision == "bf16":
            self.state.fsdp_plugin.set_mixed_precision("bf16")

    def end_training(self) -> None:
        """Stay in the group of ranks, for what comes next."""


class Copied(Accelerator):  # type: ignore[misc]
    """DDP."""

    def __init__(self, **options: Any) -> None:
        os.environ[FSDP] = "false"
        super().__init__(cpu=True, **options)

    def end_training(self) -> None:
        """The same."""


def halting(depths: Any, first_to_halt: int) -> Any:
    """`Objective._depths`, where some rows leave at once as soon as anyone may."""

    def halted(self: Objective, ids: torch.Tensor, turn: Any, first: int) -> dict[str, Any]:
        given = depths(self, ids, turn, first)
        rows = torch.arange(first, first + len(ids)).unsqueeze(1)
        deep = given.get("max_depth", self.config.model.steps)
        return given | {"max_depth": torch.where(rows < first_to_halt, deep, 1)} if turn.exits else given

    return halted


def settings(file: str) -> dict[str, str]:
    """The variables that `accelerate launch --config_file FILE` sets for its ranks."""
    asked = launch_command_parser().parse_args(["--config_file", file, __file__])
    found: dict[str, str] = prepare_multi_gpu_env(_validate_launch_command(asked)[0])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return found | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}


def launch(file: str, path: str) -> bool:
    """Whether every rank did all trainings."""
    # Without an accelerator, copies of this process, which has imported everything.
    context: Any = get_context("spawn" if torch.cuda.is_available() else "fork")
    variables = settings(file)
    ranks = [context.Process(target=rank, args=(number, variables, path)) for number in range(RANKS)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(600)
        one.kill()
    return all(one.exitcode == 0 for one in ranks)


def rank(number: int, variables: dict[str, str], path: str) -> None:
    """What one of the processes does."""
    os.environ.update(variables | {"RANK": str(number), "LOCAL_RANK": str(number)})
    AcceleratorState._reset_state(reset_partial_state=True)
    run(path)


def run(path: str) -> None:
    torch.set_num_threads(1)
    routers.STEPS = FITTING
    depths = Objective._depths
    for training in json.loads(Path(path).read_text()):
        AcceleratorState._reset_state(reset_partial_state=False)
        train.Accelerator = Sharded if training["sharded"] else Copied  # type: ignore[attr-defined]
        halts = training["halts"]
        Objective._depths = depths if halts is None else halting(depths, halts)  # type: ignore[method-assign]
        train.main(training["arguments"])
