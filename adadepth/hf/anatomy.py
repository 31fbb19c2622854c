"""Where the parts of a Hugging Face causal language model are called what, and which models are known to work.

Add a line to `TABLE` for another architecture, and a small random model of it to `tests/hf_zoo.py`,
which checks it whole and sliced, cached and not, against the original.
"""

from typing import Any, NamedTuple, final

from torch import nn


@final
class Anatomy(NamedTuple):
    """The names of the backbone in the model, and in the backbone of what a slice of it must know.

    `position` and `dropout` act on the embeddings, where the backbone has them.
    """

    backbone: str = "model"
    layers: str = "layers"
    norm: str = "norm"
    position: str | None = None
    dropout: str | None = None


TABLE = {
    "gpt2": Anatomy("transformer", "h", "ln_f", position="wpe", dropout="drop"),
    "gpt_neox": Anatomy("gpt_neox", norm="final_layer_norm", dropout="emb_dropout"),
    "llama": Anatomy(),
    "mistral": Anatomy(),
    "olmo": Anatomy(),
    "olmo2": Anatomy(),
    "qwen2": Anatomy(),
    "qwen3": Anatomy(),
    "smollm3": Anatomy(),
}

# Their frequencies follow the longest sequence of the batch: a token would depend on the others.
_UNSTEADY = ("dynamic", "longrope")


def anatomy_of(base: nn.Module) -> Anatomy:
    """The anatomy of a causal language model.

    Raises: `ValueError` for an architecture that is not in the table, or a variant that cannot be looped.
    """
    config: Any = getattr(base, "config", None)
    kind = getattr(config, "model_type", None)
    anatomy = TABLE.get(kind) if isinstance(kind, str) else None
    if anatomy is None or base.get_output_embeddings() is None:  # type: ignore[operator]
        raise ValueError(
            f"adapt expected a causal language model with a head, of one of the architectures "
            f"{', '.join(TABLE)}; got {type(base).__name__} of {kind!r}. Load it with AutoModelForCausalLM, adapt it "
            "before peft wraps it, or loop its layers by hand: adadepth.RecurrentWrapper(layers, steps)."
        )
    if unsteady := [kind for kind in _rotary_kinds(config) if kind in _UNSTEADY]:
        raise ValueError(
            f"adapt expected rotary positions that depend on the position alone, got rope_type={unsteady[0]!r}, which "
            "follows the longest sequence of the batch. Choose another, such as 'yarn' or 'linear', in "
            "config.rope_parameters."
        )
    for name, usual in (("add_cross_attention", False), ("is_causal", True)):
        if getattr(config, name, None) not in (usual, None):
            raise ValueError(
                f"adapt expected a decoder in which a token sees itself and what stands before it, got "
                f"config.{name}={getattr(config, name)}. Set it to {usual}."
            )
    return anatomy


def _rotary_kinds(config: Any) -> list[str]:
    """The kinds of rotary embedding that a configuration names, for all layers or each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return [kind for part in each if (kind := part.get("rope_type")) is not None]
