"""A wrapper checks itself once, on a few tokens of its own input; `check_looped` does so on all of them."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks_zoo import BLOCKS, DIM, PreNorm, Quantised, looped
from narrow import the
from torch import Tensor, nn
from torch.nn.attention.bias import causal_upper_left
from torch.utils.checkpoint import checkpoint

import adadepth as ad

STEPS = 3
NOTE = (
    "RecurrentWrapper found this in its self check, which runs once, on a few tokens, before it first skips any. "
    "looped.self_check = False turns it off."
)


@pytest.fixture(autouse=True)
def checking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ad.RecurrentWrapper, "self_check", True)


class Counts(PreNorm):
    """Learned positions, counted by the length of the input."""

    def __init__(self) -> None:
        super().__init__(DIM, True)
        self.place = nn.Embedding(512, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.place.weight[: x.shape[1]])


class Capacity(PreNorm):
    """Only the first 32 tokens of all get more than attention."""

    def forward(self, x: Tensor) -> Tensor:
        kept = (torch.arange(x.shape[0] * x.shape[1]) < 32).unsqueeze(-1)
        return super().forward(x) + torch.where(kept, x.flatten(0, 1), 0).view_as(x)


class DropPath(nn.Module):
    """Stochastic depth, as it is usually written."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(0.5) * 2 if self.training else x


class Stochastic(PreNorm):
    def __init__(self) -> None:
        super().__init__(DIM, True)
        self.drop = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(super().forward(x) - x)


class BatchNorm(PreNorm):
    def __init__(self) -> None:
        super().__init__(DIM, True)
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2))


class Memory(nn.Module):
    """Cross-attention to a memory of the sequence's own length."""

    def __init__(self, memory: Tensor) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (x, self.memory, self.memory))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def mixes(block: str, mode: str, where: str) -> str:
    return (
        rf"{block} mixes tokens outside its attention calls: in {mode} mode packed and dense execution differ by "
        rf"\S+ relative, first in {where}. A looped block may mix tokens in attention only, and must read "
        r"positions from adadepth.positions\(\) or view.positions."
    )


WRONG: dict[str, tuple[Callable[[], nn.Module], bool, str]] = {
    "positions": (Counts, False, mixes("Counts", "evaluation", r"norm1 \(LayerNorm\)")),
    "capacity": (
        lambda: Capacity(DIM, True),
        False,
        mixes("Capacity", "evaluation", r"(the block itself \(Capacity\)|its own forward, at a later iteration)"),
    ),
    "batch norm": (BatchNorm, True, mixes("BatchNorm", "training", r"norm \(BatchNorm1d\)")),
    "drop path": (
        Stochastic,
        True,
        r"Stochastic draws noise that is neither for each token nor for the whole batch, in drop \(DropPath\): packed "
        r"tokens of different rows are in one sequence and would share it. Draw it for each token; or draw one for "
        r"each row of the batch, and read noise\[adadepth.rows\(\)\].",
    ),
}


def mixed_depths(x: Tensor, steps: int = STEPS) -> Tensor:
    return 1 + torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) % steps


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_block_is_refused_where_it_first_skips(name: str, skip: bool, padded: bool) -> None:
    make, training, message = WRONG[name]
    loop = ad.RecurrentWrapper(make(), STEPS, skip=skip).train(training)
    x = torch.randn(6, 40, DIM)
    loop(x)  # nothing is skipped yet
    call: dict[str, Any] = {"mask": torch.rand(6, 40) < 0.8} if padded else {"max_depth": mixed_depths(x)}
    for _ in range(2):  # and again, as long as it is wrong
        with pytest.raises(ValueError, match=f"^{message}") as error:
            loop(x, **call)
        assert error.value.__notes__ == [NOTE]
    loop.self_check = False
    loop(x, **call)


def test_it_looks_where_the_tokens_are() -> None:
    mask = (torch.arange(200) >= 150).expand(2, -1)
    with pytest.raises(ValueError, match=r"^Counts mixes tokens"):
        ad.RecurrentWrapper(Counts(), STEPS).eval()(torch.randn(2, 200, DIM), mask=mask)


