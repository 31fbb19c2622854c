"""Every error of the loop and of blocks that cannot be served, message by message."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

pytestmark = pytest.mark.plain


class Block(nn.Module):
    """Attends as told."""

    def __init__(self, attend: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.attend, self.weight = attend, nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x * self.weight)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def sdpa(x: Tensor, **options: Any) -> Tensor:
    h = heads(x)
    return F.scaled_dot_product_attention(h, h, h, **{"is_causal": True, **options}).transpose(1, 2).flatten(2)


def merged(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def cross(x: Tensor) -> Tensor:
    h = heads(x)
    memory = h.new_ones(h.shape[0], 2, 3, 4)
    return F.scaled_dot_product_attention(h, memory, memory).transpose(1, 2).flatten(2)


class Uneven(nn.Module):
    """Attends `first` times, then `later` times."""

    def __init__(self, first: int, later: int) -> None:
        super().__init__()
        self.first, self.later = first, later

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.later if int(ad.iteration().max()) else self.first):
            x = sdpa(x)
        return x


class Multihead(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner, self.options = nn.MultiheadAttention(8, 2, batch_first=True), options

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, **self.options)[0]


class Bad(ad.Gate):
    def __init__(self, value: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.value = value

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        return self.value(h)


class BadUpdate(ad.Update):
    def forward(self, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int) -> Tensor:
        return h[..., :3]


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
GOOD = Block(sdpa)


def loop(block: nn.Module = GOOD, **options: Any) -> ad.RecurrentWrapper:
    return ad.RecurrentWrapper(block, **{"steps": 3, **options}).eval()


def called(**options: Any) -> ad.Output:
    return loop()(X, **options)


PER_ROW = " For one depth per row pass a tensor, of shape (batch, 1)."


class Attends(nn.Module):
    """Calls attention with options."""

    takes_view = True

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return x + view.attend(q, q, q, **self.options).transpose(1, 2).flatten(2)


def row_mask() -> Tensor:
    return torch.ones(2, 4, dtype=torch.bool)


ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "steps": (lambda: loop(steps=0), "RecurrentWrapper needs steps >= 1, got steps=0."),
    "rank": (
        lambda: loop()(X[0]),
        "RecurrentWrapper expected x of shape (batch, seq, dim) in floating point, got (5, 8) torch.float32.",
    ),
    "integers": (
        lambda: loop()(X.long()),
        "RecurrentWrapper expected x of shape (batch, seq, dim) in floating point, got (2, 5, 8) torch.int64.",
    ),
    "mask shape": (
        lambda: loop()(X, mask=row_mask()),
        "mask expected shape (batch, seq) = (2, 5) and dtype torch.bool, True for real tokens, got (2, 4) torch.bool.",
    ),
    "mask dtype": (
        lambda: loop()(X, mask=torch.ones(2, 5)),
        "mask expected shape (batch, seq) = (2, 5) and dtype torch.bool, True for real tokens, got (2, 5) torch.float32.",
    ),
    "start": (
        lambda: loop()(X, start=X.double()),
        "start expected the shape and dtype of x, (2, 5, 8) torch.float32, got (2, 5, 8) torch.float64.",
    ),
    "max_depth": (lambda: loop()(X, max_depth=4), "max_depth expected an int from 1 to steps=3, got 4."),
    "a fraction": (lambda: called(max_depth=2.0), "max_depth expected an int from 1 to steps=3, got 2.0."),
    "a list": (lambda: called(min_depth=[2]), f"min_depth expected an int from 1 to steps=3, got [2].{PER_ROW}"),
    "an array": (
        lambda: called(max_depth=np.array([1, 2])),
        f"max_depth expected an int from 1 to steps=3, got [1 2].{PER_ROW}",
    ),
    "a bool": (lambda: loop()(X, min_depth=True), "min_depth expected an int from 1 to steps=3, got True."),
    "min_depth": (lambda: loop()(X, min_depth=0), "min_depth expected an int from 1 to steps=3, got 0."),
    "depth dtype": (
        lambda: loop()(X, max_depth=torch.ones(2, 1)),
        "max_depth expected integers, got a tensor of torch.float32. Round it to the depths you mean.",
    ),
    "depth shape": (
        lambda: loop()(X, max_depth=torch.ones(3, 1, dtype=torch.int64)),
        "max_depth expected an int or a tensor that broadcasts to (batch, seq) = (2, 5), got shape (3, 1). One depth per "
        "row has shape (batch, 1).",
    ),
    "gate shape": (
        lambda: loop(gate=Bad(lambda h: h))(X),
        "Bad expected to return one score per token, shape (2, 5), got (2, 5, 8) at iteration 0. Reduce the last axis of "
        "the state alone, as h.mean(-1) does; a linear layer ends in .squeeze(-1).",
    ),
    "gate NaN": (
        lambda: loop(gate=Bad(lambda h: h.sum(-1) * torch.nan))(X),
        "Bad scored NaN at iteration 0. Look for inf or NaN in the gate's parameters, or in the block's output: "
        "without a gate, looped(x, states=True).states holds the state of every iteration.",
    ),
    "rule shape": (
        lambda: loop(rule=lambda scores, remaining, positions: remaining[:1])(X),
        "<lambda> expected to return how much of each token continues, shape (2, 5), got (1, 5) at iteration 0. Compute it "
        "from remaining, and reduce the last axis of the scores alone, as scores[..., -1] does.",
    ),
    "update shape": (
        lambda: loop(update=BadUpdate())(X),
        "BadUpdate expected to return the next input, shape (2, 5, 8), got (2, 5, 3) at iteration 0.",
    ),
    "no attention": (
        lambda: loop(nn.Linear(8, 8))(X),
        "No attention call was seen in Linear. If it computes softmax(q @ k.T) @ v itself, replace that by "
        "F.scaled_dot_product_attention(q, k, v). A compiled copy of this function is not seen, nor "
        "nn.MultiheadAttention with need_weights=True. A Hugging Face layer made by hand calls it if its config has "
        "_attn_implementation = 'sdpa'. If it mixes no tokens, wrap it: adadepth.Pointwise(block).",
    ),
    "no attention, rows apart": (
        lambda: loop(ad.RowPerToken(nn.Linear(8, 8)))(X),
        "No attention call was seen in Linear. If it computes softmax(q @ k.T) @ v itself, replace that by "
        "F.scaled_dot_product_attention(q, k, v). A compiled copy of this function is not seen, nor "
        "nn.MultiheadAttention with need_weights=True. A Hugging Face layer made by hand calls it if its config has "
        "_attn_implementation = 'sdpa'. adadepth.Pointwise around attention is wrong: tokens would no longer attend to each "
        "other.",
    ),
    "output shape": (
        lambda: loop(Block(lambda x: sdpa(x)[..., :3]))(X),
        "A looped block must map (rows, length, dim) to the same shape: expected a tensor of shape (2, 5, 8), got shape "
        "(2, 5, 3) from Block. Wrap it in a module that returns the state alone.",
    ),
    "output tuple": (
        lambda: loop(Block(lambda x: (sdpa(x), None)))(X),
        "A looped block must map (rows, length, dim) to the same shape: expected a tensor of shape (2, 5, 8), got tuple "
        "from Block. Wrap it in a module that returns the state alone.",
    ),
    "own mask": (
        lambda: loop(Block(lambda x: sdpa(x, is_causal=False, attn_mask=torch.ones(5, 5).tril().bool())))(X),
        "The block passes an attention mask of its own, of shape (5, 5). In a loop the wrapper makes the mask, from "
        "the active tokens and the padding: pass is_causal=True instead of a causal mask, and padding as looped(x, "
        "mask=...). Other masks (windows, ALiBi, prefixes) cannot be looped.",
    ),
    "own mask beside the flag": (
        lambda: loop(Block(lambda x: sdpa(x, attn_mask=torch.ones(5, 5).triu(-1).bool())))(X),
        "The block passes an attention mask of its own, of shape (5, 5). In a loop the wrapper makes the mask, from "
        "the active tokens and the padding: pass is_causal=True instead of a causal mask, and padding as looped(x, "
        "mask=...). Other masks (windows, ALiBi, prefixes) cannot be looped.",
    ),
    "not causal": (
        lambda: loop(Block(lambda x: sdpa(x, is_causal=False)))(X),
        "RecurrentWrapper(causal=True) expected causal attention, but the block calls it with is_causal=False. Pass "
        "causal=False to the wrapper, or is_causal=True in the block (adadepth.CausalEncoder does it for "
        "nn.TransformerEncoderLayer).",
    ),
    "causal": (
        lambda: loop(causal=False)(X),
        "RecurrentWrapper(causal=False) expected attention that is not causal, but the block calls it with is_causal=True. "
        "Pass causal=True to the wrapper, or is_causal=False in the block.",
    ),
    "cross-attention": (
        lambda: loop(Block(cross), causal=False)(X),
        "Attention expected k of shape (2, heads, 5, head_dim), got (2, 2, 3, 4): queries, keys and values must be "
        "those of the block's own input, one per token. If the block reads a memory, or a condition (batch, dim) for "
        "each row, wrap it: adadepth.RowPerToken(block). Other keys of another length cannot be looped. Batch and "
        "heads must be separate axes. If the block adds a tensor of the batch's shape to its input, pass it as "
        "block_kwargs, so that it is packed.",
    ),
    "heads merged": (
        lambda: loop(Block(merged))(X),
        "Attention expected q of shape (2, heads, 5, head_dim), got (2, 5, 8): queries, keys and values must be those "
        "of the block's own input, one per token. If the block reads a memory, or a condition (batch, dim) for each "
        "row, wrap it: adadepth.RowPerToken(block). Other keys of another length cannot be looped. Batch and heads "
        "must be separate axes. If the block adds a tensor of the batch's shape to its input, pass it as "
        "block_kwargs, so that it is packed.",
    ),
    "more calls": (
        lambda: loop(Uneven(1, 2))(X, max_depth=torch.tensor([[3], [2]])),
        "Iteration 1 made more than the 1 attention calls seen before. A looped block must call attention equally "
        "often every time, because the order of the calls tells which layer each belongs to.",
    ),
    "fewer calls": (
        lambda: loop(Uneven(2, 1))(X, max_depth=torch.tensor([[3], [2]])),
        "Iteration 1 made 1 instead of the 2 attention calls seen before. A looped block must call attention equally "
        "often every time, because the order of the calls tells which layer each belongs to.",
    ),
    "batch first": (
        lambda: loop(nn.MultiheadAttention(8, 2)),
        "RecurrentWrapper gives its block (batch, seq, dim), but the block is an nn.MultiheadAttention with "
        "batch_first=False, which would mix the rows. Build it with batch_first=True.",
    ),
    "bias_kv": (
        lambda: loop(nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True))),
        "0 is an nn.MultiheadAttention with add_bias_kv or add_zero_attn: keys that belong to no token cannot be looped. "
        "Build it without.",
    ),
    "need_weights": (
        lambda: loop(Multihead(), causal=False)(X),
        "nn.MultiheadAttention was called with need_weights=True (its default), which computes attention over the packed "
        "tokens of all rows. Pass need_weights=False.",
    ),
    "key_padding_mask": (
        lambda: loop(Multihead(need_weights=False, key_padding_mask=torch.zeros(2, 5).bool()), causal=False)(X),
        "nn.MultiheadAttention was called with a key_padding_mask. In a loop the wrapper makes the mask: pass padding "
        "as looped(x, mask=...).",
    ),
    "no softcap": (
        lambda: loop(Attends(softcap=0.0))(X),
        "view.attend expected softcap, a bound of the scores, above 0, got 0.0. Pass None to leave them unbounded.",
    ),
    "sinks of other heads": (
        lambda: loop(Attends(sinks=torch.zeros(4)))(X),
        "view.attend expected sinks of shape (heads,) = (2,), one score for each head of the queries, got a tensor of "
        "shape (4,) torch.float32.",
    ),
    "sinks as a number": (
        lambda: loop(Attends(sinks=1.0))(X),
        "view.attend expected sinks of shape (heads,) = (2,), one score for each head of the queries, got 1.0.",
    ),
    **{
        f"a window of {window}": (
            lambda window=window: loop(Attends(window=window))(X),  # type: ignore[misc]
            f"view.attend expected window, an int from 1, and a causal wrapper, got window={window} and "
            "RecurrentWrapper(causal=True).",
        )
        for window in (0, 2.5, True)
    },
    "thresholds of another batch": (
        lambda: loop(gate=ad.LinearGate(8), rule=ad.Threshold(torch.zeros(4, 1)))(X),
        "Threshold expected tau of shape (batch, 1) or (batch, seq) with (batch, seq) = (2, 5), got shape (4, 1). Make "
        "a rule with thresholds for this batch.",
    ),
    "thresholds of other tokens": (
        lambda: loop(gate=ad.LinearGate(8), rule=ad.Lookahead(ad.SurvivalThreshold(torch.zeros(1, 9))))(X),
        "SurvivalThreshold expected tau of shape (batch, 1) or (batch, seq) with (batch, seq) = (2, 5), got shape "
        "(1, 9). Make a rule with thresholds for this batch.",
    ),
    "ponder of another width": (
        lambda: loop(gate=ad.LinearGate(8), update=ad.Ponder(nn.Embedding(9, 6), nn.Linear(6, 9)))(X),
        "Ponder expected h of shape (..., 6), the width of its embedding, got (2, 5, 8). The block's state must have "
        "the width of the embedding.",
    ),
    "gate width": (
        lambda: ad.LinearGate(7)(X, X, 0),
        "LinearGate(dim=7) expected h of shape (..., 7), got (2, 5, 8). dim must be the width of the block's state.",
    ),
    "gate step": (
        lambda: ad.PerIterationMLPGate(8, 3)(X, X, 2),
        "PerIterationMLPGate(steps=3) expected a step from 0 to 1, got 2. Give the gate the steps of its RecurrentWrapper.",
    ),
    "gate size": (lambda: ad.SharedMLPGate(8, hidden=0), "SharedMLPGate needs hidden >= 1, got hidden=0."),
}


@pytest.mark.parametrize("name", ERRORS)
def test_the_message(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["iteration", "positions"])
def test_outside_a_loop_there_is_no_iteration(name: str) -> None:
    with pytest.raises(RuntimeError) as error:
        getattr(ad, name)()
    assert str(error.value) == (
        f"{name}() was called outside a looped block, where it has no value. Call it in the block, its submodules and "
        "hooks, or in gates and updates."
    )


def test_an_error_leaves_no_view_behind() -> None:
    with pytest.raises(ValueError, match="Attention expected"):
        loop(Block(merged))(X)
    x = heads(X)
    assert F.scaled_dot_product_attention(x, x, x).shape == x.shape
    with pytest.raises(RuntimeError):
        ad.iteration()


@pytest.mark.parametrize("fused", ["attention", "layer"])
def test_a_fused_layer_that_is_put_in_later_is_refused(fused: str) -> None:
    """PyTorch's fast path makes no attention call, so the loop could not catch it."""

    def made() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        return Multihead(need_weights=False) if fused == "attention" else layer

    block = nn.Sequential(made(), made())
    looped = loop(block, causal=False)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5]).bool()
    with torch.no_grad():
        looped(X, mask=mask)
        block[1] = made().eval()
        with pytest.raises(ValueError, match="fused layer") as error:
            looped(X, mask=mask)
        assert str(error.value) == (
            "Sequential runs a fused layer of PyTorch (nn.TransformerEncoderLayer or nn.MultiheadAttention in "
            "evaluation), which would attend to the packed tokens of all rows. If you changed a layer of the block, "
            "assign the block again: looped.block = block."
        )
        assert block(X).shape == X.shape
        looped.block = block
        looped(X, mask=mask)


