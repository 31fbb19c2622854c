"""A looped block amid the rest of PyTorch: copies, dtypes, checkpointing, threads, hooks, other loops."""

import copy
import pickle
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks_zoo import BLOCKS, DIM, PreNorm, heads_of, looped, merged, mixed
from cases import each
from narrow import the
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import adadepth as ad

both = pytest.mark.parametrize("skip", [True, False])
every = pytest.mark.parametrize("kind", BLOCKS)
RAGGED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1]]).bool()


def rows(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 6, DIM, dtype=dtype)


def gradients(loop: ad.RecurrentWrapper, hidden: Tensor) -> list[Tensor]:
    return list(
        torch.autograd.grad(hidden.sin().sum(), list(loop.parameters()), materialize_grads=True, allow_unused=True)
    )


def copied(loop: ad.RecurrentWrapper) -> ad.RecurrentWrapper:
    return copy.deepcopy(loop)


def pickled(loop: ad.RecurrentWrapper) -> ad.RecurrentWrapper:
    return pickle.loads(pickle.dumps(loop))


@each
@pytest.mark.parametrize("again", [copied, pickled])
def test_a_copy_computes_the_same(kind: str, skip: bool, again: Callable[..., ad.RecurrentWrapper]) -> None:
    loop, x = looped(kind, skip=skip).eval(), rows()
    want = loop(x, mask=RAGGED)
    twin = again(loop)
    with torch.no_grad():  # a copied block keeps off PyTorch's fast path too
        out = twin(x, mask=RAGGED)
    assert mixed(out.trace.live)
    torch.testing.assert_close(out.hidden, want.hidden, rtol=1e-10, atol=1e-12)
    for p in twin.parameters():
        p.data.zero_()
    assert torch.equal(loop(x, mask=RAGGED).hidden, want.hidden)


@every
def test_a_loop_is_built_on_meta_and_loaded(kind: str) -> None:
    loop, x = looped(kind), rows()
    with torch.device("meta"):
        empty = looped(kind)
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(loop.state_dict())
    assert torch.equal(empty(x, mask=RAGGED).hidden, loop(x, mask=RAGGED).hidden)


@every
def test_the_state_dict_holds_the_pieces_and_nothing_else(kind: str) -> None:
    loop = looped(kind)
    pieces = {"block": loop.block, "gate": the(nn.Module, loop.gate)}
    assert set(loop.state_dict()) == {f"{name}.{key}" for name, piece in pieces.items() for key in piece.state_dict()}


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [True, False])
def test_under_autocast_the_state_keeps_its_dtype(kind: str, dtype: torch.dtype, padded: bool) -> None:
    loops, x = [looped(kind, skip=skip).to(dtype) for skip in (True, False)], rows(dtype)
    outputs = []
    for loop in loops:
        loop.rule = None
        with torch.autocast("cpu", torch.bfloat16):
            out = loop(x, mask=RAGGED if padded else None, max_depth=torch.tensor([[2], [4], [3]]), states=True)
        assert out.hidden.dtype == the(Tensor, out.states).dtype == dtype
        assert out.trace.scores.dtype == out.trace.exit_probs.dtype == torch.float32
        outputs.append(out)
        gradients(loop, out.hidden)
    packed, dense = outputs
    assert mixed(packed.trace.live)
    assert (packed.hidden - dense.hidden).abs().max() <= 0.05 * dense.hidden.abs().max()


@each
@pytest.mark.parametrize(
    ("rule", "training"),
    [
        (ad.Threshold(0.5), True),
        (ad.ACT(0.3), True),
        pytest.param(ad.ACT(0.3), False, marks=pytest.mark.every),
        pytest.param(ad.Threshold(0.5), False, marks=pytest.mark.every),
    ],
)
def test_checkpointed_iterations_give_the_same_bits(kind: str, skip: bool, rule: ad.Rule, training: bool) -> None:
    loop, x = looped(kind, skip=skip).train(training), rows().requires_grad_()
    loop.rule = rule
    results = []
    for loop.checkpoint in (False, True):
        out = loop(x, mask=RAGGED, max_depth=torch.tensor([[4], [3], [4]]))
        assert mixed(out.trace.live)
        leaves = [x, *loop.parameters()]
        results.append(
            [
                out.hidden,
                *torch.autograd.grad(out.hidden.sin().sum(), leaves, materialize_grads=True, allow_unused=True),
            ]
        )
    for plain, saved in zip(*results, strict=True):
        assert torch.equal(plain, saved)