@pytest.mark.parametrize("name", WRONG)
def test_check_looped_refuses_it_too(name: str) -> None:
    make, training, message = WRONG[name]
    with pytest.raises(ValueError, match=f"^{message}$"):
        ad.check_looped(ad.RecurrentWrapper(make(), STEPS).train(training), torch.randn(6, 40, DIM))


@pytest.mark.parametrize("skip", [True, False])
def test_a_memory_as_long_as_the_sequence_is_refused(skip: bool) -> None:
    loop = ad.RecurrentWrapper(Memory(torch.randn(2, 5, DIM)), 1, causal=False, skip=skip)
    with pytest.raises(ValueError, match="Other keys of another length cannot be looped"):
        loop(torch.randn(2, 5, DIM), mask=torch.tensor([[1, 1, 1, 0, 0], [1] * 5]).bool())


# Each kind once, with or without skipping, in one mode; `make test-every` has the rest.
GOOD = [
    pytest.param(kind, skip, training, marks=[pytest.mark.every] if 2 * skip + training != i % 4 else [])
    for i, kind in enumerate(BLOCKS)
    for skip in (True, False)
    for training in (True, False)
]


@pytest.mark.parametrize(("kind", "skip", "training"), GOOD)
def test_every_good_block_passes(kind: str, skip: bool, training: bool) -> None:
    loop = looped(kind, skip=skip).train(training)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.7
    x = torch.randn(3, 9, DIM).double()
    loop(x, mask=mask)
    ad.check_looped(loop, x, mask)
    if not training:
        with torch.no_grad():
            loop(x[:, :1], cache=ad.KVReuseCache())
        ad.check_looped(loop, torch.randn(1, 1, DIM).double())


class Conditioned(PreNorm):
    """A condition `(batch, dim)` for each row; `mix` is done to the rows."""

    def __init__(self, mix: Callable[[Tensor], Tensor] = torch.sin, causal: bool = True, attends: bool = True) -> None:
        super().__init__(DIM, causal)
        self.mix, self.attends = mix, attends

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        x = x * (1 + c[:, None])
        return (super().forward(x) if self.attends else x) + self.mix(x)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return out


def by_hand(x: Tensor) -> Tensor:
    return (x @ x.transpose(1, 2)).softmax(-1) @ x


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "convolution": Convolution(),
    "mean": lambda x: x.mean(1, keepdim=True).expand_as(x),
    "attention by hand": by_hand,
    "positions": lambda x: torch.arange(x.shape[1], dtype=x.dtype)[:, None].expand_as(x),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_tokens_that_mix_behind_row_per_token_are_found(mix: str, causal: bool) -> None:
    """There packed and dense execution agree: each token is a row of its own in both."""
    block: nn.Module = ad.RowPerToken(Conditioned(MIXES[mix], causal))
    if mix == "attention by hand":  # as one tries if no attention call is seen
        block = ad.Pointwise(ad.RowPerToken(Conditioned(MIXES[mix], attends=False)))
    loop = ad.RecurrentWrapper(block, STEPS, causal=causal)
    x = torch.randn(3, 8, DIM)
    call: dict[str, Any] = {"max_depth": mixed_depths(x), "block_kwargs": {"c": torch.randn(3, 1, DIM)}}
    message = (
        r"Conditioned gives another result behind RowPerToken than on whole rows: one iteration differs by \S+ "
        r"relative. RowPerToken is for blocks that mix tokens in F.scaled_dot_product_attention only. Replace "
        r"convolutions, means and other attention over the row, and read positions from adadepth.positions\(\)."
    )
    with pytest.raises(ValueError, match=f"^{message}") as error:
        loop(x, **call)
    assert error.value.__notes__ == [NOTE]
    with pytest.raises(ValueError, match=f"^{message}$"):
        ad.check_looped(loop, x, **call)


