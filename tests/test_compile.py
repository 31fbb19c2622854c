"""The dense execution compiles to one graph, whatever the block, and gives what eager gives."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from narrow import the
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import adadepth as ad

pytestmark = [
    pytest.mark.plain,
    # Inductor and Dynamo warn of their own deprecations.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]
DIM = 8


class Attends(nn.Module):
    """Grouped-query attention called by name, with methods of tensors that are written in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (1, 8)).transpose(1, 2).split(4, -1)
        given = {"query": q, "key": k, "value": v, "is_causal": True, "enable_gqa": True}
        return x + F.scaled_dot_product_attention(**given).transpose(1, 2).flatten(2)


class Views(nn.Module):
    takes_view = True

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        x = x + 0.1 * ad.iteration().unsqueeze(-1) + 0.1 * view.positions.unsqueeze(-1)
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return x + view.attend(q, k, v).squeeze(1)


def encoder(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(DIM, 2, 16, 0.0, batch_first=True, **options)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "sdpa": Attends,
    "view": Views,
    "pointwise": lambda: ad.Pointwise(nn.Linear(DIM, DIM)),
    "encoder": lambda: ad.CausalEncoder(encoder()),
    "encoder, norm first": lambda: ad.CausalEncoder(encoder(norm_first=True)),
    "row per token": lambda: ad.RowPerToken(encoder()),
    "row per token, attention": lambda: ad.RowPerToken(Attends()),
    "stack": lambda: ad.CausalEncoder(nn.TransformerEncoder(encoder(), 1)),
}


def looped(block: nn.Module, steps: int = 3, **options: Any) -> ad.RecurrentWrapper:
    gate = ad.PerIterationMLPGate(DIM, steps, hidden=4, bias=0.0)
    pieces = {"gate": gate, "rule": ad.Threshold(0.5), "update": ad.Interpolate(), "skip": False, **options}
    return ad.RecurrentWrapper(block, steps, **pieces).double()


def compiled(
    module: nn.Module, backend: str = "aot_eager"
) -> tuple[Callable[..., ad.Output], CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, backend=counter, fullgraph=True), counter


def given() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 6, DIM, generator=generator, dtype=torch.float64)
    return x, torch.rand(3, 6, generator=generator) > 0.3