@both
def test_checkpointed_iterations_keep_little(skip: bool) -> None:
    """One iteration's inputs are saved, not what the block computed on the way."""
    loop, counts = looped("stack", skip=skip), []
    for loop.checkpoint in (False, True):
        counts.append(saved_by(lambda: loop(rows(), mask=RAGGED).hidden)[1])
    assert 0 < counts[1] < counts[0] / 2


@both
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_a_whole_loop_can_be_checkpointed(skip: bool, reentrant: bool, inner: bool) -> None:
    loop, x = looped("attention", skip=skip, checkpoint=inner), rows().requires_grad_()
    want = gradients(loop, loop(x).hidden)
    loop.zero_grad()
    hidden = checkpoint(lambda x: loop(x).hidden, x, use_reentrant=reentrant)
    hidden.sin().sum().backward()
    for p, grad in zip(loop.parameters(), want, strict=True):
        assert torch.equal(p.grad if p.grad is not None else torch.zeros_like(p), grad)


class Checkpointing(nn.Module):
    """A block that checkpoints itself, as many do."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = PreNorm(DIM, True), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


CHECKPOINTS_ITSELF = (
    "The block checkpoints its own attention. The backward pass cannot recompute it, because the tokens that ran are "
    "no longer known. Switch checkpointing off inside the block and let the loop checkpoint whole iterations: "
    "RecurrentWrapper(..., checkpoint=True)."
)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # of PyTorch's, under no_grad
@both
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_checkpointing_inside_the_block_is_refused(skip: bool, reentrant: bool, outer: bool) -> None:
    loop = ad.RecurrentWrapper(Checkpointing(reentrant), 3, skip=skip, checkpoint=outer)
    x = rows(torch.float32).requires_grad_()
    with pytest.raises(ValueError, match=re.escape(CHECKPOINTS_ITSELF)):
        loop(x)
    with torch.no_grad():  # then nothing is recomputed
        assert loop(x).hidden.shape == x.shape


class Held:
    """A tensor saved for the backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # else it would hold the graph that holds it