def test_a_block_that_attends_to_later_tokens_is_found_in_a_causal_loop() -> None:
    """Each token is a row of its own, so no attention call says whether it is causal."""
    loop = ad.RecurrentWrapper(ad.RowPerToken(Conditioned(causal=False)), STEPS)
    x = torch.randn(3, 8, DIM)
    call: dict[str, Any] = {"max_depth": mixed_depths(x), "block_kwargs": {"c": torch.randn(3, 1, DIM)}}
    message = re.escape(
        "RecurrentWrapper(causal=True) expected causal attention, but Conditioned attends to later tokens. Pass "
        "causal=False to the wrapper, or is_causal=True in the block."
    )
    with pytest.raises(ValueError, match=f"^{message}") as error:
        loop(x, **call)
    assert error.value.__notes__ == [NOTE]
    with pytest.raises(ValueError, match=f"^{message}$"):
        ad.check_looped(loop, x, **call)
    loop.causal = False
    ad.check_looped(loop, x, **call)


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.every)])
def test_good_blocks_behind_row_per_token_pass(causal: bool) -> None:
    x, c = torch.randn(3, 8, DIM), torch.randn(3, 1, DIM)
    decoder = nn.TransformerDecoderLayer(DIM, 2, 32, batch_first=True)  # it drops, and attends to later tokens
    blocks: list[tuple[nn.Module, dict[str, Tensor]]] = [
        (Conditioned(causal=causal), {"c": c}),
        (Conditioned(lambda x: x * ad.positions().reshape(len(x), -1, 1), causal), {"c": c}),
        (decoder, {"memory": torch.randn(3, 1, 4, DIM)}),
        (Conditioned(causal=causal), {"c": torch.randn(3, 8, DIM)}),  # of each token: no whole row has one
        (Conditioned(causal=causal), {"c": torch.randn(1, 1, DIM)}),
        (Conditioned(attends=False), {"c": c}),
    ]
    for block, given in blocks:
        for training in (True, False):
            apart: nn.Module = ad.RowPerToken(block)
            apart = apart if getattr(block, "attends", True) else ad.Pointwise(apart)
            loop = ad.RecurrentWrapper(apart, STEPS, causal=causal).train(training)
            for mask in (None, torch.rand(3, 8) < 0.7):
                loop(x, mask=mask, max_depth=mixed_depths(x), block_kwargs=given)
            ad.check_looped(loop, x, block_kwargs=given)
            assert loop.training == block.training == training


class Relative(ad.Gate):
    """A score relative to the mean over whatever tokens come."""

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        z = h.sum(-1)
        return (z - (z.mean() if z.numel() else 0)).sigmoid()


class Normed(ad.Gate):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = nn.BatchNorm1d(DIM), nn.Linear(DIM, 1)

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        score: Tensor = self.proj(self.norm(h.mT).mT).squeeze(-1).sigmoid()
        return score


class Counted(ad.Gate):
    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(512))

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        return (h.mean(-1) + self.place[: h.shape[1]]).sigmoid()


class Inner(ad.Gate):
    def __init__(self) -> None:
        super().__init__()
        self.looped = ad.RecurrentWrapper(PreNorm(DIM, True), 1)

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        return self.looped(h).hidden.mean(-1).sigmoid()


class Centred(ad.Update):
    def forward(self, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int) -> Tensor:
        return h - (h.mean((0, 1)) if h.shape[1] else 0)


def sorts(piece: str) -> str:
    return (
        rf"{piece} gives packed tokens another result than tokens in rows: in training mode packed and dense execution "
        r"differ by \S+ relative. Gates and updates must treat each token on its own; adadepth.testing has suites for "
        r"them."
    )


@pytest.mark.parametrize("update", [ad.Interpolate, ad.Replace, ad.InputInjection, lambda: ad.Ungated(ad.Residual())])
@pytest.mark.parametrize("gate", [Relative, Normed, Counted, Inner])
def test_a_gate_that_mixes_tokens_is_named(gate: Callable[[], ad.Gate], update: Callable[[], ad.Update]) -> None:
    loop = ad.RecurrentWrapper(PreNorm(DIM, True), STEPS, gate(), ad.Threshold(0.1), update())
    x = torch.randn(3, 9, DIM)
    message = sorts(type(loop.gate).__name__)
    with pytest.raises(ValueError, match=f"^{message}") as error:
        loop(x, max_depth=mixed_depths(x))
    assert error.value.__notes__ == [NOTE]
    with pytest.raises(ValueError, match=f"^{message}$"):
        ad.check_looped(loop, x)


