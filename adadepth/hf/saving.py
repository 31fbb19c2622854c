"""What is written of an adapted model beside its weights, and what is refused when it is read."""

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import CODE, AdaptiveConfig

GATES = "gates.safetensors"
CARD = "README.md"
_CODE = '"""The classes of this model, from the package adadepth."""\n\nfrom adadepth.hf import {0}\n\n__all__ = {1}\n'
_CARD = """---
library_name: transformers
tags: {tags}
---

# {name}, with adaptive depth

{base} whose {layers}, each token as often as it needs: at most {steps} times.
It needs the package adadepth: `pip install 'adadepth[hf] @ git+https://github.com/adadepth/adadepth'`.

```python
import adadepth.hf  # so that transformers knows the model
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({path!r})
out = model(ids)
out.trace.depth  # how often each token ran
```

Gate, rule and update: {pieces}.{others}
"""
# In a card with empty fields, which transformers writes before it uploads a model that has none.
_EMPTY = "This model card has been automatically generated."
_ALIKE = ("model_type", "hidden_size", "num_hidden_layers")


def check_loaded(
    pieces: Mapping[str, Any], missing: Iterable[str], unexpected: Iterable[str], resized: Iterable[Any]
) -> None:
    """Refuse a checkpoint that does not give every weight, or gives others than those of pieces given as None.

    Raises: `ValueError` that names them.
    """
    dropped = tuple(f"loop.{name}." for name, piece in pieces.items() if piece is None)
    unexpected = [name for name in unexpected if not name.startswith(dropped)]
    sizes = [f"{name} of shape {tuple(got)} in place of {tuple(want)}" for name, got, want in resized]
    wrong = {"lacks": sorted(missing), "has no place for": sorted(unexpected), "has": sorted(sizes)}
    if said := [f"{what} {', '.join(names)}" for what, names in wrong.items() if names]:
        raise ValueError(
            f"The checkpoint is of another model: it {'; it '.join(said)}. Load it with the configuration, and the "
            "gate=, rule= and update=, that it was saved with."
        )


def write_gates(loop: nn.Module, config: AdaptiveConfig, path: str | PathLike[str]) -> None:
    """The weights of gate and update, and the configuration."""
    config.save_pretrained(path)
    weights = {name: tensor.contiguous() for name, tensor in loop.state_dict().items()}
    save_file(weights, Path(path) / GATES, metadata={"format": "pt"})


def write_card(config: AdaptiveConfig, path: str | PathLike[str], repository: str | None = None) -> None:
    """The code that `config.json` names, and a model card; a card that is there stays, unless its fields are empty.

    Arguments: `repository`, the name under which users load the model; None: that of the folder.
    """
    folder, tags = Path(path), ["adadepth"]
    names = ("AdaptiveConfig", "AdaptiveForCausalLM")
    (folder / f"{CODE}.py").write_text(_CODE.format(", ".join(names), json.dumps(names)), "utf-8")
    if (folder / CARD).exists():
        if _EMPTY not in (card := (folder / CARD).read_text("utf-8")):
            return
        tags += ModelCard(card).data.get("tags") or []
    name = config.name_or_path or repository or folder.name
    span = config.span
    layers = "layers all run" if span is None else f"layers {span[0]} to {span[1] - 1} run"
    kinds = [piece["class"] for piece in (config.pieces or {}).values() if piece]
    others = sorted({kind.rpartition(".")[0] for kind in kinds if not kind.startswith("adadepth.")})
    (folder / CARD).write_text(
        _CARD.format(
            tags=json.dumps(tags),
            name=Path(name).name,
            base=f"A {config.text_config.model_type} model",
            layers=layers,
            steps=config.steps,
            path=repository or folder.name,
            pieces=", ".join(kind.rpartition(".")[2] for kind in kinds),
            others=f" Import {', '.join(others)} before loading." if others else "",
        ),
        "utf-8",
    )


def read_config(path: str | PathLike[str], base: Any) -> AdaptiveConfig:
    """The configuration beside saved gates, for this base.

    Raises: `ValueError` if there are none, or if they were trained on another.
    """
    if not (Path(path) / GATES).is_file():
        raise ValueError(f"{path} holds no {GATES}. Give load_gates the folder that model.save_gates wrote.")
    config = AdaptiveConfig.from_pretrained(path)
    for name in _ALIKE:
        theirs, ours = getattr(config.text_config, name), getattr(base.config, name)
        if theirs != ours:
            raise ValueError(
                f"The gates were saved from a base of {name}={theirs!r}, got one of {ours!r}. Give load_gates the "
                "model that they were trained on."
            )
    config.text_config = base.config
    return config


def read_gates(loop: nn.Module, path: str | PathLike[str], pieces: Mapping[str, Any]) -> None:
    """Put saved weights into gate and update; `pieces` are those given in place of saved ones.

    Raises: `ValueError` if they are not exactly those that the loop has.
    """
    saved = {f"loop.{name}": weight for name, weight in load_file(Path(path) / GATES).items()}
    own = {f"loop.{name}": weight for name, weight in loop.state_dict().items()}
    check_loaded(pieces, own.keys() - saved.keys(), saved.keys() - own.keys(), _resized(saved, own))
    loop.load_state_dict({name.removeprefix("loop."): saved[name] for name in own})


def _resized(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[Any]:
    return [
        (name, saved[name].shape, own[name].shape)
        for name in sorted(saved.keys() & own.keys())
        if saved[name].shape != own[name].shape
    ]
