"""What a block reads beside its input: by `block_kwargs`, and by rows(), take(), positions() and iteration()."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import the
from torch import Tensor, nn

import adadepth as ad

DIM, HEADS, STEPS = 8, 2, 3


def attend(qkv: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class AdaLN(nn.Module):
    """A block of DiT: shift, scale and gate of both halves from one vector per row."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM, elementwise_affine=False)
        self.qkv, self.out, self.mlp = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.modulation = nn.Linear(DIM, 6 * DIM)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, -1)
        x = x + gate * self.out(attend(self.qkv(self.norm(x) * (1 + scale) + shift)))
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2).tanh()


class PerToken(nn.Module):
    """A second embedding for each token, rotated by a table that all rows share, in one tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, extra: Tensor, tables: tuple[Tensor, dict[str, Tensor]], scale: float = 1.0) -> Tensor:
        shared, more = tables
        y = x + extra * shared + more["bias"]
        return x + scale * self.out(attend(self.qkv(y)))


class Inside(AdaLN):
    """The same as AdaLN, of which nothing is passed: it reads what it needs."""

    c: Tensor
    per_token: Tensor

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = super().forward(x, self.c[ad.rows()])
        return y + ad.take(self.per_token) * (1 + ad.iteration() + ad.positions()).unsqueeze(-1)


class Passed(AdaLN):
    """The same as `Inside`, by arguments."""

    def forward(self, x: Tensor, c: Tensor, extra: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, c) + extra * (1 + ad.iteration() + ad.positions()).unsqueeze(-1)


def row_by_row(block: Callable[[Tensor, int, Tensor, int], Tensor], x: Tensor, mask: Tensor, depth: Tensor) -> Tensor:
    """The oracle: each row's real tokens alone, every iteration on all tokens, and each token's state at its depth.

    Right where deeper tokens do not attend to shallower ones: hence depths that never rise along a row.
    """
    out = torch.zeros_like(x)
    for row in range(len(x)):
        real = mask[row].nonzero().squeeze(1)
        state = x[row, real]
        for step in range(STEPS):
            state = block(state[None], row, real, step)[0]
            ends = real[depth[row, real] == step + 1]
            out[row, ends] = state[torch.isin(real, ends)]
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their masks, and depths that never rise along a row."""
    torch.manual_seed(draw(st.integers(0, 9)))
    batch, seq = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    mask = torch.rand(batch, seq) < draw(st.sampled_from([0.6, 1.0]))
    depth = torch.randint(1, STEPS + 1, (batch, seq)).sort(1, descending=True).values
    return torch.randn(batch, seq, DIM, dtype=torch.float64), mask, depth


