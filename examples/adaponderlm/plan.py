"""Which stage a step of training is in, how deep its tokens go, and how fast weights move."""

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

import adadepth as ad

from .config import Config, Stage, Train


class Turn(NamedTuple):
    """One step of training: its number, from 0, and its stage, `since` steps old of `length`.

    `routed`: whether a router has been fitted by then.
    """

    at: int
    name: str
    stage: Stage
    since: int
    length: int
    routed: bool = False

    @property
    def exits(self) -> bool:
        """Whether gate or router decide."""
        return self.stage.depth == "exits" or (self.stage.depth == "alternate" and self.since % 2 == 1)

    @property
    def full(self) -> bool:
        """Whether every token runs all iterations."""
        return self.stage.depth == "full" or (self.stage.depth == "alternate" and self.since % 2 == 0)


@final
class Plan:
    """All steps of a run, in stages."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.ends: list[int] = []
        share = 0.0
        for stage in config.stages.values():
            share += stage.share
            self.ends.append(round(share * config.train.steps))

    def turn(self, at: int) -> Turn:
        """The step `at`."""
        begin, routed = 0, False
        for end, (name, stage) in zip(self.ends, self.config.stages.items(), strict=True):
            routed = routed or stage.fit
            if at < end:
                return Turn(at, name, stage, at - begin, end - begin, routed)
            begin = end
        raise IndexError(f"step {at} of {self.config.train.steps}")

    def depth(self, turn: Turn, first: int, count: int) -> int | Tensor:
        """How deep rows `first` to `first + count` of a step without exits go.

        Drawn for all rows of the step at once, so that it does not matter which rank has which.
        """
        stage, steps, seed = turn.stage, self.config.model.steps, self.config.seed
        depth: int | Tensor
        if turn.full:
            depth = steps
        elif isinstance(stage.depth, int):
            depth = stage.depth
        elif stage.depth == "random":
            kind = "uniform" if stage.prior == "none" else stage.prior
            depth = ad.random_depth(ad.depth_prior(kind, steps, stage.rate), turn.at, seed)
        else:
            draw = ad.uniform_depths if stage.depth == "uniform" else ad.geometric_depths
            generator = torch.Generator().manual_seed(1_000_003 * seed + turn.at)
            shape = (self.config.train.batch, self.config.data.window)
            depth = draw(shape, steps, stage.mean, generator)[first : first + count]
        return depth


def schedule(train: Train, at: int) -> float:
    """The share of the learning rate: a linear warm-up, then a cosine down to `floor`."""
    warm = max(1, round(train.warmup * train.steps))
    if at < warm:
        return (at + 1) / warm
    turned = math.cos(math.pi * (at - warm) / max(1, train.steps - warm))
    return train.floor + (1 - train.floor) * (1 + turned) / 2
