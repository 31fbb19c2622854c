"""Transformer blocks from packages that pip installs, and what it takes to loop each.

`BLOCKS` is the table. A block whose package is absent is skipped by the tests. None is modified: what stands
between a block and the loop is its `glue`, one expression.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from absent import load
from torch import Tensor, nn

import adadepth as ad

DIM, HEADS, SIZE, BATCH, SEQ = 32, 4, 8, 3, 7
Given = dict[str, Any]


class Foreign(NamedTuple):
    """A block of `package`, and how it is looped.

    `given(batch, seq)` is passed as `block_kwargs`. `glue(block, x, **given)` calls the block inside the loop;
    None: the block is looped as it is. `alone(block, x, **given)` is how its package calls it on one whole row
    `(1, length, dim)`; None: as in the loop.
    """

    package: str
    make: Callable[[], nn.Module]
    causal: bool = True
    given: Callable[[int, int], Given] = lambda batch, seq: {}
    glue: Callable[..., Tensor] | None = None
    alone: Callable[..., Tensor] | None = None


class Glued(nn.Module):
    """A block behind its glue."""

    def __init__(self, block: nn.Module, glue: Callable[..., Tensor]) -> None:
        super().__init__()
        self.block, self.glue = block, glue

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        return self.glue(self.block, x, **given)


def angles(batch: int, seq: int, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions `(1, seq, size)`, the same for all rows."""
    angle = torch.arange(seq)[:, None] * 10_000 ** (-torch.arange(0, size, 2) / size)
    return torch.cat([angle, angle], -1).cos()[None], torch.cat([angle, angle], -1).sin()[None]


def hugging_face(module: str, layer: str, config: str, *index: int, **sizes: Any) -> Callable[[], nn.Module]:
    """A layer made by hand: `attn_implementation` is otherwise the eager one, which calls no attention of torch."""

    def make() -> nn.Module:
        code = load(f"transformers.models.{module}")
        return getattr(code, layer)(getattr(code, config)(**sizes, attn_implementation="sdpa"), *index)

    return make


_HF = {"hidden_size": DIM, "num_attention_heads": HEADS, "intermediate_size": 64}
_WHISPER = {"d_model": DIM, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 64}