def executions(block: nn.Module, x: Tensor, mask: Tensor, depth: Tensor, **given: Any) -> list[Tensor]:
    """Packed, dense, and a prompt with one token after the other behind it."""
    made = [ad.RecurrentWrapper(block, STEPS, skip=skip).eval() for skip in (True, False)]
    call: dict[str, Any] = {"min_depth": depth, "max_depth": depth, "block_kwargs": given}
    whole = [looped(x, mask=mask, **call).hidden for looped in made]
    cache, seq, parts = ad.KVReuseCache(), x.shape[1], []
    cuts = [0, seq // 2, *range(seq // 2 + 1, seq + 1)]
    for first, last in pairwise(cuts):

        def cut(t: Any, columns: slice = slice(first, last)) -> Any:
            if isinstance(t, dict):
                return {name: cut(value, columns) for name, value in t.items()}
            if isinstance(t, tuple):
                return tuple(cut(value, columns) for value in t)
            return t[:, columns] if isinstance(t, Tensor) and t.shape[1] == seq else t

        part = {"min_depth": cut(depth), "max_depth": cut(depth), "block_kwargs": cut(given)}
        with torch.no_grad():
            parts.append(made[0](cut(x), mask=cut(mask), cache=cache, **part).hidden)
    return [*whole, torch.cat(parts, 1)]


def close(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= 1e-10 * want.abs().max().clamp_min(1) if want.numel() else True


@settings(max_examples=30)
@given(cases())
def test_a_vector_per_row_conditions_every_execution(case: tuple[Tensor, Tensor, Tensor]) -> None:
    x, mask, depth = case
    block = AdaLN().double()
    c = torch.randn(len(x), 1, DIM, dtype=torch.float64)
    want = row_by_row(lambda state, row, real, step: block(state, c[row : row + 1]), x, mask, depth)
    # All that a deeper token attends to has gone as deep; what is not so deep attends to it in its own iteration.
    for got in executions(block, x, mask, depth, c=c):
        close(got[mask], want[mask])


@settings(max_examples=30)
@given(cases())
def test_an_input_per_token_conditions_every_execution(case: tuple[Tensor, Tensor, Tensor]) -> None:
    x, mask, depth = case
    block, (batch, seq) = PerToken().double(), mask.shape
    extra, shared = torch.randn(batch, seq, DIM).double(), torch.randn(1, seq, DIM).double()
    bias = torch.randn(batch, 1, DIM).double()
    tables = (shared, {"bias": bias})

    def oracle(state: Tensor, row: int, real: Tensor, step: int) -> Tensor:
        return block(state, extra[row, real], (shared[0, real], {"bias": bias[row]}), scale=0.5)

    want = row_by_row(oracle, x, mask, depth)
    for got in executions(block, x, mask, depth, extra=extra, tables=tables, scale=0.5):
        close(got[mask], want[mask])


@settings(max_examples=20)
@given(cases())
def test_what_a_block_reads_inside_is_what_it_could_be_passed(case: tuple[Tensor, Tensor, Tensor]) -> None:
    x, mask, depth = case
    passed, inside = Passed().double(), Inside().double()
    inside.load_state_dict(passed.state_dict())
    inside.c, inside.per_token = torch.randn(len(x), DIM).double(), torch.randn_like(x)
    depth = torch.randint(1, STEPS + 1, depth.shape)  # any: both are looped
    call: dict[str, Any] = {"mask": mask, "min_depth": depth, "max_depth": depth}
    want = ad.RecurrentWrapper(passed, STEPS, skip=False)(
        x, **call, block_kwargs={"c": inside.c.unsqueeze(1), "extra": inside.per_token}
    )
    for skip in (True, False):
        close(ad.RecurrentWrapper(inside, STEPS, skip=skip)(x, **call).hidden, want.hidden)


class Knows(ad.Gate):
    """Goes on by its row, its place, its token and its iteration."""

    bias: Tensor

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        row, place, at = (t.double() for t in (ad.rows(), ad.positions(), ad.iteration()))
        return 0.1 * row + 0.05 * place + ad.take(self.bias) - 0.1 * at


class Reads(ad.Update):
    """Adds what its row, its place and its token say."""

    bias: Tensor

    def forward(self, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int) -> Tensor:
        row, place, at = (t.double() for t in (ad.rows(), ad.positions(), ad.iteration()))
        return h + (ad.take(self.bias) + row - 0.3 * place + at).unsqueeze(-1)


@pytest.mark.shapes
@pytest.mark.parametrize("padded", [True, False])
def test_gates_and_updates_know_where_a_token_stands(padded: bool) -> None:
    x, bias = torch.randn(3, 5, DIM).double(), torch.rand(3, 5).double()
    mask = (
        torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 1, 0, 0]]).bool() if padded else torch.ones(3, 5).bool()
    )
    gate, update = Knows(), Reads()
    gate.bias = update.bias = bias
    place = torch.where(mask, mask.cumsum(1) - 1, 0).double()
    row = torch.arange(3).unsqueeze(1).double()
    outs: list[tuple[nn.Module, ad.Output]] = []
    for skip in (True, False):
        looped = ad.RecurrentWrapper(AdaLN().double(), STEPS, gate, ad.Threshold(0.5), update, skip=skip)
        if outs:
            looped.block.load_state_dict(outs[0][0].state_dict())
        out = looped(x, mask=mask, block_kwargs={"c": torch.ones(1, 1, DIM).double()})
        for step in range(STEPS - 1):
            want = 0.1 * row + 0.05 * place + bias - 0.1 * step
            close(out.trace.scores[..., step], torch.where(out.trace.live[..., step], want, 0))
        outs.append((looped.block, out))
    assert torch.equal(outs[0][1].trace.live, outs[1][1].trace.live)
    assert 1 < outs[0][1].trace.depth[mask].double().mean() < STEPS
    close(outs[0][1].hidden, outs[1][1].hidden)


