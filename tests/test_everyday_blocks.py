"""Blocks as people have them: flags by length, parts without gradients, norms in float32, attention in two ways."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks_zoo import DIM, PreNorm, heads_of, merged
from narrow import the
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adadepth as ad

STEPS = 3
both = pytest.mark.parametrize("skip", [True, False])


def near(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= 1e-10 * want.abs().max()


class ByLength(PreNorm):
    """Asks for causality where there is more than one query, as transformers' layers do."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(t, self.heads) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        return x + self.out(merged(F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)))


class Multihead(nn.Module):
    """The same by `nn.MultiheadAttention`, whose queries stand on another axis."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        causal = x.shape[1] > 1
        mask = x.new_zeros(1, 1) if causal else None
        return x + self.attention(x, x, x, need_weights=False, attn_mask=mask, is_causal=causal)[0]


@pytest.mark.parametrize("make", [lambda: ByLength(DIM, True), Multihead], ids=["block", "multihead"])
def test_one_query_needs_no_causal_flag(make: Callable[[], nn.Module]) -> None:
    block, x = make().double(), torch.randn(3, 6, DIM).double()
    depth = torch.ones(3, 6, dtype=torch.int64)
    depth[1, 3] = STEPS  # one lone token goes on
    call: dict[str, Any] = {"min_depth": depth, "max_depth": depth}
    packed, dense = (ad.RecurrentWrapper(block, STEPS, skip=skip).eval()(x, **call).hidden for skip in (True, False))
    near(packed, dense)
    looped, cache = ad.RecurrentWrapper(block, STEPS).eval(), ad.KVReuseCache()
    with torch.no_grad():
        parts = [looped(part, cache=cache).hidden for part in (x[:1, :4], x[:1, 4:5], x[:1, 5:])]
        near(torch.cat(parts, 1), looped(x[:1]).hidden)
        near(looped(x[:, :1]).hidden, torch.cat([looped(x[i : i + 1, :1]).hidden for i in range(3)]))
    with pytest.raises(ValueError, match="expected attention that is not causal"):
        ad.RecurrentWrapper(PreNorm(DIM, True), 1, causal=False)(torch.randn(1, 1, DIM))


class Cycles(PreNorm):
    """Attends without gradients first, as tiny recursive models do."""

    def __init__(self) -> None:
        super().__init__(DIM, True)
        self.last = PreNorm(DIM, True)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x + super().forward(x)
        return self.last(x)


@both
def test_gradients_may_be_off_in_a_part_of_a_block(skip: bool) -> None:
    """The part has none; what it kept of earlier iterations has, and equals a loop by hand."""
    block, x = Cycles().double(), torch.randn(2, 4, DIM).double().requires_grad_()
    looped = ad.RecurrentWrapper(block, 2, skip=skip)
    looped(x).hidden.square().sum().backward()
    got = {name: p.grad for name, p in block.named_parameters()}
    block.zero_grad(set_to_none=True)

    def by_hand(state: Tensor) -> Tensor:
        with torch.no_grad():
            state = state + PreNorm.forward(block, state)
        return block.last(state)

    by_hand(by_hand(x)).square().sum().backward()
    assert all(grad is None for name, grad in got.items() if not name.startswith("last."))
    for name, p in block.named_parameters():
        if name.startswith("last."):
            near(the(Tensor, got[name]), the(Tensor, p.grad))
    depth = torch.tensor([[1, 2, 1, 2], [2, 1, 1, 1]])
    looped(x, min_depth=depth, max_depth=depth).hidden.sum().backward()


def test_keys_that_were_kept_keep_their_gradient_where_a_later_call_has_none() -> None:
    class OffLater(PreNorm):
        """Attends without gradients in the second iteration alone."""

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(int(ad.iteration().max()) != 1):
                return x + super().forward(x)

    # The second iteration gives states without a gradient: in the third, only what left in the first has one.
    block, depth = OffLater(DIM, True).double(), torch.tensor([[1, 3, 1, 3], [3, 1, 1, 3]])
    x, grads = torch.randn(2, 4, DIM).double().requires_grad_(), []
    for skip in (True, False):
        looped = ad.RecurrentWrapper(block, 3, skip=skip)
        hidden = looped(x, min_depth=depth, max_depth=depth).hidden
        grads.append(torch.autograd.grad(hidden[:, 3].square().sum(), x)[0])
    assert torch.equal(grads[0].abs().sum(-1) > 0, depth == 1)
    near(*grads)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_an_autograd_function_of_ones_own_that_runs_attention_again_is_refused() -> None:
    """As reversible blocks and other libraries' checkpoints do: the loop would not be there in the backward pass."""

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor, block: nn.Module) -> Tensor:
            return block(x)

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
            return grad, None

    class Reversible(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = PreNorm(DIM, True)

        def forward(self, x: Tensor) -> Tensor:
            return Again.apply(x, self.inner)  # type: ignore[no-untyped-call]

    x = torch.randn(2, 4, DIM, requires_grad=True)
    with pytest.raises(ValueError, match=r"^The block checkpoints its own attention"):
        ad.RecurrentWrapper(Reversible(), 2)(x)
    # around the whole loop it is no business of the block's
    checkpoint(lambda x: ad.RecurrentWrapper(PreNorm(DIM, True), 2)(x).hidden, x, use_reentrant=True).sum().backward()


class Mixed(PreNorm):
    takes_view = True

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:  # type: ignore[override]
        q = heads_of(x, 2)
        return super().forward(x) + merged(view.attend(q, q, q))


class Hidden(Mixed):
    """The second attention is an `nn.MultiheadAttention`, whose fast path makes no attention call."""

    def __init__(self) -> None:
        super().__init__(DIM, True)
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:  # type: ignore[override]
        q = heads_of(x, 2)
        return self.attention(x, x, x, need_weights=False)[0] + merged(view.attend(q, q, q))


BESIDE = (
    "{} has takes_view = True, but calls F.scaled_dot_product_attention (or nn.MultiheadAttention): that attention would "
    "mix the packed tokens of all rows. {}"
)


@both
@pytest.mark.parametrize("training", [True, False])
def test_attention_beside_the_view_is_refused(training: bool, skip: bool) -> None:
    for block, cure in (
        (
            ad.Pointwise(PreNorm(DIM, True)),
            "Pointwise is for blocks that mix no tokens: give RecurrentWrapper the block itself.",
        ),
        (Mixed(DIM, True), "Call view.attend(q, k, v) in its place."),
        (Hidden(), "Call view.attend(q, k, v) in its place."),
    ):
        looped = ad.RecurrentWrapper(block, 2, skip=skip).train(training)
        with pytest.raises(ValueError, match="has takes_view = True") as error, torch.no_grad():
            looped(torch.randn(2, 3, DIM))
        assert str(error.value) == BESIDE.format(type(block).__name__, cure)


@pytest.mark.plain
def test_it_is_refused_under_a_compiler_too() -> None:
    torch._dynamo.reset()
    looped = ad.RecurrentWrapper(Mixed(DIM, True), 2, skip=False)
    with pytest.raises(Exception, match=r"Call view\.attend"):
        torch.compile(looped, backend="eager", fullgraph=True)(torch.randn(2, 3, DIM))


@both
@pytest.mark.parametrize("rule", [None, ad.Threshold(0.5)])
@pytest.mark.parametrize(("shape", "padded"), [((2, 3), True), ((0, 3), False), ((2, 0), False)])
def test_a_pass_in_which_nothing_runs_has_a_gradient_of_zero(
    shape: tuple[int, int], padded: bool, rule: ad.Rule | None, skip: bool
) -> None:
    layer = nn.TransformerEncoderLayer(DIM, 2, 16, dropout=0.0, batch_first=True)
    looped = ad.RecurrentWrapper(ad.CausalEncoder(layer), STEPS, ad.LinearGate(DIM), rule, ad.Interpolate(), skip=skip)
    for least in (None, 2, STEPS):
        looped.zero_grad(set_to_none=True)
        mask = torch.zeros(shape, dtype=torch.bool) if padded else None
        out = looped(torch.randn(*shape, DIM), mask=mask, min_depth=least)
        assert out.hidden.shape == (*shape, DIM)
        out.hidden.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both
def test_soft_exits_add_up_in_float32(skip: bool, dtype: torch.dtype) -> None:
    """Many small shares of a half-precision state: the sum is rounded once, at the end."""
    gate = ad.LinearGate(DIM, bias=1.0)
    looped = ad.RecurrentWrapper(PreNorm(DIM, True), 8, gate, ad.Survival(), ad.Interpolate(), skip=skip).to(dtype)
    out = looped(torch.randn(2, 6, DIM).to(dtype), states=True)
    want = (out.trace.exit_probs.unsqueeze(-1) * the(Tensor, out.states).float()).sum(2)
    assert out.hidden.dtype == dtype
    assert torch.equal(out.hidden, want.to(dtype)) or (out.hidden.float() - want).abs().max() <= (
        torch.finfo(dtype).eps / 2 * want.abs().max()
    )


class Norm32(PreNorm):
    """Norms in float32, whatever it runs in."""

    def __init__(self) -> None:
        super().__init__(DIM, True)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x.float()).to(x.dtype))


