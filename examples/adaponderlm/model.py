"""A GPT-NeoX (Pythia's architecture), the loop around it, and the pieces in the loop, as a configuration says."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

import adadepth as ad
from adadepth.hf import AdaptiveForCausalLM, adapt

from .config import BadInput, Gate, Model, Shape

# Each of a head: logits of a state.
CRITERIA: dict[str, Callable[[nn.Module], ad.Gate]] = {
    "entropy": ad.EntropyGate,
    "kl": ad.KLGate,
    "confidence": ad.MaxProbGate,
    "margin": ad.MarginGate,
    "convergence": lambda head: ad.ConvergenceGate(),
}


def build(model: Model) -> AdaptiveForCausalLM:
    """The adapted model, new or with pretrained weights.

    New weights: normal of `std`, those that write into the residual stream divided by √(2 · layers · steps), since so
    many add up in it.
    """
    base = scratch(model) if model.pretrained is None else pretrained(model.pretrained)
    gate, rule, update = pieces(model, base)
    layers = None if model.layers == "whole" else slice(None)
    return adapt(base, model.steps, gate, rule, update, layers, check=model.pretrained is not None)


def scratch(model: Model) -> PreTrainedModel:
    """A new GPT-NeoX."""
    base = GPTNeoXForCausalLM(neox(model.shape))
    depth = model.shape.num_hidden_layers * model.steps
    for name, weight in base.named_parameters():
        if weight.dim() == 2:
            writes = name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight"))
            nn.init.normal_(weight, std=model.std / math.sqrt(2 * depth) if writes else model.std)
    nn.init.normal_(base.get_input_embeddings().weight, std=model.embedding_std)
    return base


def neox(shape: Shape) -> GPTNeoXConfig:
    """Pythia's configuration: parallel residual, rotary positions, no tied weights, token 0 at both ends of a text."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": shape.rotary_pct}
    sizes = {name: value for name, value in vars(shape).items() if name != "rotary_pct"}
    return GPTNeoXConfig(**sizes, rope_parameters=rope, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)


def pretrained(name: str) -> PreTrainedModel:
    """A model from a folder or the hub, with its weights.

    Raises: `BadInput` if it is not there.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except OSError as error:
        raise BadInput(f"cannot load the model {name}: {str(error).splitlines()[0]}") from None


def head_of(base: PreTrainedModel, layers: str) -> nn.Module:
    """From a state of the loop to logits: the final norm stands before the head where the loop has none."""
    head = base.get_output_embeddings()
    return head if layers == "whole" else nn.Sequential(base.base_model.final_layer_norm, head)


def flops_of(model: AdaptiveForCausalLM, layers: str) -> ad.TokenFlops:
    """The FLOPs of a token, by the loop as it is now."""
    return ad.TokenFlops.measure(model.loop, model.base.config.hidden_size, [head_of(model.base, layers)])


def pieces(model: Model, base: PreTrainedModel) -> tuple[ad.Gate | None, ad.Rule | None, ad.Update]:
    """Gate, rule and update of the loop."""
    gate = gate_of(model, base)
    return gate, None if gate is None else rule_of(model.gate, model.gate.tau), update_of(model, base)


def gate_of(model: Model, base: PreTrainedModel) -> ad.Gate | None:
    """A gate that learns starts small and open; a criterion reads the model's own predictions."""
    settings, dim = model.gate, base.config.hidden_size
    if settings.kind == "none":
        return None
    if settings.kind in CRITERIA:
        return CRITERIA[settings.kind](head_of(base, model.layers))
    gate: ad.Gate
    if settings.kind == "iteration":
        gate = ad.PerIterationMLPGate(dim, model.steps, settings.hidden, settings.bias)
    else:
        gate = ad.SharedMLPGate(dim, settings.hidden, settings.bias)
    for weight in gate.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=settings.std)
    return gate


def rule_of(gate: Gate, tau: float) -> ad.Rule:
    """Who stays, at a threshold."""
    rule: ad.Rule = ad.Threshold(tau) if gate.reads == "newest" else ad.SurvivalThreshold(tau)
    if gate.late:
        rule = ad.Lookahead(rule)
    return rule if gate.first == 1 else ad.NotBefore(gate.first, rule)


def update_of(model: Model, base: PreTrainedModel) -> ad.Update:
    """The next iteration's input. What a criterion says must not scale it: that would change what it judges."""
    update: ad.Update
    if model.update == "ponder":
        update = ad.Ponder(base.get_input_embeddings(), base.get_output_embeddings())
    else:
        plain: dict[str, Callable[[], ad.Update]]
        plain = {"interpolate": ad.Interpolate, "residual": ad.Residual, "replace": ad.Replace}
        update = plain[model.update]()
    if model.gate.kind in CRITERIA or not model.gate.scales:
        update = ad.Ungated(update)
    elif model.gate.reads == "survival":
        update = ad.SurvivalScaled(update)
    return ad.ReZero(update) if model.rezero else update