def agree(a: ad.Output, b: ad.Output) -> None:
    assert torch.equal(a.trace.live, b.trace.live)
    for got, expected in zip((a.hidden, *a.trace[1:]), (b.hidden, *b.trace[1:]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# As one trains and as one evaluates; crossed where PyTorch has a fast path that asks for the mode. The rest, by
# `make test-every`, holds the same layers with the same work of the loop around them.
ORDINARY = [("sdpa", True), ("view", False), ("pointwise", False), ("encoder", True)]
MODES = [
    pytest.param(name, mode, mode, marks=[] if (name, mode) in ORDINARY else [pytest.mark.every])
    for name in BLOCKS
    for mode in (True, False)
]
CROSSED = [pytest.param("encoder", *modes, marks=pytest.mark.every) for modes in ((True, False), (False, True))]


@pytest.mark.parametrize(("name", "grad", "training"), MODES + CROSSED)
def test_one_graph_equal_to_eager(name: str, grad: bool, training: bool) -> None:
    module = looped(BLOCKS[name](), steps=2).train(training)
    x, mask = given()
    fast, counter = compiled(module)
    with torch.set_grad_enabled(grad):
        got, expected = fast(x, mask=mask), module(x, mask=mask)
    agree(got, expected)
    assert counter.frame_count == 1
    if grad:
        weights = list(module.block.parameters())
        for a, b in zip(*(torch.autograd.grad(o.hidden.sum(), weights) for o in (got, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["encoder", "encoder, norm first", "stack"])
@pytest.mark.every
def test_frozen_layers_do_not_slip_onto_their_fast_path(name: str) -> None:
    module = looped(BLOCKS[name](), steps=2).eval().requires_grad_(False)
    x, mask = given()
    fast, _ = compiled(module)
    agree(fast(x, mask=mask), module(x, mask=mask))
    packed = looped(module.block, steps=2, gate=module.gate, skip=True).eval()
    agree(packed(x, mask=mask), module(x, mask=mask))


def rarely(**pieces: Any) -> Any:
    """By `make test-every`: criteria and `Ponder` have such tests of their own, and the others are much like these."""
    return pytest.param(pieces, marks=pytest.mark.every)


@pytest.mark.parametrize(
    "pieces",
    [
        rarely(rule=ad.ACT(0.1)),
        {"rule": ad.Survival(), "update": ad.SurvivalScaled(ad.Residual())},
        rarely(rule=ad.Lookahead(ad.SurvivalThreshold(0.3)), update=ad.Ungated(ad.Interpolate())),
        rarely(rule=None, gate=None, update=ad.InputInjection()),
        rarely(gate=ad.ConvergenceGate(), update=ad.Replace()),
        rarely(gate=ad.KLGate(nn.Linear(DIM, 11)), rule=ad.Threshold(0.01), update=ad.Replace()),
        rarely(update=ad.Ponder(nn.Embedding(11, DIM), nn.Linear(DIM, 11, bias=False))),
    ],
    ids=lambda pieces: "-".join(type(piece).__name__ for piece in pieces.values()),
)
def test_every_piece_compiles(pieces: dict[str, Any]) -> None:
    for piece in pieces.values():
        for held in vars(piece).values() if isinstance(piece, nn.Module) else ():
            if isinstance(held, nn.Module):
                held.double()  # held by reference: the loop does not move it
    module = looped(Attends(), **pieces).eval()
    x, mask = given()
    fast, counter = compiled(module)
    with torch.no_grad():
        agree(fast(x, mask=mask), module(x, mask=mask))
    assert counter.frame_count == 1


def test_depths_as_tensors_need_one_graph_and_ints_one_each() -> None:
    module = looped(Attends()).eval()
    x, mask = given()
    fast, counter = compiled(module, "eager")
    with torch.no_grad():
        for most in (1, 2, 3):
            depth = torch.full((3, 1), most)
            agree(fast(x, mask=mask, max_depth=depth), module(x, mask=mask, max_depth=depth))
        assert counter.frame_count == 1
        for most in (1, 2):
            agree(fast(x, mask=mask, max_depth=most), module(x, mask=mask, max_depth=most))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Attends()

    def forward(self, x: Tensor) -> Tensor:
        x += self.inner(x)
        return x


def test_a_compiled_block_that_writes_into_its_input_has_a_copy() -> None:
    module = looped(InPlace(), update=ad.Residual()).eval()
    x, mask = given()
    fast, _ = compiled(module)
    with torch.no_grad():
        got = fast(x, mask=mask)
    with torch.inference_mode():
        agree(got, module(x, mask=mask))


@pytest.mark.every
def test_inductor_too() -> None:
    module = looped(Attends()).eval()
    x, mask = given()
    torch._dynamo.reset()
    agree(torch.compile(module, fullgraph=True)(x, mask=mask), module(x, mask=mask))


def test_a_block_compiled_by_itself_is_refused() -> None:
    in_place = Attends()
    in_place.compile()
    later = looped(Attends())
    later.block.compile()
    x, _ = given()
    for block, name in (
        (the(nn.Module, torch.compile(Attends())), "The block"),
        (nn.Sequential(in_place), "A submodule of Sequential"),
    ):
        with pytest.raises(ValueError, match="compiled by itself") as error:
            looped(block)(x)
        assert str(error.value) == (
            f"{name} is compiled by itself and calls attention, and a loop cannot reach the attention calls inside its "
            "graph. Compile only submodules without attention, or the wrapper with skip=False, or write the block to "
            "take the view."
        )
    with pytest.raises(ValueError, match=r"^The block is compiled by itself"):
        later(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_part_without_attention_is_served(backend: str) -> None:
    torch._dynamo.reset()
    slow = looped(Attends()).eval()
    fast = copy.deepcopy(slow)
    kv = torch.compile(the(Attends, fast.block).kv, backend=backend, dynamic=True)
    fast.block.register_module("kv", the(nn.Module, kv))
    x, mask = given()
    agree(fast(x, mask=mask), slow(x, mask=mask))


def test_around_a_default_loop_the_rest_is_compiled() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.loop, self.after = nn.Linear(8, 8), looped(Attends(), skip=True), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.loop(self.before(x)).hidden)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Model().double()
    fast = the(nn.Module, torch.compile(model, backend="eager"))
    for length in (5, 6, 7):
        for mode in (True, False):
            x = torch.randn(3, length, 8).double()
            assert torch.equal(fast.train(mode)(x), model.train(mode)(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


@pytest.mark.parametrize("option", [{"skip": True}, {"skip": False, "checkpoint": True}])
def test_one_graph_of_a_loop_that_runs_in_eager_is_refused_in_a_sentence(option: dict[str, bool]) -> None:
    torch._dynamo.reset()
    module, (x, _) = looped(Attends(), **option), given()
    for _ in range(2):
        with pytest.raises(torch._dynamo.exc.Unsupported) as error:
            torch.compile(module, fullgraph=True, backend="eager")(x)
        assert (
            "RecurrentWrapper runs in eager with skip=True (the default), with a cache or with checkpoint=True: what "
            "it runs depends on the data. For one graph (fullgraph=True) build it with skip=False and "
            "checkpoint=False, and without a cache."
        ) in str(error.value)
        torch._dynamo.reset()
        torch.compile(module, backend="eager")(x)  # from then on the refusal comes from elsewhere
        torch._dynamo.reset()


def test_an_exported_dense_loop_takes_other_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ad.RecurrentWrapper, "self_check", True)
    module, (x, mask) = looped(Attends(), steps=2).eval(), given()
    sizes = {0: torch.export.Dim("batch", min=2, max=8), 1: torch.export.Dim("seq", min=2, max=32)}
    shapes = {"x": sizes, "mask": sizes}
    exported = torch.export.export(module, (x,), {"mask": mask}, dynamic_shapes=shapes).module()
    x, mask = torch.cat([x, x], 0)[:5, :4], torch.cat([mask, ~mask], 0)[:5, :4]
    agree(exported(x, mask=mask), module(x, mask=mask))


@pytest.mark.parametrize("option", [{"skip": True}, {"skip": False, "checkpoint": True}])
def test_a_loop_that_runs_in_eager_is_not_exported(option: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="RecurrentWrapper runs in eager") as error:
        torch.export.export(looped(Attends(), **option), (given()[0],), strict=False)
    assert str(error.value) == (
        "RecurrentWrapper runs in eager with skip=True (the default), with a cache or with checkpoint=True: what it "
        "runs depends on the data. For one graph (fullgraph=True) build it with skip=False and checkpoint=False, and "
        "without a cache."
    )


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.every)])
def test_a_compiled_block_that_takes_the_view_is_served(backend: str) -> None:
    torch._dynamo.reset()
    block = Views().double()
    fast = looped(the(nn.Module, torch.compile(block, backend=backend)), steps=2, skip=True).eval()
    slow = looped(block, steps=2, gate=fast.gate, skip=True).eval()
    x, mask = given()
    agree(fast(x, mask=mask), slow(x, mask=mask))
