"""Tiny random models of every causal language model class that transformers knows."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

# What a configuration takes of these, under this name or under one that its attribute_map leads here.
SIZES: dict[str, Any] = {
    "vocab_size": 37, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 16, "num_hidden_layers": 4, "intermediate_size": 24, "max_position_embeddings": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    # Encoders and decoders.
    "encoder_layers": 4, "num_encoder_layers": 4, "decoder_layers": 4, "num_decoder_layers": 4,
    "encoder_attention_heads": 2, "num_encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "num_decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "ffn_dim": 24, "dff": 24,
    "d_inner": 24, "dim_ff": 24, "feed_forward_size": 24, "embedding_size": 16,
    "input_embedding_size": 16, "output_embedding_size": 16, "is_decoder": True, "rotary_dim": 4,
    # Windows.
    "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 3, "sliding_window_size": 3, "window_size": 3,
    "attention_window_size": 3, "attention_chunk_size": 3, "local_attention": 6,
    # Mixtures of experts.
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "moe_top_k": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, "shared_intermediate_size": 12,
    "shared_experts_intermediate_size": 12, "moe_shared_expert_intermediate_size": 12, "expert_ffn_hidden_size": 12,
    "dense_intermediate_size": 24, "ffn_hidden_size": 24, "intermediate_size_mlp": 24, "router_hidden_size": 8,
    # Latent and indexed attention.
    "q_lora_rank": 12, "kv_lora_rank": 12, "o_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 6, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2,
    # Recurrences.
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4, "mamba_n_heads": 4, "mamba_num_heads": 4, "mamba_head_dim": 8,
    "mamba_d_ssm": 32, "mamba_d_state": 8, "ssm_state_size": 8, "state_size": 8, "n_groups": 1, "mamba_chunk_size": 4,
    "chunk_size": 4,
    # Others of a few models.
    "unpadded_vocab_size": 37, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "d_rel": 4, "rel_extent": 8, "n_layers_per_attn_res_block": 1, "adapter_in_dim": 16, "adapter_input_size": 16,
    "adapter_out_dim": 16, "out_hidden_size": 16, "text_hidden_size": 16, "hidden_size_global": 16,
    "vocab_size_per_layer_input": 37, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
    "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "lm_head_multiplier": 0.5,
}  # fmt: skip
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
OVERRIDES: dict[str, dict[str, Any]] = {
    # Windows, recurrences, and their order.
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"use_cache": False, "encoder_hash_byte_group_vocab": 50, "local_attention_window_len": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": _WINDOWS,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "mellum": _WINDOWS,
    "ministral": _WINDOWS,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4},
    "reformer": {"attn_layers": ["local", "lsh"] * 2, "axial_pos_embds": False, "attention_head_size": 8},
    "xlstm": {"num_heads": 2, "qk_dim_factor": 4.0, "v_dim_factor": 4.0, "chunk_size": 64},
    "zamba": {"layers_block_type": ["linear_attention"] * 2 + ["hybrid"] * 2, "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 4},
    # Heads and positions.
    "cohere_compass_text": {
        **_WINDOWS,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "cpmant": {"dim_head": 8, "position_bias_num_buckets": 8, "position_bias_max_distance": 64},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 12, "swa_kv_lora_rank": 12,
        "swa_head_dim": 8, "swa_qk_nope_head_dim": 4, "swa_v_head_dim": 6,
    },
    "dots3_note_vision_encoder": {"num_hidden_layers": 42},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "helium": {"head_dim": 4},
    "minicpm3": {"dim_model_base": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_block_size": 2, "index_topk_blocks": 2,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 2, "hc_lowrank": 4,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8, "pronunciation_vocab_size": 9, "shape_embed_dim": 8, "shape_vocab_size": 9,
    },
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    # Layers that are shared or run again, experts.
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "inkling2_loop_text": {"loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_gate_rank": 4},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
FLOAT32 = {"xglm": "casts the least float64 to float32"}  # those that do not run in float64
_AUDIO = "reads audio codes in several codebooks; from_config wants its decoder's configuration"
UNBUILDABLE: dict[str, str] = {
    "adadepth": "is no family of its own; the name is there once adadepth.hf is imported",
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "needs the embeddings and the keys and values of the model it assists",
    "gemma4_unified_assistant": "needs the embeddings and the keys and values of the model it assists",
    "musicgen": _AUDIO,
    "musicgen_melody": _AUDIO,
}


def _config(cls: type[PreTrainedConfig], base: dict[str, Any] | None = None, **more: Any) -> PreTrainedConfig:
    """What of SIZES the class takes, its OVERRIDES, and its configurations within."""
    names = {field.name for field in dataclasses.fields(cls)}
    sizes = dict(SIZES)
    if "kv_lora_rank" in names:
        sizes |= {"num_key_value_heads": 4, "head_dim": 4}
    elif not names & {"num_key_value_heads", "head_dim", "num_kv_heads"}:
        sizes |= {"num_attention_heads": 2}
    canonical = {at: of for of, at in cls.attribute_map.items() if of in sizes}
    given = {name: sizes[canonical.get(name, name)] for name in names if canonical.get(name, name) in sizes}
    more = OVERRIDES.get(cls.model_type, {}) | more
    for key, spec in (cls.sub_configs_defaults or {}).items():
        if not spec.optional:
            sub = CONFIG_MAPPING[spec.model_type] if spec.config_class.__name__ == "AutoConfig" else spec.config_class
            given[key] = _config(sub, spec.init_kwargs, **more.pop(key, {}))
    given = (base or {}) | given | more
    if "layer_types" in names and "layer_types" not in given:  # all kinds of layers, the last one full
        kinds = list(dict.fromkeys(cls().layer_types or []))
        others = [kind for kind in kinds if kind != "full_attention"] or kinds
        last = ["full_attention"] if "full_attention" in kinds else kinds[-1:]
        types = (others[:1] + last) * 2 if len(others) == 1 else (others * 3)[:3] + last
        if len(set(types)) > 1:
            given["layer_types"] = types
    return cls(**given)


def _small(kind: str) -> PreTrainedConfig:
    return _config(CONFIG_MAPPING[kind])


SMALL: dict[str, Callable[[], PreTrainedConfig]] = {
    kind: partial(_small, kind) for kind in NAMES if kind not in UNBUILDABLE
}


def small(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    """The model with weights large enough for tokens to differ."""
    torch.manual_seed(0)
    model: Any = None
    for attention in ("sdpa", "eager"):  # some have no sdpa
        try:
            options = {"attn_implementation": attention, "experts_implementation": "eager"}
            model = AutoModelForCausalLM.from_config(SMALL[kind](), **options)
            break
        except ValueError:
            if attention == "eager":
                raise
    model = model.to(dtype).eval()
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.5)
        elif name.endswith("bias"):
            nn.init.normal_(weight, std=0.1)
        else:  # a scale, of 1 or, where the model adds 1 to it, of 0
            mean = float(weight.detach().mean())
            nn.init.normal_(weight, mean=mean, std=0.1 * abs(mean) or 0.1)
    for module in model.modules():
        if type(module).__name__.startswith("Inkling2"):
            for at, child in module.named_children():  # these get float32 whatever the model's dtype is
                if type(child).__name__.endswith("Router") or at in ("forget_gate_proj", "message_gate_proj"):
                    child.float()
    return model