def test_attention_to_a_memory_draws_nothing() -> None:
    """PyTorch's attention is tagged as random: a block that calls it past the loop was never compared."""
    block = ad.RowPerToken(nn.TransformerDecoderLayer(DIM, 2, 32, dropout=0.0, batch_first=True))
    loop = ad.RecurrentWrapper(block, STEPS, Relative(), ad.Threshold(0.1), ad.Replace())
    x, given = torch.randn(3, 9, DIM), {"memory": torch.randn(3, 1, 4, DIM)}
    with pytest.raises(ValueError, match=f"^{sorts('Relative')}"):
        loop(x, max_depth=mixed_depths(x), block_kwargs=given)


@pytest.mark.parametrize("gate", [None, ad.LinearGate(DIM)])
def test_an_update_that_mixes_tokens_is_named(gate: ad.Gate | None) -> None:
    loop = ad.RecurrentWrapper(PreNorm(DIM, True), STEPS, gate, update=Centred())
    x = torch.randn(3, 9, DIM)
    with pytest.raises(ValueError, match=f"^{sorts('Centred')}"):
        loop(x, max_depth=mixed_depths(x))


class Rounded(PreNorm):
    """Rounds in another way for another number of rows, and changes its input by no more than a `share`."""

    def __init__(self, share: float) -> None:
        super().__init__(DIM, True)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return x + self.share * (super().forward(x) - x) + 4 * torch.finfo(x.dtype).eps * len(x)


class Steep(ad.Gate):
    """A choice, in which rounding can turn a tie."""

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        return (h.sum(-1) > 0).to(h.dtype)


@pytest.mark.parametrize(
    ("gate", "dtype", "share"), [(Steep, torch.bfloat16, 1.0), (ad.ConvergenceGate, torch.float32, 1e-6)]
)
def test_scores_that_rounding_changes_are_no_fault(
    gate: Callable[[], ad.Gate], dtype: torch.dtype, share: float
) -> None:
    x = torch.randn(3, 32, DIM).to(dtype)
    loop = ad.RecurrentWrapper(Rounded(share).to(dtype), STEPS, gate(), ad.Threshold(0.0), ad.Replace())
    packed = loop(x, max_depth=mixed_depths(x)).trace.scores
    assert loop._checked
    loop.skip = False
    assert not torch.allclose(packed, loop(x, max_depth=mixed_depths(x)).trace.scores, rtol=0.01, atol=0)