ORDER = "The order is block, steps, gate, rule, update."
PIECES: dict[str, tuple[dict[str, Any], str]] = {
    "swapped": (
        {"gate": ad.Threshold(0.5), "rule": ad.LinearGate(8)},
        f"RecurrentWrapper expected gate to be an adadepth.Gate, got Threshold. {ORDER}",
    ),
    "a layer as gate": (
        {"gate": nn.Linear(8, 1)},
        f"RecurrentWrapper expected gate to be an adadepth.Gate, got Linear. {ORDER}",
    ),
    "a number as rule": (
        {"rule": 0.5},
        f"RecurrentWrapper expected rule to be a function or a callable object, got float. {ORDER}",
    ),
    "a gate as rule": (
        {"rule": ad.LinearGate(8)},
        f"RecurrentWrapper expected rule to be a function or a callable object, got LinearGate. {ORDER}",
    ),
    "a class": (
        {"update": ad.Interpolate},
        f"RecurrentWrapper expected update to be an adadepth.Update, got the class Interpolate; call it. {ORDER}",
    ),
}


@pytest.mark.parametrize("case", PIECES)
def test_pieces_in_each_others_place_are_refused(case: str) -> None:
    pieces, message = PIECES[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ad.RecurrentWrapper(Block(sdpa), 3, **pieces)
