"""Small random Hugging Face models: one of every architecture that `adadepth.hf` knows, and some with windows."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from narrow import the
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import adadepth as ad
from adadepth.hf import AdaptiveForCausalLM, adapt

VOCAB, DIM, LAYERS, WINDOW, STEPS = 37, 16, 4, 3, 3
EOS, PAD = 2, 0
BLOCKS = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}  # bitsandbytes packs weights in blocks of 64

_ENDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD}
_SIZES = _ENDS | {"hidden_size": DIM, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24}
_GROUPED = _SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2}
_MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED}

ZOO: dict[str, Callable[[], Any]] = {
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES),
    "gpt_neox tied, serial": lambda: GPTNeoXConfig(**_SIZES, tie_word_embeddings=True, use_parallel_residual=False),
    "gpt2": lambda: GPT2Config(**_ENDS, n_embd=DIM, n_layer=LAYERS, n_head=2, n_positions=64),
    "llama": lambda: LlamaConfig(**_GROUPED),
    "llama tied": lambda: LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "mistral windows": lambda: MistralConfig(**_GROUPED, sliding_window=WINDOW, head_dim=6),
    "olmo": lambda: OlmoConfig(**_GROUPED, clip_qkv=1.5),
    "olmo2": lambda: Olmo2Config(**_GROUPED),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen2 windows": lambda: Qwen2Config(**_GROUPED, **_WINDOWS),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=6),
    "qwen3 windows": lambda: Qwen3Config(**_GROUPED, **_WINDOWS),
    "smollm3 windows": lambda: SmolLM3Config(**_GROUPED, **_WINDOWS, no_rope_layers=[1, 1, 1, 0]),
}
# Of every family `test_hf_zoo.py` knows whether it is exact; what else there is to see of a model is seen of these.
SOME = ["gpt_neox tied, serial", "gpt2", "llama tied", "mistral windows", "qwen3 windows"]
SPANS = [None, slice(1, 3)]
# Each whole or sliced, and `make test-every` the other way.
SOME_WAYS = [
    pytest.param(name, span, id=f"{name}-{span}", marks=[pytest.mark.every] if (i + j) % 2 == 0 else [])
    for i, name in enumerate(SOME)
    for j, span in enumerate(SPANS)
]

MASK = torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [0] * 7 + [1] * 2])
IDS = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0)) * MASK
LABELS = torch.where(MASK.bool(), IDS, -100)
POSITIONS = (MASK.cumsum(1) - 1).clamp_min(0)


class Above:
    """A rule of one's own: a threshold for each iteration."""

    def __init__(self, taus: list[float]) -> None:
        self.taus = taus

    def __call__(self, scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
        return remaining * (scores[..., -1] >= self.taus[scores.shape[-1] - 1])


class _Norm(nn.RMSNorm):
    """What the models' own norms compute, but in the dtype of their input: theirs round to float32."""


def original(kind: str, dtype: torch.dtype = torch.float64, **sizes: int) -> Any:
    """The model as it is, with weights large enough for tokens to differ; in float64 exact to float64.

    `sizes` replace those of its configuration.
    """
    torch.manual_seed(0)
    config = ZOO[kind]()
    config.update(sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
    std = 0.5 * (DIM / config.hidden_size) ** 0.5
    for name, weight in model.named_parameters():
        scales = weight.dim() == 1 and name.endswith("weight")
        nn.init.normal_(weight, mean=float(scales), std=0.1 if scales else std)
    for parent in list(model.modules()) if dtype is torch.float64 else ():
        for at, norm in parent.named_children():
            if type(norm).__name__.endswith("RMSNorm"):
                exact = _Norm(len(norm.weight), eps=norm.variance_epsilon, dtype=dtype)
                exact.weight = norm.weight
                setattr(parent, at, exact)
            elif type(norm).__name__ == "OlmoLayerNorm":
                setattr(parent, at, nn.LayerNorm(DIM, elementwise_affine=False))
    return model


def spread(
    name: str, layers: slice | None, dtype: torch.dtype = torch.float64, steps: int = STEPS
) -> AdaptiveForCausalLM:
    """An adapted model whose tokens leave at different depths; a copy of the one that is made for all tests."""
    model = deepcopy(_spread(name, None if layers is None else (layers.start, layers.stop), dtype, steps))
    torch.manual_seed(1)
    return model


@cache
def _spread(name: str, span: tuple[int, int] | None, dtype: torch.dtype, steps: int) -> AdaptiveForCausalLM:
    torch.manual_seed(1)
    gate = ad.PerIterationMLPGate(DIM, steps, hidden=8, bias=0.0)
    for weight in gate.parameters():
        nn.init.normal_(weight)
    model = adapt(original(name, dtype), steps, gate, layers=None if span is None else slice(*span))
    nn.init.constant_(the(ad.ReZero, model.loop.update).alpha, 0.4)
    with torch.no_grad():
        scores = model(IDS, attention_mask=MASK).trace.scores[MASK.bool()]
    model.loop.rule = Above(scores.quantile(0.4, 0).tolist())
    return model


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=MASK, **options).logits[MASK.bool()]


def same(loaded: Any, model: Any) -> bool:
    """All weights to the bit, logits within rounding: a kernel may add up otherwise for weights that lie elsewhere."""
    weights, others = loaded.state_dict(), model.state_dict()
    held = {name for name in weights if weights[name].device.type != "meta"}  # the rest is on disk
    return (
        weights.keys() == others.keys()
        and all(torch.equal(weights[name], others[name]) for name in held)
        and near(logits(loaded), logits(model))
    )


def near(got: Tensor, expected: Tensor) -> bool:
    exact = 1e-10 if expected.dtype == torch.float64 else 1e-5
    return bool((got - expected).abs().max() <= exact * expected.abs().max())