class Coarse(PreNorm):
    """Rounds in another way for another number of rows, by as much as half precision does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 2e-3 * len(x)


def test_quantised_layers_may_round_as_in_half_precision() -> None:
    loop = ad.RecurrentWrapper(Coarse(DIM, True), STEPS)
    x = torch.randn(3, 32, DIM)
    with pytest.raises(ValueError, match="Coarse mixes tokens"):
        loop(x, max_depth=mixed_depths(x))
    loop.block.quantised = Quantised(DIM)
    loop(x, max_depth=mixed_depths(x))
    assert loop._checked


def test_checks_do_not_pack_quantised_layers() -> None:
    block = nn.Sequential(PreNorm(DIM, True), Quantised(DIM))
    loop = ad.RecurrentWrapper(block, STEPS)
    x = torch.randn(3, 32, DIM, requires_grad=True)
    ad.check_looped(loop, x.detach(), max_depth=mixed_depths(x))
    loop(x, max_depth=mixed_depths(x)).hidden.sum().backward()
    assert loop._checked
    assert all(part.training for part in loop.modules())
    assert the(Tensor, x.grad).abs().sum() > 0
    assert not block[1].packed


def noise(like: Tensor, per: str) -> Tensor:
    """Noise for each token, each row, or the whole call."""
    rows, length = like.shape[:2]
    return torch.rand({"token": (rows, length, 1), "row": (rows, 1, 1), "call": (1, 1, 1)}[per])


class NoisyGate(ad.Gate):
    def __init__(self, per: str) -> None:
        super().__init__()
        self.per = per

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        return (h.mean(-1, keepdim=True) + noise(h, self.per)).sigmoid().squeeze(-1)


class Blur(nn.Module):
    def __init__(self, per: str) -> None:
        super().__init__()
        self.per = per

    def forward(self, x: Tensor) -> Tensor:
        return x * noise(x, self.per)


class NoisyUpdate(ad.Update):
    def __init__(self, per: str) -> None:
        super().__init__()
        self.blur = Blur(per)

    def forward(self, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int) -> Tensor:
        return x + self.blur(h)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "piece", "where"),
    [("gate", NoisyGate, r"the gate itself \(NoisyGate\)"), ("update", NoisyUpdate, r"blur \(Blur\)")],
)
def test_noise_of_a_gate_or_an_update_is_watched(name: str, piece: Any, where: str, training: bool) -> None:
    x = torch.randn(3, 9, DIM)

    def loop(per: str) -> ad.RecurrentWrapper:
        pieces: dict[str, Any] = {"gate": ad.LinearGate(DIM), "rule": ad.Threshold(0.0), name: piece(per)}
        return ad.RecurrentWrapper(PreNorm(DIM, True), STEPS, **pieces).train(training)

    for right in ("token", "call"):
        loop(right)(x, max_depth=mixed_depths(x))
        ad.check_looped(loop(right), x)
    message = (
        rf"{piece.__name__} draws noise that is neither for each token nor for the whole batch, in {where}: packed "
        r"tokens of different rows are in one sequence and would share it. Draw it for each token; or draw one for "
        r"each row of the batch, and read noise\[adadepth.rows\(\)\]."
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        loop("row")(x, max_depth=mixed_depths(x))
    with pytest.raises(ValueError, match=f"^{message}$"):
        ad.check_looped(loop("row"), x)


def test_noise_in_evaluation_is_no_fault_of_a_cache() -> None:
    class Blurred(PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.1 * torch.randn_like(x))

    ad.check_looped(ad.RecurrentWrapper(Blurred(DIM, True), STEPS).eval(), torch.randn(3, 9, DIM))


class Subclassed(PreNorm):
    """Makes a subclass of a tensor that does not exist under a dispatch mode."""

    def __init__(self, mixes: bool = False) -> None:
        super().__init__(DIM, True)
        self.mixes = mixes

    def forward(self, x: Tensor) -> Tensor:
        mask = causal_upper_left(x.shape[1], x.shape[1])
        h = x.unsqueeze(1)
        x = x + F.scaled_dot_product_attention(h, h, h, attn_mask=mask).squeeze(1)
        return x + x.mean((0, 1)) if self.mixes else x


def test_a_block_that_cannot_be_watched_is_compared_nevertheless() -> None:
    x = torch.randn(3, 9, DIM)
    loop = ad.RecurrentWrapper(Subclassed(), STEPS)
    loop(x, max_depth=mixed_depths(x))
    ad.check_looped(loop, x)
    ad.testing.check_block(Subclassed(), DIM)
    with pytest.raises(ValueError, match=r"^Subclassed mixes tokens outside its attention calls"):
        ad.RecurrentWrapper(Subclassed(mixes=True), STEPS)(x, max_depth=mixed_depths(x))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_loop_with_one_call_checks_itself() -> None:
    """Recording draws needs a dispatch mode, and flex attention does not run under one."""
    x = torch.randn(3, 9, DIM)
    loop = ad.RecurrentWrapper(PreNorm(DIM, True), STEPS).eval()
    loop.one_call = True
    with torch.no_grad():
        out = loop(x, max_depth=mixed_depths(x)).hidden
        assert loop._checked
        loop.one_call = False
        assert torch.allclose(out, loop(x, max_depth=mixed_depths(x)).hidden, atol=1e-5)
    loop.one_call = True
    loop.block = Counts().eval()
    with pytest.raises(ValueError, match=f"^{WRONG['positions'][2]}"), torch.no_grad():
        loop(x, max_depth=mixed_depths(x))


class Remembers(PreNorm):
    """Leaves traces of every kind: a buffer, an attribute, a list, a dict, random numbers."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__(DIM, True)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None
        self.losses, self.seen = [torch.zeros(())], {"first": torch.zeros(())}
        self.noise: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.losses.append(x.square().mean())
        self.seen["first"] = x[0, 0, 0]
        self.seen[f"length {x.shape[1]}"] = x.sum()
        return self.drop(super().forward(x)) + 1e-3 * torch.randn(x.shape, generator=self.noise)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_changed_and_no_number_is_other(training: bool) -> None:
    x, outs = torch.randn(3, 9, DIM), []
    original = Remembers()
    for check in (True, False):
        block = copy.deepcopy(original)
        block.noise, losses, seen = torch.Generator().manual_seed(4), block.losses, block.seen
        loop = ad.RecurrentWrapper(block, STEPS).train(training)
        loop.self_check = check
        torch.manual_seed(3)
        out = loop(x.requires_grad_(), max_depth=mixed_depths(x))
        left = [out.hidden, torch.rand(3), block.calls.clone(), the(Tensor, block.last), torch.stack(losses)]
        left += [*(seen[name] for name in sorted(seen)), block.noise.get_state()]
        assert block.losses is losses and block.seen is seen
        assert all(p.grad is None for p in loop.parameters())
        assert block.drop.p == 0.3 and all(m.training is training for m in loop.modules())
        assert all(not hooks for part in loop.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks))
        (grad,) = torch.autograd.grad(out.hidden.sum(), x)
        outs.append([*left, grad])
    for checked, not_checked in zip(*outs, strict=True):
        assert torch.equal(checked, not_checked)