def saved_by(forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result of `forward`, and how many tensors its graph holds."""
    alive: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor)
        alive.add(held)
        return held

    with saved_tensors_hooks(pack, lambda held: held.tensor):
        out = forward()
    return out, len(alive)


class Detached(ad.Update):
    """Truncated backpropagation: only the last iteration is learned from."""

    def forward(self, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int) -> Tensor:
        return h.detach()


@both
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("forced", [True, False])
def test_a_loop_that_cannot_exit_keeps_no_graph_of_what_it_does_not_need(
    skip: bool, padded: bool, forced: bool
) -> None:
    block, x, mask = PreNorm(DIM, True), rows(torch.float32).requires_grad_(), RAGGED if padded else None
    counts = []
    for steps in (2, 3, 6):
        rule = ad.Threshold(0.5) if forced else None
        loop = ad.RecurrentWrapper(block, steps, rule=rule, update=Detached(), skip=skip)

        def run(loop: ad.RecurrentWrapper = loop, steps: int = steps) -> Tensor:
            return loop(x, mask=mask, min_depth=steps if forced else None).hidden

        out, held = saved_by(run)
        counts.append(held)
        out.sum().backward()
    assert counts[0] == counts[1] == counts[2] > 0


class Noting(PreNorm):
    """Notes what it may know, in itself and in a hook of one of its parts."""

    def __init__(self) -> None:
        super().__init__(DIM, True)
        self.noted: list[tuple[Tensor, ...]] = []
        self.mlp.register_forward_hook(self.note)

    def note(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        self.noted.append((ad.iteration(), ad.positions(), out))


@both
def test_a_hook_knows_each_token_s_iteration_and_position(skip: bool) -> None:
    block = Noting()
    depth = torch.tensor([[3, 1, 2, 1, 3, 1], [2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 3, 3]])
    ad.RecurrentWrapper(block, 3, skip=skip)(rows(torch.float32), mask=RAGGED, min_depth=depth, max_depth=depth)
    place = RAGGED.cumsum(1) - 1
    assert len(block.noted) == 3
    for step, (iteration, positions, out) in enumerate(block.noted):
        runs = RAGGED & (depth > step)
        assert iteration.dtype == positions.dtype == torch.int64
        assert iteration.shape == positions.shape == out.shape[:2]
        assert (iteration == step).all()
        assert torch.equal(positions[0] if skip else positions[runs], place[runs])


def test_outside_a_looped_block_there_is_no_iteration() -> None:
    looped("attention")(rows())
    for function in (ad.iteration, ad.positions):
        with pytest.raises(RuntimeError) as error:
            function()
        assert str(error.value) == (
            f"{function.__name__}() was called outside a looped block, where it has no value. Call it in the block, "
            "its submodules and hooks, or in gates and updates."
        )


class Failing(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise KeyError("the block's own")


def test_after_an_error_in_the_block_attention_is_what_it_was() -> None:
    q = torch.randn(3, 2, 6, 4)
    want = F.scaled_dot_product_attention(q, q, q)
    with pytest.raises(KeyError, match="the block's own"):
        ad.RecurrentWrapper(Failing(DIM, True), 2)(rows(torch.float32))
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), want)
    with pytest.raises(RuntimeError):
        ad.iteration()


class Meeting(PreNorm):
    """Waits, between its attention and its end, until the other thread's block is as far."""

    barrier: threading.Barrier

    def forward(self, x: Tensor) -> Tensor:
        self.barrier.wait()
        out = super().forward(x + ad.iteration().unsqueeze(-1) + ad.positions().unsqueeze(-1))
        self.barrier.wait()
        return out


def meeting(barrier: threading.Barrier, skip: bool) -> ad.RecurrentWrapper:
    loop = looped("attention", skip=skip)
    loop.block, loop.rule = Meeting(DIM, True).double(), None
    loop.block.barrier = barrier
    return loop


@pytest.mark.parametrize("skips", [(True, True), (True, False), (False, False)])
def test_threads_do_not_meet(skips: tuple[bool, bool]) -> None:
    loops = [meeting(threading.Barrier(1), skip) for skip in skips]
    given = [(rows(), torch.tensor([[4], [3], [2]])), (rows(), torch.tensor([[2], [4], [1]]))]
    want = [loop(x, max_depth=most).hidden for loop, (x, most) in zip(loops, given, strict=True)]
    barrier, got = threading.Barrier(2, timeout=30), {}

    def work(i: int) -> None:
        the(Meeting, loops[i].block).barrier = barrier
        x, most = given[i]
        got[i] = loops[i](x, max_depth=most).hidden

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_the_first_calls_of_two_threads_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ad.RecurrentWrapper, "self_check", True)
    layer = nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, dropout=0.0, batch_first=True)
    for _ in range(10):
        stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        loop = ad.RecurrentWrapper(ad.CausalEncoder(stack), 4, ad.LinearGate(DIM), ad.Threshold(0.5)).eval()
        x, barrier, errors = rows(torch.float32), threading.Barrier(2, timeout=30), list[Exception]()

        def work(
            loop: ad.RecurrentWrapper = loop,
            x: Tensor = x,
            barrier: threading.Barrier = barrier,
            errors: list[Exception] = errors,
        ) -> None:
            barrier.wait()
            try:
                with torch.no_grad():
                    loop(x, max_depth=torch.tensor([[4], [3], [2]]))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []


def test_another_thread_s_plain_attention_is_not_caught() -> None:
    barrier, q = threading.Barrier(2, timeout=30), torch.randn(5, 2, 7, 4)
    loop, got = meeting(barrier, skip=True), []

    def work() -> None:
        for _ in range(4):
            barrier.wait()
            got.append(F.scaled_dot_product_attention(q, q, q))
            barrier.wait()

    thread = threading.Thread(target=work)
    thread.start()
    loop(rows())
    thread.join()
    want = F.scaled_dot_product_attention(q, q, q)
    assert len(got) == 4
    assert all(torch.equal(each, want) for each in got)


