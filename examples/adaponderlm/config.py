"""What a run is made of: dataclasses, read from YAML files and `key.sub=value` on the command line."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIGS = Path(__file__).parent / "configs"


class BadInput(ValueError):
    """What cannot be run; the message is one line for the user."""


@dataclass
class Shape:
    """A GPT-NeoX, in the words of its configuration. The vocabulary is the tokenizer's, filled up to a multiple."""

    hidden_size: int = 64
    intermediate_size: int = 256
    num_hidden_layers: int = 1
    num_attention_heads: int = 4
    max_position_embeddings: int = 2048
    rotary_pct: float = 0.25
    vocab_size: int = 257


@dataclass
class Gate:
    """What scores, and what a score does.

    `kind`: a learned gate ("iteration" has an MLP for each, "shared" one), an exit criterion, or "none". `hidden`:
    units of an MLP, None for 4·dim. `bias`: where a learned gate starts; `std`: of its first weights. `reads`: what
    scales the update, meets the threshold `tau` and is punished: the "newest" score or the product of all, "survival".
    `scales`: whether it scales the update at all. `late`: the score of an iteration decides one iteration later.
    `first`: nobody leaves before that iteration ends.
    """

    kind: Literal["none", "iteration", "shared", "entropy", "kl", "convergence", "confidence", "margin"] = "none"
    hidden: int | None = None
    bias: float = 4.0
    std: float = 0.02
    reads: Literal["newest", "survival"] = "newest"
    scales: bool = True
    tau: float = 1e-4
    late: bool = False
    first: int = 1


@dataclass
class Router:
    """What says depths from the ids alone, once it is fitted: see `routers.py`.

    `kind`: "words", by how much of its word a byte has seen; "window", a small network over the last `window` tokens.
    `mean`: the depth of an average token; `first`: that of the shallowest. `tells`: by an embedding added to its own, a
    token is told what is known of it: how many letters ("words"), or how deep it goes ("window").
    """

    kind: Literal["none", "words", "window"] = "none"
    mean: float = 2.8
    first: int = 2
    window: int = 8
    probed: int = 1024
    tells: bool = False


@dataclass
class Model:
    """The network and the loop around it.

    `pretrained`: weights to go on from, a folder or the name of a model; `shape` is then theirs. `layers`: "whole" is
    the backbone with its final norm, as in the paper; "core" its layers alone, so that the raw residual stream is fed
    back. `rezero`: the update begins behind a scale of 0. `std`, `embedding_std`: of weights made here.
    """

    shape: Shape = field(default_factory=Shape)
    pretrained: str | None = None
    steps: int = 4
    layers: Literal["whole", "core"] = "whole"
    update: Literal["ponder", "interpolate", "residual", "replace"] = "ponder"
    rezero: bool = False
    std: float = 0.02
    embedding_std: float = 0.02
    gate: Gate = field(default_factory=Gate)
    router: Router = field(default_factory=Router)


@dataclass
class Data:
    """Where tokens come from: see `text.py`."""

    source: str = "stdlib"
    field: str = "text"
    split: str = "train"
    validation: str | None = None
    tokenizer: str = "bytes"
    window: int = 128
    stream: bool = False
    cache: str | None = None


@dataclass
class Penalty:
    """`weight` · the mean of the smallest share k, which grows to `k` between two shares of the stage."""

    weight: float = 0.0
    k: float = 0.1
    warmup: tuple[float, float] = (0.0, 0.5)
    over: Literal["all", "live"] = "all"


@dataclass
class Stage:
    """A part of training: `share` of its steps, in which `depth` says how deep tokens go.

    `depth`: "full"; a number; "random", one for all tokens of a step, drawn from `prior`; "uniform" or "geometric", one
    for each token, of mean `mean`; "exits", by gate or router; "alternate", "full" and "exits" in turn. `prior`: in
    steps at full depth, the weights with which the loss of every iteration counts, "none": that of the last alone; in
    steps of random depth, what it is drawn from. `learns`: "gates" keeps the backbone as it is. `gate_rate`: the gates'
    part of the learning rate. `guidance`: the weight with which gates learn, in steps at full depth, whether a later
    iteration gains more than `price` nats. `fit`: whether the router is fitted before the stage begins.
    """

    share: float = 1.0
    depth: int | str = "full"
    mean: float = 3.0
    prior: Literal["none", "uniform", "geometric"] = "none"
    rate: float = 0.1
    learns: Literal["all", "gates"] = "all"
    gate_rate: float = 0.1
    penalty: Penalty = field(default_factory=Penalty)
    guidance: float = 0.0
    price: float = 0.02
    fit: bool = False