class Tables(PreNorm):
    """Knows eight positions and two iterations."""

    def __init__(self) -> None:
        super().__init__(DIM, True)
        self.places, self.iterations = nn.Embedding(8, DIM), nn.Embedding(2, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.places(ad.positions()) + self.iterations(ad.iteration()))


class Lone(PreNorm):
    """Fails on one token."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            raise RuntimeError("no")
        return super().forward(x)


def test_check_block_takes_a_block_as_it_is() -> None:
    ad.check_block(Norm32(), DIM)
    ad.check_block(PreNorm(DIM, True).bfloat16(), DIM)
    ad.check_block(Tables(), DIM, steps=2, seq=8)
    with pytest.raises(IndexError):
        ad.check_block(Tables(), DIM, steps=2)
    with pytest.raises(RuntimeError, match="no"):
        ad.check_block(Lone(DIM, True), DIM)


@pytest.mark.parametrize("layers", [None, 2])
def test_a_causal_encoder_by_itself_is_causal(layers: int | None) -> None:
    layer: Any = nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, dropout=0.0, batch_first=True)
    encoder = layer if layers is None else nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    prelude, x = ad.CausalEncoder(encoder).eval(), torch.randn(2, 6, DIM)
    want = encoder(x, nn.Transformer.generate_square_subsequent_mask(6), is_causal=True)
    with torch.no_grad():
        torch.testing.assert_close(prelude(x), want, rtol=1e-4, atol=1e-5)