class Nesting(nn.Module):
    """A loop inside a block that attends itself."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.own, self.inner = PreNorm(DIM, True), ad.RecurrentWrapper(PreNorm(DIM, True), 2, skip=skip)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.own(x)).hidden


@both
@pytest.mark.parametrize("inner", [True, False])
def test_a_loop_inside_a_looped_block_is_refused(skip: bool, inner: bool) -> None:
    """It would be given packed tokens of all rows as one row of its own."""
    with pytest.raises(ValueError, match="inside the block of another") as error:
        ad.RecurrentWrapper(Nesting(inner), 2, skip=skip)(rows(torch.float32), max_depth=torch.tensor([[1], [2], [2]]))
    assert str(error.value) == (
        "A RecurrentWrapper runs inside the block of another: it would treat the packed tokens of all rows as one row. "
        "Put the whole stack into one loop, or run one loop after the other."
    )


@both
def test_a_loop_beside_a_loop_is_not_disturbed(skip: bool) -> None:
    """A gate may run a loop of its own: it stands outside the block."""
    other, x = looped("stack", skip=skip), rows()
    want = other(x).hidden
    seen = []

    class Asking(ad.Gate):
        def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
            seen.append(other(x).hidden)
            return h[..., 0].sigmoid()

    loop = looped("attention", skip=skip)
    loop.gate = Asking()
    loop(x)
    assert all(torch.equal(each, want) for each in seen)
    assert seen


class InPlace(PreNorm):
    """Writes into its input, as inference code likes to."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(t, self.heads) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x += self.out(merged(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)))
        x += self.mlp(self.norm2(x))
        return x


@both
@pytest.mark.parametrize("padded", [True, False])
def test_a_block_that_writes_into_its_input_is_refused_or_given_a_copy(skip: bool, padded: bool) -> None:
    loop, mask = looped("attention", skip=skip).eval(), RAGGED if padded else None
    loop.update = ad.Residual()
    x = rows()
    want = loop(x, mask=mask).hidden
    writing = InPlace(DIM, True).double()
    writing.load_state_dict(loop.block.state_dict())
    loop.block = writing
    with torch.no_grad(), pytest.raises(ValueError, match="writes into its input") as error:
        loop(x.clone(), mask=mask)
    assert str(error.value) == (
        "InPlace writes into its input, which the update reads later. Write x = x + ... instead of x += ..., or start "
        "with x = x.clone()."
    )
    with torch.inference_mode():
        torch.testing.assert_close(loop(x.clone(), mask=mask).hidden, want, rtol=1e-10, atol=1e-12)


def closing(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    remaining[scores[..., -1] < 0.5] = 0
    return remaining


def counting(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    positions += 1
    return remaining


class Centring(ad.Gate):
    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        h -= h.mean(-1, keepdim=True)
        return h[..., 0].sigmoid()


class Forgetting(ad.Gate):
    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        return previous.zero_()[..., 0] + 0.7


class Hasty(ad.Update):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int) -> Tensor:
        return {"x": x, "h": h, "start": start}[self.name].mul_(2.0)


WRITING: list[tuple[dict[str, Any], str]] = [
    ({"rule": closing}, "closing writes into remaining"),
    ({"rule": counting}, "counting writes into positions"),
    ({"gate": Centring()}, "Centring writes into h"),
    ({"gate": Forgetting()}, "Forgetting writes into previous"),
    *[({"update": Hasty(name)}, f"Hasty writes into {name}") for name in ("x", "h", "start")],
]


@both
@pytest.mark.parametrize(("pieces", "said"), WRITING)
def test_a_piece_that_writes_into_its_arguments_is_refused(skip: bool, pieces: dict[str, Any], said: str) -> None:
    loop, start = looped("attention", skip=skip).eval(), rows()
    for name, piece in pieces.items():
        setattr(loop, name, piece)
    _, _, name = said.rpartition(" ")
    message = f"{said}, which is read again later. Make a new tensor, or start with {name} = {name}.clone()."
    with torch.no_grad(), pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loop(rows(), mask=RAGGED, start=start)


@pytest.mark.parametrize(
    "skip",
    [
        pytest.param(True, marks=pytest.mark.skipif(torch.__version__ < "2.9", reason="torch 2.8 reads no mask in it")),
        False,
    ],
)
def test_functional_calls_and_inference_mode(skip: bool) -> None:
    loop, x = looped("attention", skip=skip), rows()
    want = loop(x, mask=RAGGED).hidden
    with torch.inference_mode():
        assert torch.equal(loop(x, mask=RAGGED).hidden, want)
    parameters = dict(loop.named_parameters())
    got = torch.func.grad(lambda p: torch.func.functional_call(loop, p, (x,), {"mask": RAGGED}).hidden.sin().sum())(
        parameters
    )
    for a, b in zip(got.values(), gradients(loop, want), strict=True):
        assert torch.equal(a, b)