class Counting(PreNorm):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x)


def calls(run: Callable[[], object]) -> int:
    before = Counting.calls
    run()
    return Counting.calls - before


def test_it_happens_once_for_one_row_and_once_for_several_and_again_for_another_block() -> None:
    loop = ad.RecurrentWrapper(Counting(DIM, True), STEPS).eval()
    x = torch.randn(3, 9, DIM)
    depth = mixed_depths(x)
    assert calls(lambda: loop(x)) == STEPS  # nothing skipped, nothing checked
    assert calls(lambda: loop(x[:1], max_depth=depth[:1])) > STEPS
    assert calls(lambda: loop(x[:1], max_depth=depth[:1])) == STEPS
    assert calls(lambda: loop(x, max_depth=depth)) > STEPS
    for _ in range(2):
        assert calls(lambda: loop(x, max_depth=depth)) == STEPS
    assert calls(lambda: loop(x[:1], max_depth=depth[:1])) == STEPS
    loop.block = Counting(DIM, True)
    assert calls(lambda: loop(x, max_depth=depth)) > STEPS
    loop.train()
    assert calls(lambda: loop(x, max_depth=depth)) > STEPS  # what is wrong in training alone
    loop.block, loop.self_check = Counting(DIM, True), False
    assert calls(lambda: loop(x, max_depth=depth)) == STEPS


