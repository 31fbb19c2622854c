"""Checkpoints that are there whole or not at all, whenever a run is killed, and that fit any number of ranks."""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

PART = ".part"  # what is being written, or removed
MORE = "more.json"


@final
class Checkpoints:
    """The newest `keep` checkpoints of a run, in folders `step-00000100` that all ranks see.

    A folder is written under another name and then renamed, which happens or does not; it is removed the same way.
    Weights and moments have names in it, and are whole or in shards as the ranks hold them: one process, DDP and FSDP2
    read what any of them wrote.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int) -> None:
        self.folder, self.accelerator, self.keep = folder, accelerator, keep

    def steps(self) -> list[int]:
        """The steps of training after which there is a checkpoint, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-????????"))

    def path(self, step: int) -> Path:
        """Where the checkpoint after `step` steps is."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, model: nn.Module, optimiser: Optimizer, more: dict[str, Any]) -> None:
        """Weights, moments and random states of all ranks, and `more`, the first rank's, as JSON."""
        part = self.folder / f"{self.path(step).name}{PART}"
        first = self.accelerator.is_main_process
        if first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        with _alone():
            dcp.save(_weights(model) | _moments(model, optimiser), checkpoint_id=part)
        torch.save(self._random(), part / self._random_name())
        if first:
            (part / MORE).write_text(json.dumps(more), "utf-8")
        self.accelerator.wait_for_everyone()
        if first:
            replace(part, self.path(step))
            for old in self.steps()[: -self.keep]:
                remove(self.path(old))
        self.accelerator.wait_for_everyone()

    def load(self, step: int, model: nn.Module, optimiser: Optimizer, new: tuple[str, ...] = ()) -> dict[str, Any]:
        """Put back what was saved, and return `more`. What begins with one of `new` may be missing there.

        Raises: `ValueError`, in one line, for what was saved of another model.
        """
        path, weights = self.path(step), _weights(model)
        there = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        _check_names(path, weights, there, new)
        moments = _moments_like(model, there)
        with _alone():  # writes into the tensors, of which the weights are the model's own
            dcp.load({name: value for name, value in weights.items() if name in there} | moments, checkpoint_id=path)
        _put_moments(model, optimiser, moments)
        if (random := path / self._random_name()).exists():  # not with more ranks than then
            self._put_random(torch.load(random))
        more: dict[str, Any] = json.loads((path / MORE).read_text("utf-8"))
        return more

    def _random_name(self) -> str:
        return f"random-{self.accelerator.process_index}.pt"

    def _random(self) -> dict[str, Tensor]:
        device = self.accelerator.device
        own = {} if device.type == "cpu" else {"device": torch.get_device_module(device).get_rng_state()}
        return {"cpu": torch.get_rng_state(), **own}

    def _put_random(self, states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if "device" in states and (device := self.accelerator.device).type != "cpu":
            torch.get_device_module(device).set_rng_state(states["device"])


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {f"model.{name}": value for name, value in model.state_dict().items()}


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {weight: name for name, weight in model.named_parameters()}


def _moments(model: nn.Module, optimiser: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state, by name. A weight that has never had a gradient has none."""
    names = _names(model)
    return {
        f"optimiser.{key}.{names[weight]}": value
        for weight, state in optimiser.state.items()
        for key, value in state.items()
    }


def _moments_like(model: nn.Module, there: dict[str, Any]) -> dict[str, Tensor]:
    """Room for the moments that are in a checkpoint, in shards as the weights are."""
    weights = {name: weight.detach() for weight, name in _names(model).items()}
    room = {}
    for saved, about in there.items():
        if saved.startswith("optimiser."):
            weight = weights[saved.split(".", 2)[2]]
            like = about.size == weight.shape
            room[saved] = torch.zeros_like(weight) if like else torch.zeros(about.size, dtype=about.properties.dtype)
    return room


def _put_moments(model: nn.Module, optimiser: Optimizer, moments: dict[str, Tensor]) -> None:
    """Into an optimiser, whose own way it is to know weights by their place in its groups."""
    own, names = optimiser.state_dict(), _names(model)
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    place = {names[weight]: i for i, weight in enumerate(weights)}
    own["state"] = {}
    for saved, value in moments.items():
        _, key, name = saved.split(".", 2)
        own["state"].setdefault(place[name], {})[key] = value
    optimiser.load_state_dict(own)


def _check_names(path: Path, weights: dict[str, Tensor], there: dict[str, Any], new: tuple[str, ...]) -> None:
    saved = {name for name in there if name.startswith("model.")}
    lacks = [n for n in weights if n not in saved and not n.startswith(tuple(f"model.{each}" for each in new))]
    more = sorted(saved - weights.keys())
    other = [name for name in weights if name in saved and there[name].size != weights[name].shape]
    for what, found in (("lacks", lacks), ("has more", more), ("has in another shape", other)):
        if found:
            some = ", ".join(name.removeprefix("model.") for name in found[:3])
            raise ValueError(f"{path} is of another model: it {what}: {some}{', ...' if len(found) > 3 else ''}")


@contextmanager
def _alone() -> Iterator[None]:
    """A single process needs no warning that it is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def remove(path: Path) -> None:
    """A folder, never leaving half of it under its name."""
    gone = path.with_name(f"{path.name}.gone{PART}")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)


def replace(part: Path, path: Path) -> None:
    """A file or folder that is complete takes the place it was written for."""
    for each in [part, *part.rglob("*")]:
        _sync(each)
    if path.is_dir():
        remove(path)
    os.replace(part, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """What was written reaches the disk before its name does, and its name before what stood there is gone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