def timm(name: str, module: str = "vision_transformer", **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(load(f"timm.models.{module}", "torchvision"), name)(DIM, HEADS, **options)


def x_transformer(name: str, **options: Any) -> Callable[[], nn.Module]:
    sizes = {"dim": DIM, "depth": 2, "heads": HEADS, "attn_dim_head": 32, "attn_flash": True}
    return lambda: getattr(load("x_transformers"), name)(**sizes | options)


def litgpt(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        code, sizes = load("litgpt.model"), {"block_size": 64, "n_layer": 1, "n_embd": DIM, "n_head": HEADS}
        return code.Block(code.Config(**sizes, **options, intermediate_size=64, rotary_percentage=1.0), 0)

    return make


def torchtune() -> nn.Module:
    tune = load("torchtune.modules", "torchao")
    projections = {f"{name}_proj": nn.Linear(DIM, width) for name, width in zip("qkv", (DIM, 16, 16), strict=True)}
    attention = tune.MultiHeadAttention(
        embed_dim=DIM,
        num_heads=HEADS,
        num_kv_heads=2,
        head_dim=SIZE,
        **projections,
        output_proj=nn.Linear(DIM, DIM),
        pos_embeddings=tune.RotaryPositionalEmbeddings(SIZE, 64),
    )
    mlp = tune.FeedForward(gate_proj=nn.Linear(DIM, 64), down_proj=nn.Linear(64, DIM), up_proj=nn.Linear(DIM, 64))
    norms = {"sa_norm": tune.RMSNorm(DIM), "mlp_norm": tune.RMSNorm(DIM)}
    return tune.TransformerSelfAttentionLayer(attn=attention, mlp=mlp, **norms)


def diffusers(**options: Any) -> Callable[[], nn.Module]:
    return lambda: load("diffusers.models.attention").BasicTransformerBlock(DIM, HEADS, SIZE, **options)


def flux() -> nn.Module:
    """Its own sequence, a text, is empty here; with `image_rotary_emb` it cannot be looped."""
    code = load("diffusers.models.transformers.transformer_flux")
    block = code.FluxSingleTransformerBlock(DIM, HEADS, SIZE)
    return Glued(block, lambda block, x, **given: block(x, x[:, :0], **given)[1])


def open_clip() -> nn.Module:
    return load("open_clip.transformer", "torchvision").ResidualAttentionBlock(DIM, HEADS)


def vit_pytorch() -> nn.Module:
    return load("vit_pytorch.simple_flash_attn_vit", "torchvision").Transformer(DIM, 2, HEADS, SIZE, 64, True)


def whisper(**options: Any) -> Callable[[], nn.Module]:
    return lambda: load("whisper.model").ResidualAttentionBlock(DIM, HEADS, **options)


def per_token(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: ad.RowPerToken(make())


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(DIM, HEADS, 64, dropout=0.0, batch_first=True)


def decoder_layer() -> nn.Module:
    return nn.TransformerDecoderLayer(DIM, HEADS, 64, dropout=0.0, batch_first=True)


def memory(batch: int) -> Tensor:
    """Something to attend to, one for each row: `(batch, 1, entries, dim)`."""
    return torch.randn(batch, 1, 5, DIM)


def eager(layer: Any) -> Any:
    layer.attn.config._attn_implementation = "eager"
    return layer


def causal_mask(x: Tensor) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(x.shape[1])


BLOCKS: dict[str, Foreign] = {
    "torch encoder layer": Foreign("torch", encoder_layer, causal=False),
    "torch encoder layer, causal": Foreign(
        "torch",
        encoder_layer,
        glue=lambda block, x: ad.CausalEncoder(block)(x),
        alone=lambda block, x: block(x, causal_mask(x), is_causal=True),
    ),
    "torch decoder layer": Foreign(
        "torch",
        per_token(decoder_layer),
        given=lambda batch, seq: {"memory": memory(batch), "memory_key_padding_mask": torch.rand(batch, 1, 5) < 0.3},
        alone=lambda apart, x, memory_key_padding_mask, memory: apart.block(
            x, memory[0], causal_mask(x), tgt_is_causal=True, memory_key_padding_mask=memory_key_padding_mask[0]
        ),
    ),
    "torch cross-attention": Foreign(
        "torch",
        lambda: ad.RowPerToken(
            Glued(
                nn.MultiheadAttention(DIM, HEADS, batch_first=True),
                lambda block, x, memory: x + block(x, memory, memory, need_weights=False)[0],
            )
        ),
        given=lambda batch, seq: {"memory": memory(batch)},
        alone=lambda apart, x, memory: apart.block(x, memory=memory[0]),
    ),
    "timm ViT": Foreign("timm", timm("Block", drop_path=0.1, init_values=0.1), causal=False),
    "timm ViT, causal": Foreign("timm", timm("Block", qk_norm=True), given=lambda batch, seq: {"is_causal": True}),
    "timm ViT, parallel": Foreign("timm", timm("ParallelScalingBlock"), causal=False),
    "timm ViT, post-norm": Foreign("timm", timm("ResPostBlock"), causal=False),
    "timm BEiT": Foreign("timm", timm("Block", "beit", init_values=0.1), causal=False),
    "timm EVA, rotary": Foreign(
        "timm",
        timm("EvaBlock", "eva", num_prefix_tokens=0, swiglu_mlp=True),
        causal=False,
        given=lambda batch, seq: {"rope": torch.cat(angles(batch, seq)[::-1], -1)},
    ),
    "x-transformers encoder": Foreign("x_transformers", x_transformer("Encoder"), causal=False),
    "x-transformers encoder, rotary": Foreign(
        "x_transformers",
        x_transformer("Encoder", rotary_pos_emb=True),
        causal=False,
        glue=lambda block, x: block(x, pos=ad.positions()),
        alone=lambda block, x: block(x),
    ),
    "x-transformers decoder, rotary": Foreign(
        "x_transformers",
        x_transformer("Decoder", rotary_pos_emb=True, attn_kv_heads=2, attn_qk_norm=True, ff_glu=True),
        glue=lambda block, x: block(x, pos=ad.positions()),
        alone=lambda block, x: block(x),
    ),
    "x-transformers decoder, adaptive norm": Foreign(
        "x_transformers",
        x_transformer("Decoder", use_adaptive_layernorm=True, use_adaptive_layerscale=True, dim_condition=DIM),
        given=lambda batch, seq: {"condition": torch.randn(batch, 1, DIM)},
    ),
    "x-transformers decoder, hyper-connections": Foreign(
        "x_transformers", x_transformer("Decoder", num_residual_streams=2, add_value_residual=True)
    ),
    "x-transformers decoder, cross-attention": Foreign(
        "x_transformers",
        per_token(x_transformer("Decoder", cross_attend=True)),
        given=lambda batch, seq: {"context": memory(batch)},
        alone=lambda apart, x, context: apart.block(x, context=context[0]),
    ),
    "litgpt Llama": Foreign(
        "litgpt",
        litgpt(n_query_groups=2, mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm"),
        given=lambda batch, seq: dict(zip(("cos", "sin"), angles(batch, seq), strict=True)),
    ),
    "litgpt GPT-NeoX": Foreign(
        "litgpt",
        litgpt(parallel_residual=True),
        glue=lambda block, x: block(x, *(t[0][ad.positions()] for t in angles(1, SEQ))),
        alone=lambda block, x: block(x, *angles(1, x.shape[1])),
    ),
    "torchtune": Foreign(
        "torchtune",
        torchtune,
        glue=lambda block, x: block(x, input_pos=ad.positions()),
        alone=lambda block, x: block(x),
    ),
    "torchtune, positions given": Foreign(
        "torchtune", torchtune, given=lambda batch, seq: {"input_pos": torch.randint(0, 60, (batch, seq))}
    ),
    "transformers Llama": Foreign(
        "transformers",
        hugging_face("llama.modeling_llama", "LlamaDecoderLayer", "LlamaConfig", 0, **_HF, num_key_value_heads=2),
        given=lambda batch, seq: {"position_embeddings": angles(batch, seq)},
    ),
    "transformers GPT-2": Foreign(
        "transformers",
        hugging_face("gpt2.modeling_gpt2", "GPT2Block", "GPT2Config", 0, n_embd=DIM, n_head=HEADS),
    ),
    "transformers BERT": Foreign(
        "transformers", hugging_face("bert.modeling_bert", "BertLayer", "BertConfig", **_HF), causal=False
    ),
    "transformers ModernBERT": Foreign(
        "transformers",
        hugging_face("modernbert.modeling_modernbert", "ModernBertEncoderLayer", "ModernBertConfig", 0, **_HF),
        causal=False,
        given=lambda batch, seq: {"position_embeddings": angles(batch, seq)},
    ),
    "transformers Whisper encoder": Foreign(
        "transformers",
        hugging_face("whisper.modeling_whisper", "WhisperEncoderLayer", "WhisperConfig", **_WHISPER),
        causal=False,
        given=lambda batch, seq: {"attention_mask": None},
    ),
    "transformers Whisper decoder": Foreign(
        "transformers",
        hugging_face("whisper.modeling_whisper", "WhisperDecoderLayer", "WhisperConfig", 0, **_WHISPER),
    ),
    "transformers Whisper decoder, cross-attention": Foreign(
        "transformers",
        per_token(hugging_face("whisper.modeling_whisper", "WhisperDecoderLayer", "WhisperConfig", 0, **_WHISPER)),
        given=lambda batch, seq: {"encoder_hidden_states": memory(batch)},
        alone=lambda apart, x, encoder_hidden_states: apart.block(x, encoder_hidden_states=encoder_hidden_states[0]),
    ),
    "diffusers": Foreign("diffusers", diffusers(), causal=False),
    "diffusers, one timestep for all": Foreign(
        "diffusers",
        diffusers(norm_type="ada_norm", num_embeds_ada_norm=10),
        causal=False,
        given=lambda batch, seq: {"timestep": torch.tensor(3)},
    ),
    "diffusers, a timestep for each row": Foreign(
        "diffusers",
        per_token(diffusers(norm_type="ada_norm_zero", num_embeds_ada_norm=10)),
        causal=False,
        given=lambda batch, seq: dict.fromkeys(("timestep", "class_labels"), torch.randint(0, 9, (batch, 1))),
        alone=lambda apart, x, **given: apart.block(x, **{name: t[0] for name, t in given.items()}),
    ),
    "diffusers, PixArt": Foreign(
        "diffusers",
        per_token(diffusers(norm_type="ada_norm_single")),
        causal=False,
        given=lambda batch, seq: {"timestep": torch.randn(batch, 1, 6 * DIM)},
        alone=lambda apart, x, timestep: apart.block(x, timestep=timestep[0]),
    ),
    "diffusers, cross-attention": Foreign(
        "diffusers",
        per_token(diffusers(cross_attention_dim=DIM)),
        causal=False,
        given=lambda batch, seq: {"encoder_hidden_states": memory(batch)},
        alone=lambda apart, x, encoder_hidden_states: apart.block(x, encoder_hidden_states=encoder_hidden_states[0]),
    ),
    "diffusers, Flux": Foreign(
        "diffusers",
        per_token(flux),
        causal=False,
        given=lambda batch, seq: {"temb": torch.randn(batch, 1, DIM)},
        alone=lambda apart, x, temb: apart.block(x, temb=temb[0]),
    ),
    "open_clip": Foreign(
        "open_clip",
        lambda: load("open_clip.transformer", "torchvision").ResidualAttentionBlock(DIM, HEADS),
        causal=False,
    ),
    "whisper encoder": Foreign("whisper", whisper(), causal=False),
    "whisper decoder": Foreign(
        "whisper",
        whisper(),
        given=lambda batch, seq: {"mask": True},  # the block only asks whether there is one
    ),
    "whisper decoder, cross-attention": Foreign(
        "whisper",
        per_token(whisper(cross_attention=True)),
        given=lambda batch, seq: {"xa": memory(batch), "mask": True},
        alone=lambda apart, x, xa, mask: apart.block(x, xa[0], mask=mask),
    ),
    "vit-pytorch": Foreign("vit_pytorch", vit_pytorch, causal=False),
}

# In training, these drop attention weights by a number that they hand to the attention call: no module tells of it.
DROPOUT: dict[str, Foreign] = {
    "x-transformers": Foreign("x_transformers", x_transformer("Decoder", attn_dropout=0.5)),
    "transformers": Foreign(
        "transformers",
        hugging_face("llama.modeling_llama", "LlamaDecoderLayer", "LlamaConfig", 0, **_HF, attention_dropout=0.5),
        given=BLOCKS["transformers Llama"].given,
    ),
}

_MIXES, _OWN_MASK = "mixes tokens outside its attention calls", "passes an attention mask of its own"
_OTHER_KEYS, _UNSEEN = "keys of another length cannot be looped", "No attention call was seen"

# Blocks that cannot be looped so, and what is said of them.
REFUSED: dict[str, tuple[Foreign, str]] = {
    "rotary positions by the length of the input": (
        Foreign("x_transformers", x_transformer("Decoder", rotary_pos_emb=True)),
        _MIXES,
    ),
    "the same, torchtune": (Foreign("torchtune", torchtune), _MIXES),
    "tokens shifted along the sequence": (Foreign("x_transformers", x_transformer("Decoder", shift_tokens=1)), _MIXES),
    "ALiBi": (Foreign("x_transformers", x_transformer("Decoder", alibi_pos_bias=True)), _OWN_MASK),
    "keys of no token": (Foreign("x_transformers", x_transformer("Decoder", attn_num_mem_kv=2)), _OTHER_KEYS),
    "a window": (
        Foreign(
            "litgpt",
            litgpt(sliding_window_size=3, sliding_window_indices=[1]),
            given=lambda batch, seq: dict(zip(("cos", "sin"), angles(batch, seq), strict=True)),
        ),
        _OWN_MASK,
    ),
    "attention by hand": (Foreign("x_transformers", x_transformer("Decoder", attn_flash=False)), _UNSEEN),
    "attention by hand, vit-pytorch": (
        Foreign("vit_pytorch", lambda: load("vit_pytorch.vit", "torchvision").Transformer(DIM, 1, HEADS, SIZE, 64)),
        _UNSEEN,
    ),
    "positions as a bias": (
        Foreign(
            "transformers",
            hugging_face("t5.modeling_t5", "T5Block", "T5Config", True, d_model=DIM, num_heads=HEADS, d_kv=SIZE),
            glue=lambda block, x: block(x)[0],
        ),
        _OWN_MASK,
    ),
    "eager attention of a Hugging Face layer": (
        Foreign("transformers", BLOCKS["transformers GPT-2"].make, glue=lambda block, x: eager(block)(x)),
        _UNSEEN,
    ),
    "positions without a batch axis": (
        Foreign(
            "litgpt",
            litgpt(),
            given=lambda batch, seq: {name: t[0] for name, t in zip(("cos", "sin"), angles(1, seq), strict=True)},
        ),
        r"block_kwargs\['cos'\] has shape \(7, 8\), which does not fit \(batch, seq\) = \(3, 7\)",
    ),
    "cos and sin not given": (Foreign("litgpt", litgpt()), "also needs cos, sin"),
    "causal by the wrapper alone": (
        Foreign("transformers", BLOCKS["transformers BERT"].make),
        r"RecurrentWrapper\(causal=True\) expected causal attention",
    ),
}