@pytest.mark.plain
@pytest.mark.every
def test_they_work_in_a_compiled_dense_loop() -> None:
    inside = Inside().double()
    x = torch.randn(2, 4, DIM).double()
    inside.c, inside.per_token = torch.randn(2, DIM).double(), torch.randn_like(x)
    gate = Knows()
    gate.bias = torch.rand(2, 4).double()
    looped = ad.RecurrentWrapper(inside, STEPS, gate, ad.Threshold(0.5), skip=False)
    compiled = torch.compile(looped, fullgraph=True, backend="eager")
    close(compiled(x).hidden, looped(x).hidden)


def test_gradients_reach_what_is_passed() -> None:
    x, depth = torch.randn(3, 4, DIM).double(), torch.randint(1, STEPS + 1, (3, 4))
    block, grads = AdaLN().double(), []
    for skip, checkpoint in ((True, False), (False, False), (True, True)):
        c = torch.ones(3, 1, DIM, dtype=torch.float64, requires_grad=True)
        looped = ad.RecurrentWrapper(block, STEPS, skip=skip, checkpoint=checkpoint)
        looped(x, min_depth=depth, max_depth=depth, block_kwargs={"c": c}).hidden.square().sum().backward()
        grads.append(the(Tensor, c.grad))
    for other in grads[1:]:
        close(other, grads[0])


@pytest.mark.parametrize("skip", [True, False])
def test_padding_in_what_is_passed_is_not_read(skip: bool) -> None:
    """What is not a number there would spread through the gradient of a weight, though no state shows it."""
    block = AdaLN()
    mask = torch.tensor([[True, True, False], [False, True, True]])
    c = torch.randn(2, 3, DIM).masked_fill(~mask.unsqueeze(-1), float("nan"))
    ad.RecurrentWrapper(block, 2, skip=skip)(
        torch.randn(2, 3, DIM), mask=mask, block_kwargs={"c": c}
    ).hidden.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in block.parameters() if p.grad is not None)


@pytest.mark.parametrize("shape", [(2, 0), (2, 3)])
def test_a_pass_in_which_nothing_runs_is_given_something(shape: tuple[int, int]) -> None:
    block, x = Inside(), torch.randn(*shape, DIM)
    block.c, block.per_token = torch.randn(shape[0], DIM), x
    looped = ad.RecurrentWrapper(block, STEPS)
    out = looped(x, mask=torch.zeros(shape, dtype=torch.bool))
    assert out.hidden.shape == x.shape and not out.hidden.any()


class Flagged(AdaLN):
    """Turns round the tokens that are not flagged, and divides by a time."""

    def forward(self, x: Tensor, flag: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.where(~flag.unsqueeze(-1), -x, x) / time, torch.ones(1, 1, DIM))


@pytest.mark.parametrize("padded", [False, True])
def test_what_is_passed_keeps_its_dtype_and_its_values_for_exited_tokens(padded: bool) -> None:
    x, flag, time = torch.randn(3, 5, DIM), torch.rand(3, 5) > 0.5, 1 + torch.rand(3, 5, 1)
    mask = torch.arange(5) < torch.tensor([[5], [3], [4]]) if padded else None
    depth, block, got = torch.tensor([[3, 1, 2, 3, 1]]).expand(3, 5), Flagged(), []
    for skip in (True, False):
        loop = ad.RecurrentWrapper(block, STEPS, skip=skip)
        given = {"flag": flag, "time": time.masked_fill(~mask[..., None], 1) if mask is not None else time}
        loop(x, mask=mask, max_depth=depth, block_kwargs=given).hidden.sin().sum().backward()
        got.append([p.grad.clone() for p in block.parameters() if p.grad is not None])
        block.zero_grad()
    assert all(grad.isfinite().all() for grad in got[1])
    for packed, dense in zip(*got, strict=True):
        torch.testing.assert_close(packed, dense, rtol=1e-4, atol=1e-6)


