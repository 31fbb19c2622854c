"""Other packages for benchmarks/peers.py, each beside adadepth on what the two can share.

x-transformers' looped language model runs all iterations for all tokens in training. It decodes one row at a time, and
keeps the keys and values of a token's last iteration alone. adadepth loops its very own `Decoder`.
ponder-transformer runs all iterations in training, with a head and a loss at each; it has no cache, and in evaluation
halts a row as a whole. It shares no block with adadepth, so a plain layer of the same width stands beside it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ._blocks import stack
from ._work import (
    HEADS,
    LAYERS,
    SMALL,
    STEPS,
    VOCABULARY,
    Decoder,
    Sizes,
    cached,
    decode_table,
    error,
    given,
    inputs,
    table,
    train,
)

LOOPED = f"x-transformers' `Decoder`, {LAYERS} layers"


class Alone(nn.Module):
    """x-transformers' decoder as a block: it takes states and nothing else."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x)


def looped(sizes: Sizes, dtype: torch.dtype) -> Any:
    """x-transformers' looped language model."""
    from x_transformers import Decoder as Layers
    from x_transformers import TransformerWrapper

    torch.manual_seed(0)
    per_head = {"heads": HEADS, "attn_dim_head": sizes.dim // HEADS, "attn_flash": True}
    layers = Layers(dim=sizes.dim, depth=LAYERS, pre_and_post_norm=True, **per_head)
    length = max(sizes.length, sizes.prompt + sizes.new)
    return TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=length, attn_layers=layers, looped=True, max_looped_steps=STEPS
    ).to(dtype)


def embedded(model: Any, ids: Tensor) -> Tensor:
    """What the model gives its layers."""
    return model.token_emb(ids) + model.pos_emb(ids)


def every(model: Any, ids: Tensor) -> Tensor:
    """Its scores after all iterations of all tokens."""
    return model(ids, looped_steps=STEPS, looped_pred_all_logits=False)


def looped_training(sizes: Sizes, repeats: int) -> list[str]:
    """A training step around one block: adadepth's loop, and x-transformers' own, which runs every iteration."""
    model = looped(SMALL, torch.float64)
    ids, depth = inputs(SMALL.batch, SMALL.length)
    full = torch.full_like(depth, STEPS)
    with torch.no_grad():
        ours = model.to_logits(given(Alone(model.attn_layers))(embedded(model, ids), full))
        same = error(ours, every(model, ids))
    model = looped(sizes, torch.float32)
    parameters = list(model.parameters())
    loop = given(Alone(model.attn_layers))
    ours_step = train(lambda ids: embedded(model, ids), model.to_logits, loop, parameters)
    theirs_step = train(lambda ids: ids, lambda scores: scores, lambda ids, _: every(model, ids), parameters)
    ids, depth = inputs(sizes.batch, sizes.length)
    full = torch.full_like(depth, STEPS)
    names = ("adadepth, packed", f"adadepth, packed, {STEPS} iterations for all", f"x-transformers, {STEPS} for all")
    calls = [lambda: ours_step(ids, depth), lambda: ours_step(ids, full), lambda: theirs_step(ids, full)]
    errors = ["–", f"{same} between these two", f"{same} between these two"]
    return table(LOOPED, dict(zip(names, calls, strict=True)), dict(zip(names, errors, strict=True)), repeats)


class Theirs:
    """x-transformers' decoding: ids so far in, scores of the new ones out; one row, a depth for each call."""

    def __init__(self, model: Any, ids: Tensor, prompt: int) -> None:
        self.model, self.ids, self.prompt, self.at = model, ids, prompt, 0
        self.cache: Any = None
        self.kept: Any = None  # the cache behind the prompt

    def __call__(self, ids: Tensor, depth: Tensor) -> Tensor:
        self.at += ids.shape[1]
        told = {"looped_steps": int(depth[0, -1]), "looped_inference": True, "return_intermediates": True}
        scores, self.cache = self.model(self.ids[:, : self.at], cache=self.cache, **told)
        self.kept = self.kept or self.cache
        return scores[:, -ids.shape[1] :]

    def rewind(self) -> None:
        self.cache, self.at = self.kept, self.prompt


def decoders(sizes: Sizes, dtype: torch.dtype) -> tuple[Any, Tensor, Tensor, dict[str, Decoder]]:
    """The model, ids, depths and both decoders, from ids to scores."""
    model = looped(sizes, dtype).eval()
    ids, depth = inputs(1, sizes.prompt + sizes.new, sizes.prompt)
    states, theirs = cached(Alone(model.attn_layers), sizes.prompt), Theirs(model, ids, sizes.prompt)
    at = [0]

    def ours(ids_: Tensor, depth: Tensor) -> Tensor:
        at[0] += ids_.shape[1]
        x = embedded(model, ids[:, : at[0]])[:, -ids_.shape[1] :]
        return model.to_logits(states.call(x, depth))

    def rewind() -> None:
        at[0] = sizes.prompt
        states.rewind()

    return (
        model,
        ids,
        depth,
        {"adadepth, packed": Decoder(ours, rewind), "x-transformers": Decoder(theirs, theirs.rewind)},
    )


def looped_decode(sizes: Sizes, repeats: int) -> list[str]:
    """Decoding of one row around one block; the error is that to one pass over all tokens at the same depths."""
    with torch.inference_mode():
        model, ids, depth, ways = decoders(SMALL, torch.float64)
        pass_ = given(Alone(model.attn_layers), skip=False)
        want = model.to_logits(pass_(embedded(model, ids), depth))
        errors = {name: error(way.whole(ids, depth, SMALL.prompt), want) for name, way in ways.items()}
        _, ids, depth, ways = decoders(sizes, torch.float32)
        return decode_table(f"{LOOPED}, 1 × 1", ways, (ids, depth, sizes), errors, repeats)


def ponder_training(sizes: Sizes, repeats: int) -> list[str]:
    """A training step with one layer: adadepth's at the mean depth, and ponder-transformer's of every iteration."""
    from ponder_transformer import PonderTransformer

    torch.manual_seed(0)
    theirs = PonderTransformer(
        num_tokens=VOCABULARY,
        dim=sizes.dim,
        max_seq_len=sizes.length,
        dim_head=sizes.dim // HEADS,
        heads=HEADS,
        ponder_lambda_p=0.5,  # a prior with which it trains four iterations
    )
    ids, depth = inputs(sizes.batch, sizes.length)
    block, embed = stack(1, sizes.dim, HEADS), nn.Embedding(VOCABULARY, sizes.dim)
    head = nn.Linear(sizes.dim, VOCABULARY)
    parameters = [p for part in (block, embed, head) for p in part.parameters()]
    ours = train(embed, head, given(block), parameters)
    calls = {
        "adadepth, packed": lambda: ours(ids, depth),
        f"ponder-transformer, {theirs.train_max_steps} for all": lambda: theirs(ids, labels=ids.roll(-1, 1)).backward(),
    }
    return table("one layer, each its own", calls, dict.fromkeys(calls, "another definition"), repeats)