def test_it_looks_at_a_bounded_number_of_tokens() -> None:
    class Sizes(PreNorm):
        seen: list[int] = []  # noqa: RUF012

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x.shape[0] * x.shape[1])
            return super().forward(x)

    loop = ad.RecurrentWrapper(Sizes(DIM, True), STEPS).eval()
    x = torch.randn(9, 300, DIM)
    loop(x, max_depth=mixed_depths(x))
    assert sorted(Sizes.seen)[-STEPS:] == sorted([9 * 300, *(9 * 300 * i // STEPS for i in range(1, STEPS))])
    assert all(size <= 4 * 64 for size in sorted(Sizes.seen)[:-STEPS])


def test_a_window_of_left_padded_rows_holds_real_tokens() -> None:
    """Row 0 alone is real in the first 64 columns."""

    class Sees(PreNorm):
        rows: set[int] = set()  # noqa: RUF012

        def forward(self, x: Tensor) -> Tensor:
            self.rows.update(ad.rows().unique().tolist())
            return super().forward(x + ad.take(extra) * per_row[ad.rows()])

    extra, per_row = torch.randn(5, 200, DIM), torch.randn(5, DIM)
    mask = torch.arange(200) >= torch.tensor([0, 150, 150, 150, 150]).unsqueeze(1)
    loop = ad.RecurrentWrapper(Sees(DIM, True), 1).eval()
    loop(torch.randn(5, 200, DIM), mask=mask, block_kwargs=None)
    assert Sees.rows == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38])
@pytest.mark.parametrize("skip", [True, False])
def test_an_input_that_is_not_finite_is_no_fault(value: float, skip: bool) -> None:
    x = torch.randn(2, 5, DIM)
    x[0, 0, 0] = value
    gate = ad.LinearGate(DIM, 0.0)
    for block in (ad.Pointwise(nn.Linear(DIM, DIM)), PreNorm(DIM, True)):
        ad.RecurrentWrapper(block, 4, gate, ad.Survival(), ad.SurvivalScaled(ad.Interpolate()), skip=skip).train()(
            x, max_depth=torch.tensor([[2], [4]])
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_half_precision_is_no_fault(dtype: torch.dtype) -> None:
    x = torch.randn(3, 9, DIM).to(dtype)
    loop = ad.RecurrentWrapper(PreNorm(DIM, True).to(dtype), STEPS)
    loop(x, max_depth=mixed_depths(x))
    ad.check_looped(loop, x)
    with pytest.raises(ValueError, match="mixes tokens outside its attention calls"):
        ad.check_looped(ad.RecurrentWrapper(Counts().to(dtype), STEPS), x)


@pytest.mark.parametrize("surroundings", ["inference", "autocast", "checkpoint", "no_grad", "seeded"])
def test_it_keeps_to_itself_wherever_it_runs(surroundings: str) -> None:
    loop = ad.RecurrentWrapper(PreNorm(DIM, True), STEPS, checkpoint=surroundings == "checkpoint")
    x = torch.randn(3, 9, DIM)

    def run() -> Tensor:
        return loop(x, max_depth=mixed_depths(x)).hidden

    if surroundings == "inference":
        with torch.inference_mode():
            run()
    elif surroundings == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            run().sum().backward()
    elif surroundings == "checkpoint":
        checkpoint(run, use_reentrant=False).sum().backward()
    elif surroundings == "no_grad":
        with torch.no_grad():
            run()
    else:
        run().sum().backward()
    assert loop._checked


@pytest.mark.plain
@pytest.mark.skipif(torch.__version__ < "2.9", reason="Dynamo of torch 2.8 does not trace the loop")
def test_a_compiled_loop_does_not_check_itself() -> None:
    loop = ad.RecurrentWrapper(Counting(DIM, True), STEPS, skip=False)
    x = torch.randn(3, 9, DIM)
    compiled = torch.compile(loop, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, max_depth=mixed_depths(x)).hidden, loop(x, max_depth=mixed_depths(x)).hidden)


def test_check_looped_finds_what_a_cache_does_otherwise() -> None:
    class Grows(PreNorm):
        """Is another block in every pass."""

        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return super().forward(x + 0.1 * self.passes)

    loop = ad.RecurrentWrapper(Grows(DIM, True), 1)
    with pytest.raises(ValueError, match=r"^Grows gives another result with a cache than without: a prompt and later"):
        ad.check_looped(loop, torch.randn(2, 7, DIM))
    assert loop.block.passes == 0
    ad.check_looped(ad.RecurrentWrapper(Grows(DIM, False), 1, causal=False), torch.randn(2, 7, DIM))


@pytest.mark.shapes
def test_check_looped_takes_the_call_as_it_will_be() -> None:
    loop = looped("attention")
    x = torch.randn(3, 9, DIM).double()
    before = {name: value.clone() for name, value in loop.state_dict().items()}
    ad.check_looped(loop, x, torch.rand(3, 9) < 0.8, start=torch.randn_like(x), max_depth=torch.tensor([[4], [2], [1]]))
    assert all(torch.equal(value, before[name]) for name, value in loop.state_dict().items())
    with pytest.raises(ValueError, match="does not take attention_mask"):
        ad.check_looped(loop, x, attention_mask=None)


def test_row_per_token_refuses_blocks_that_take_the_view() -> None:
    block: Any = PreNorm(DIM, True)
    block.takes_view = True
    for wrong, remedy in (
        (ad.Pointwise(nn.Linear(DIM, DIM)), "Write Pointwise(RowPerToken(block))."),
        (block, "Give it to RecurrentWrapper itself, and let it read a row's condition as c[adadepth.rows()]."),
    ):
        with pytest.raises(ValueError, match="RowPerToken") as error:
            ad.RowPerToken(wrong)
        name = type(wrong).__name__
        assert str(error.value) == f"RowPerToken expected a block that does not take the view, got {name}. {remedy}"