class Writes(AdaLN):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        c += 1
        return super().forward(x, c)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_block_that_writes_into_what_is_passed_is_refused(skip: bool, nested: bool) -> None:
    class Unpacks(Writes):
        def forward(self, x: Tensor, given: tuple[Tensor, ...]) -> Tensor:  # type: ignore[override]
            return super().forward(x, given[0])

    block, c = Unpacks() if nested else Writes(), torch.randn(2, 4, DIM)
    name, passed = ("given", (c,)) if nested else ("c", c)
    message = (
        f"{type(block).__name__} writes into {name}, which is read again later. Make a new tensor, or start with "
        f"{name} = {name}.clone()."
    )
    with torch.no_grad(), pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ad.RecurrentWrapper(block, STEPS, skip=skip)(torch.randn(2, 4, DIM), block_kwargs={name: passed})


@pytest.mark.parametrize("nested", [True, False])
def test_what_is_passed_may_not_change_before_a_checkpointed_iteration_is_computed_again(nested: bool) -> None:
    class Unpacks(AdaLN):
        def forward(self, x: Tensor, c: Any) -> Tensor:
            return super().forward(x, c[0] if nested else c)

    looped, c = ad.RecurrentWrapper(Unpacks(), STEPS, checkpoint=True), torch.randn(2, 4, DIM)
    hidden = looped(torch.randn(2, 4, DIM), block_kwargs={"c": (c,) if nested else c}).hidden
    c.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


class Tables(NamedTuple):
    scale: Tensor
    shift: Tensor


def test_a_named_tuple_reaches_a_block_of_rows_as_one() -> None:
    class Rotated(AdaLN):
        def forward(self, x: Tensor, tables: Tables) -> Tensor:  # type: ignore[override]
            scale, shift = (table.reshape(x.shape) for table in tables)
            return super().forward(x * scale + shift, torch.ones(1, 1, DIM))

    tables, x, block = Tables(torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)), torch.randn(2, 5, DIM), Rotated()
    want = ad.RecurrentWrapper(block, STEPS)(x, block_kwargs={"tables": tables}).hidden
    apart = ad.RecurrentWrapper(ad.RowPerToken(block), STEPS)
    apart.self_check = False  # a row by itself has no such tables
    torch.testing.assert_close(apart(x, block_kwargs={"tables": tables}).hidden, want, rtol=1e-4, atol=1e-5)


