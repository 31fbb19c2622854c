"""A run that is done: its model, and who says how deep its tokens go."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import adadepth as ad
from adadepth.diagnostics import Score
from adadepth.hf import AdaptiveForCausalLM
from adadepth.hf.scoring import scorer

from .config import BadInput, Config, Stage, read
from .model import CRITERIA, flops_of
from .routers import Router, Told, router_of, told_of

Depths = Callable[[Tensor], int | Tensor]  # of ids (batch, seq): broadcasts to them


class Trained(NamedTuple):
    """A run in eval mode."""

    folder: Path
    config: Config
    model: AdaptiveForCausalLM
    router: Router | None
    told: Told | None
    tokenizer: PreTrainedTokenizerBase

    @property
    def last(self) -> Stage:
        """The stage that it was trained in last."""
        return list(self.config.stages.values())[-1]

    @property
    def decides(self) -> str:
        """Who says how deep a token goes: "fixed", "chance", a "criterion", a "gate" or a "router"."""
        if (kind := self.config.model.gate.kind) != "none":
            return "criterion" if kind in CRITERIA else "gate"
        if self.last.depth in ("exits", "alternate"):
            return "router"
        return "chance" if self.last.depth in ("uniform", "geometric") else "fixed"

    @property
    def policy(self) -> str:
        """The same in a few words."""
        model, depth = self.config.model, self.last.depth
        names = {
            "criterion": model.gate.kind,
            "gate": f"{model.gate.reads} score, {model.gate.kind} gate",
            "router": f"{model.router.kind} router",
            "chance": str(depth),
        }
        policy = names.get(self.decides, f"depth {depth if isinstance(depth, int) else model.steps}")
        return f"{policy}, told" if model.router.tells else policy

    @property
    def says(self) -> Depths | None:
        """What its tokens are told, as `min_depth`; None: nothing."""
        return None if self.told is None or self.router is None else self.router.kind

    @property
    def flops(self) -> ad.TokenFlops:
        """Of a token, by the loop as it is now."""
        return flops_of(self.model, self.config.model.layers)


def load(folder: Path) -> Trained:
    """A run's model and router. Raises: `BadInput` if it is not done."""
    path = folder / "model"
    if not path.is_dir():
        raise BadInput(f"there is no trained model in {folder}: run train.py to its end")
    config = read([str(folder / "config.yaml")])
    model = AdaptiveForCausalLM.from_pretrained(path).eval()
    router = router_of(config.model.router, config.model.steps, model.base.config.vocab_size)
    told = told_of(config.model.router, model, router)
    weights = {} if router is None else torch.load(path / "router.pt")
    for name, part in (("router", router), ("told", told)):
        if part is not None:
            part.load_state_dict(weights[name])
    return Trained(folder, config, model, router, told, AutoTokenizer.from_pretrained(path))


def own_depths(run: Trained) -> Depths | None:
    """How deep the run goes as it was trained last, where that is said from outside; None where a gate decides."""
    stage, steps = run.last, run.config.model.steps
    if stage.depth in ("exits", "alternate"):
        return run.router
    if stage.depth in ("uniform", "geometric"):
        return drawn(run, str(stage.depth), stage.mean, 1)
    depth = stage.depth if isinstance(stage.depth, int) else steps
    return lambda ids: depth


def drawn(run: Trained, kind: str, mean: float, first: int) -> Depths:
    """By chance, and nobody less than `first`."""
    draw = ad.uniform_depths if kind == "uniform" else ad.geometric_depths
    steps, generator = run.config.model.steps, torch.Generator().manual_seed(run.config.seed)
    return lambda ids: first - 1 + draw(ids.shape, steps - first + 1, mean - first + 1, generator)


def score_at(run: Trained, depths: Depths | None = None, rule: ad.Rule | None = None) -> Score:
    """Losses and depths of tokens that go so deep, or where `depths` is None as gate and rule say."""
    score = scorer(run.model)

    def at_depth(ids: Tensor) -> tuple[Tensor, Tensor]:
        depth = None if depths is None else depths(ids)
        said = depth if depth is None or run.says is None else run.says(ids)
        return score(ids, min_depth=said, max_depth=depth, rule=rule)

    return at_depth
