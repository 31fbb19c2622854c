"""Trainings on two ranks, one after the other: `accelerate launch ... tests/launched.py TRAININGS.json`.

Each is `{"sharded": whether by FSDP2, "halts": the row of a step from which on tokens leave at once, or null,
"arguments": those of train.py}`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState

from examples.adaponderlm import routers, train
from examples.adaponderlm.objective import Objective

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


def main(path: str) -> None:
    torch.set_num_threads(1)
    routers.STEPS = FITTING
    depths = Objective._depths
    for training in json.loads(Path(path).read_text()):
        AcceleratorState._reset_state(reset_partial_state=False)
        train.Accelerator = Sharded if training["sharded"] else Copied  # type: ignore[attr-defined]
        halts = training["halts"]
        Objective._depths = depths if halts is None else halting(depths, halts)  # type: ignore[method-assign]
        train.main(training["arguments"])


if __name__ == "__main__":
    main(sys.argv[1])