def test_noise_of_each_row_is_read_by_rows() -> None:
    """The recipe of stochastic depth: one draw per row, every token reads that of its row."""

    class DropPath(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = ad.rows()
            return x * torch.bernoulli(torch.full((int(rows.max()) + 1, 1), 0.5, dtype=x.dtype))[rows]

    class Stochastic(AdaLN):
        def __init__(self) -> None:
            super().__init__()
            self.drop = DropPath()

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return x + self.drop(super().forward(x, torch.ones(1, 1, DIM)) - x)

    ad.check_block(Stochastic(), DIM)


def test_noise_that_seldom_acts_is_no_difference() -> None:
    """Two dense runs are then often equal, and the packed one is not."""

    class Seldom(AdaLN):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            rows = ad.rows()
            keep = torch.rand(int(rows.max()) + 1, 1) >= (0.1 if self.training else 0)
            return x + keep[rows] * super().forward(x, torch.ones(1, 1, DIM))

    for seed in range(6):
        torch.manual_seed(seed)
        ad.check_looped(ad.RecurrentWrapper(Seldom(), STEPS), torch.randn(3, 5, DIM))


@pytest.mark.plain
@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (
            {"c": torch.ones(3, DIM)},
            "block_kwargs['c'] has shape (3, 8), which does not fit (batch, seq) = (3, 4). For one entry per row pass "
            "c.unsqueeze(1). Expected are (batch, seq, ...), one entry per token; (batch, 1, ...), one per row; or (1, seq, "
            "...), the same for all rows. If the block itself expects (batch, dim), also use adadepth.RowPerToken(block). A "
            "tensor that belongs to no token or row should be an attribute of the block.",
        ),
        (
            {"c": [torch.ones(5)]},
            "block_kwargs['c'] has shape (5,), which does not fit (batch, seq) = (3, 4). Expected are (batch, seq, ...), one "
            "entry per token; (batch, 1, ...), one per row; or (1, seq, ...), the same for all rows. If the block itself "
            "expects (batch, dim), also use adadepth.RowPerToken(block). A tensor that belongs to no token or row should be "
            "an attribute of the block.",
        ),
        (torch.ones(3), "block_kwargs expected a mapping of the block's arguments by name, got Tensor."),
        (
            None,
            "A block is called as block(x, **block_kwargs), but AdaLN also needs c. Pass it as looped(x, "
            "block_kwargs={'c': ...}): a tensor (batch, seq, ...) with one entry per token, or (batch, 1, ...) with one per "
            "row, is packed as x is.",
        ),
        (
            {"c": torch.ones(3, 1, DIM), "d": 1},
            "A block is called as block(x, **block_kwargs), but AdaLN does not take d. It takes x, c.",
        ),
        (
            {"c": torch.ones(3, 1, DIM), "x": torch.ones(3, 1, DIM)},
            "AdaLN gets x from the loop, but block_kwargs has it too. Leave it out there.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given_: dict[str, Tensor] | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ad.RecurrentWrapper(AdaLN(), STEPS)(torch.randn(3, 4, DIM), block_kwargs=given_)


class Unsqueezes(AdaLN):
    """Takes one condition for each row of its own batch, `(batch, dim)`, as the blocks of diffusion models do."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        _, _, _ = (x * (1 + c[:, None])).shape
        return super().forward(x, c[:, None])


WRAP = "Unsqueezes got c as (rows, length, ...). If it expects (batch, ...), wrap it: adadepth.RowPerToken(block)."


@pytest.mark.plain
@pytest.mark.parametrize("packed", [True, False])
def test_a_raw_error_of_a_block_with_a_condition_says_how_to_wrap_it(packed: bool) -> None:
    given_, x = {"c": torch.ones(3, 1, DIM)}, torch.randn(3, 4, DIM)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 0] = not packed
    looped = ad.RecurrentWrapper(Unsqueezes(), STEPS)
    looped.self_check = False
    with pytest.raises(ValueError, match="too many values") as error:
        looped(x, mask=mask, block_kwargs=given_)
    assert error.value.__notes__ == [WRAP]
    assert ad.RecurrentWrapper(ad.RowPerToken(Unsqueezes()), STEPS)(x, block_kwargs=given_).hidden.shape == x.shape


@pytest.mark.plain
def test_an_error_on_packed_shapes_names_the_wrapper_too() -> None:
    class Adds(AdaLN):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return super().forward(x, c.new_zeros(3, 4, DIM) + c)

    looped = ad.RecurrentWrapper(Adds(), STEPS)
    with pytest.raises(ValueError, match="failed on packed tokens") as error:
        looped(torch.randn(3, 4, DIM), mask=torch.ones(3, 4).tril(1).bool(), block_kwargs={"c": torch.ones(3, 1, DIM)})
    assert str(error.value).endswith(WRAP.replace("Unsqueezes", "Adds"))


@pytest.mark.plain
def test_our_own_errors_and_wrapped_blocks_get_no_such_note() -> None:
    class OwnMask(AdaLN):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            q = x.unsqueeze(1)
            return F.scaled_dot_product_attention(q, q, q, x.new_zeros(x.shape[1], x.shape[1])).squeeze(1) + c

    class Fails(AdaLN):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            raise IndexError("of the block")

    for block, kind in ((OwnMask(), ValueError), (ad.RowPerToken(Fails()), IndexError)):
        with pytest.raises(kind) as error:
            ad.RecurrentWrapper(block, STEPS)(torch.randn(3, 4, DIM), block_kwargs={"c": torch.ones(3, 1, DIM)})
        assert not hasattr(error.value, "__notes__")
        assert "wrap it" not in str(error.value)


@pytest.mark.plain
@pytest.mark.parametrize("block", [AdaLN(), ad.RowPerToken(AdaLN())])
def test_check_block_has_nothing_but_x(block: nn.Module) -> None:
    message = (
        "check_block gives the block x alone, but AdaLN also needs c. Check its loop with your own input: "
        "adadepth.check_looped(looped, x, block_kwargs={'c': ...})."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ad.check_block(block, DIM)


def test_take_refuses_what_is_not_one_per_token() -> None:
    class Takes(AdaLN):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, ad.take(torch.ones(3, 1, DIM)))

    with pytest.raises(
        ValueError, match=r"adadepth.take expected a tensor of shape \(batch, seq, ...\) = \(3, 4, ...\)"
    ):
        ad.RecurrentWrapper(Takes(), STEPS)(torch.randn(3, 4, DIM))