@dataclass
class Train:
    """How weights move. `batch`: rows of one step, over all ranks; `micro`: rows that a rank runs at once.

    The gradient is that of the whole batch, but for the penalty: its smallest share is of the rows that all ranks run
    at once. `compile`: steps in which all tokens run as deep, as one graph; those with exits have no fixed shapes.
    `stop`: end after so many steps, for others to `begin` from. `save`, `log`: steps between checkpoints and figures.
    """

    steps: int = 1000
    batch: int = 16
    micro: int | None = None
    rate: float = 3e-3
    warmup: float = 0.05
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.01
    clip: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpointing: bool = False
    compile: bool = False
    stop: int | None = None
    save: int = 200
    keep: int = 2
    log: int = 10
    trackers: list[str] = field(default_factory=list)


@dataclass
class Config:
    """A run. `begin`: the folder of a run whose newest checkpoint this one goes on from, in the middle of training."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    stages: dict[str, Stage] = field(default_factory=dict)
    seed: int = 0
    out: str = "out/run"
    begin: str | None = None


DEFAULTS = OmegaConf.structured(Config)  # merging copies it


def read(files: Sequence[str], overrides: Sequence[str] = ()) -> Config:
    """Files from left to right, then `key.sub=value`; what none says is as in the dataclasses.

    The stages of a file stand in place of those before it; all else is merged.

    Raises: `BadInput`, in one line, for a file that is not there and for what no configuration has.
    """
    merged = DEFAULTS
    for name in files:
        merged = _with_file(merged, name)
    config: Config = OmegaConf.to_object(_with_values(merged, overrides))  # type: ignore[assignment]
    check(config)
    return config


def write(config: Config, path: Path) -> None:
    """All of it, as `read` takes it."""
    OmegaConf.save(OmegaConf.structured(config), path)


def check(config: Config) -> None:
    """Raise: `BadInput` for values that do not go together."""
    for key, least in LEAST.items():
        if (number := attrgetter(key)(config)) is not None and number < least:
            raise BadInput(f"expected {key} of at least {least}, got {number}")
    _check_train(config.train)
    _check_model(config.model)
    if not config.stages:
        raise BadInput("expected stages of training, got none: add a method, such as loop.yaml or adaponder.yaml")
    for name, stage in config.stages.items():
        _check_stage(f"stages.{name}", stage, config.model)
    total = sum(stage.share for stage in config.stages.values())
    if abs(total - 1) > 1e-6:
        raise BadInput(f"expected the shares of all stages to sum to 1, got {total:g}")
    if config.model.router.kind != "none" and not any(stage.fit for stage in config.stages.values()):
        raise BadInput("model.router.kind needs a stage with fit: true, in which it learns what iterations are worth")
    if config.model.router.kind == "words" and config.data.tokenizer != "bytes":
        raise BadInput("model.router.kind=words reads bytes: with another data.tokenizer give model.router.kind=window")
    if config.data.window > config.model.shape.max_position_embeddings and config.model.pretrained is None:
        raise BadInput(
            f"expected data.window of at most the {config.model.shape.max_position_embeddings} positions of the model, "
            f"got {config.data.window}"
        )


LEAST = dict.fromkeys(("train.steps", "train.batch", "train.micro", "train.stop"), 1)
LEAST |= dict.fromkeys(("train.save", "train.keep", "train.log", "data.window", "model.steps"), 1)
LEAST |= dict.fromkeys(("model.router.probed", "model.router.window"), 1)
LEAST |= dict.fromkeys(("seed", "train.warmup", "train.floor", "train.decay"), 0)


def _check_train(train: Train) -> None:
    if train.stop is not None and train.stop > train.steps:
        raise BadInput(f"expected train.stop of at most train.steps={train.steps}, got {train.stop}")
    for key, number in (("rate", train.rate), ("clip", train.clip)):
        if not number > 0:
            raise BadInput(f"expected train.{key} above 0, got {number}")
    if not all(0 <= beta < 1 for beta in train.betas):
        raise BadInput(f"expected train.betas in [0, 1), got {list(train.betas)}")


def _check_model(model: Model) -> None:
    shape = model.shape
    if model.pretrained is None and shape.hidden_size % shape.num_attention_heads:
        raise BadInput(
            f"expected model.shape.hidden_size to be a multiple of num_attention_heads={shape.num_attention_heads}, "
            f"got {shape.hidden_size}"
        )
    if model.gate.kind != "none" and model.router.kind != "none":
        raise BadInput("expected model.gate.kind or model.router.kind to be none: one of them says how deep tokens go")
    depths: list[tuple[str, float]] = [] if model.gate.kind == "none" else [("gate.first", model.gate.first)]
    if model.router.kind != "none":
        depths += [("router.first", model.router.first), ("router.mean", model.router.mean)]
    for key, depth in depths:
        if not 1 <= depth <= model.steps:
            raise BadInput(f"expected model.{key} from 1 to model.steps={model.steps}, got {depth}")


DEPTHS = ("full", "random", "uniform", "geometric", "exits", "alternate")


def _check_stage(name: str, stage: Stage, model: Model) -> None:
    depth = stage.depth
    if isinstance(depth, int) and not 1 <= depth <= model.steps:
        raise BadInput(f"expected {name}.depth from 1 to model.steps={model.steps}, got {depth}")
    if isinstance(depth, str) and depth not in DEPTHS:
        raise BadInput(f"expected {name}.depth to be a number or one of {', '.join(DEPTHS)}, got {depth!r}")
    if depth in ("uniform", "geometric") and not 1 <= stage.mean <= model.steps:
        raise BadInput(f"expected {name}.mean from 1 to model.steps={model.steps}, got {stage.mean}")
    for key, number in (("share", stage.share), ("guidance", stage.guidance), ("penalty.weight", stage.penalty.weight)):
        if not number >= 0:
            raise BadInput(f"expected {name}.{key} of at least 0, got {number}")
    if not 0 < stage.rate < 1:
        raise BadInput(f"expected {name}.rate in (0, 1), got {stage.rate}")
    if not 0 < stage.penalty.k <= 1:
        raise BadInput(f"expected {name}.penalty.k in (0, 1], got {stage.penalty.k}")
    if not 0 <= stage.penalty.warmup[0] <= stage.penalty.warmup[1]:
        raise BadInput(
            f"expected {name}.penalty.warmup to begin at 0 or later and to end after, got {list(stage.penalty.warmup)}"
        )
    if depth in ("exits", "alternate") and model.gate.kind == "none" and model.router.kind == "none":
        raise BadInput(f"{name}.depth={depth} needs model.gate.kind or model.router.kind, both are none")
    if model.layers == "core" and model.update == "ponder":
        raise BadInput("model.update=ponder needs the final norm in the loop: model.layers=whole")
    for key, needs in ((f"{name}.fit", stage.fit), ("model.router.tells", model.router.tells)):
        if needs and model.router.kind == "none":
            raise BadInput(f"{key} needs model.router.kind, which is none")
    learned = model.gate.kind in ("iteration", "shared")
    asked = {"learns": stage.learns == "gates", "guidance": stage.guidance > 0, "penalty": stage.penalty.weight > 0}
    for key, needs in asked.items():
        if needs and not learned:
            raise BadInput(f"{name}.{key} needs a learned gate, got model.gate.kind={model.gate.kind}")
    if stage.guidance > 0 and depth not in ("full", "alternate"):
        raise BadInput(f"{name}.guidance needs losses of all iterations: depth full or alternate, got {depth}")


def _find(name: str) -> Path:
    """A file by its path, or by its name among ours."""
    for path in (Path(name), CONFIGS / name, *sorted(CONFIGS.glob(f"*/{name}"))):
        if path.is_file():
            return path
    raise BadInput(f"there is no configuration {name}, here or in {CONFIGS.name}/")


def _with_file(config: Any, name: str) -> Any:
    """The stages of a file stand in place of those before it; all else is merged."""
    load = cache(partial(OmegaConf.load, _find(name)))
    merged = _merge(config, load, name)
    if "stages" in (own := load()):
        merged.stages = _merge(DEFAULTS, lambda: OmegaConf.create({"stages": own.stages}), name).stages
    return merged


def _with_values(config: Any, values: Sequence[str]) -> Any:
    for text in values:
        if "=" not in text:
            raise BadInput(f"expected key=value after the configuration, got {text!r}")
    try:
        return OmegaConf.merge(config, OmegaConf.from_dotlist([*values]))
    except (OmegaConfBaseException, yaml.YAMLError):  # one after the other, to name the one at fault
        for text in values:
            config = _merge(config, partial(OmegaConf.from_dotlist, [text]), text)
    return config


def _merge(config: Any, more: Callable[[], Any], source: str) -> Any:
    try:
        return OmegaConf.merge(config, more())
    except OmegaConfBaseException as error:
        key = f" at {error.full_key}" if error.full_key else ""
        raise BadInput(f"{source}: {str(error).splitlines()[0]}{key}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{source} is not YAML: {' '.join(str(error).split())}") from None
