"""Layers that are compiled one by one inside a loop that skips: what eager gives, gradients too, in few graphs."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from narrow import the
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._functorch._aot_autograd.utils import make_boxed_func

import adadepth as ad

pytestmark = [
    pytest.mark.plain,
    # Inductor and Dynamo warn of their own deprecations.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]
DIM, STEPS = 8, 4


class Layer(nn.Module):
    """Attention and what stands around it; `how` it attends, and once or three times side by side."""

    def __init__(self, times: int = 1, sinks: bool = False, **how: Any) -> None:
        super().__init__()
        self.qkv, self.out, self.times, self.how = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), times, how
        self.sinks = nn.Parameter(torch.randn(2)) if sinks else None

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(F.layer_norm(x, (DIM,))).chunk(3, -1))
        y = view.attend(q, k, v, sinks=self.sinks, **self.how)
        if self.times > 1:  # neither depends on the others, and they are read in another order
            first, last = view.attend(q.cos(), k.exp(), v.sin()), view.attend(q.exp(), k.cos(), v.exp())
            y = last.square() + 0.3 * y + first
        return x + F.gelu(self.out(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    takes_view = True

    def __init__(self, make: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make(), make()])

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        for layer in self.layers:
            x = layer(x, view)
        return x


def looped(block: nn.Module, **options: Any) -> ad.RecurrentWrapper:
    torch.manual_seed(1)
    gate = ad.PerIterationMLPGate(DIM, STEPS, hidden=4, bias=0.0)
    return ad.RecurrentWrapper(block, STEPS, gate, update=ad.Interpolate(), **options).double()


def pair(
    block: nn.Module, which: tuple[int, ...] = (0, 1), backend: Any = "eager", **options: Any
) -> tuple[ad.RecurrentWrapper, ad.RecurrentWrapper, CompileCounterWithBackend]:
    """The loop in eager, the same with layers compiled, and how many graphs were made."""
    torch._dynamo.reset()
    counter, fast = CompileCounterWithBackend(backend if isinstance(backend, str) else "eager"), copy.deepcopy(block)
    backend = counter if isinstance(backend, str) else backend
    for i in which:
        the(nn.ModuleList, fast.layers)[i].compile(backend=backend, dynamic=True, fullgraph=True)
    return looped(block, **options), looped(fast, **options), counter


def given(length: int) -> dict[str, Any]:
    """Rows, their mask, and tokens that leave at all depths."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(3, length, DIM, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, length, generator=generator) > 0.2
    return {"x": x, "mask": mask, "max_depth": torch.randint(1, STEPS + 1, (3, length), generator=generator)}


def agree(slow: ad.RecurrentWrapper, fast: ad.RecurrentWrapper, length: int, grad: bool = True, **other: Any) -> None:
    found = []
    for loop in (slow, fast):
        torch.manual_seed(2)
        with nullcontext() if grad else torch.no_grad():
            out = the(ad.Output, loop(**given(length) | other))
        weights = [*loop.parameters()]
        gradients = torch.autograd.grad(out.hidden.square().sum(), weights, allow_unused=True) if grad else ()
        found.append((out, gradients))
    (a, expected), (b, got) = found
    assert torch.equal(a.trace.depth, b.trace.depth)
    torch.testing.assert_close(b.hidden, a.hidden, rtol=1e-10, atol=1e-12)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("grad", "skip", "backend"),
    [
        (True, True, "eager"),
        pytest.param(True, True, "aot_eager", marks=pytest.mark.every),
        pytest.param(True, False, "aot_eager", marks=pytest.mark.every),
        pytest.param(False, True, "aot_eager", marks=pytest.mark.every),
    ],
)
def test_a_layer_is_a_few_graphs_whatever_the_lengths(skip: bool, grad: bool, backend: str) -> None:
    slow, fast, counter = pair(Block(), backend=backend, skip=skip)
    graphs = []
    for length in (5, 6, 9, 12, 7):
        agree(slow, fast, length, grad)
        graphs.append(counter.frame_count)
    # In rows and packed, with a gradient of the input and without, and of one token alone: not of each length.
    assert graphs[-1] == graphs[-2] == graphs[-3] <= 4


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Layer(window=2), marks=pytest.mark.every),
        pytest.param(lambda: Layer(sinks=True, softcap=2.0), marks=pytest.mark.every),
        pytest.param(lambda: Layer(dropout_p=0.5), marks=pytest.mark.every),
        pytest.param(lambda: Layer(times=3), marks=pytest.mark.every),
    ],
)
def test_however_a_layer_attends(make: Callable[[], nn.Module]) -> None:
    slow, fast, _ = pair(Block(make), backend="aot_eager")
    agree(slow, fast, 7)


@pytest.mark.every
def test_compiled_layers_stand_beside_others() -> None:
    slow, fast, _ = pair(Block(), which=(1,))
    agree(slow, fast, 7)


def late_first(graph: fx.GraphModule, _inputs: Any) -> Any:
    """A compiler that runs of all that can be run what was written last; inductor, too, changes the order."""
    nodes, done, order = list(graph.graph.nodes), set[fx.Node](), list[fx.Node]()
    while len(order) < len(nodes):
        ready = [n for n in nodes if n not in done and done >= set(n.all_input_nodes)]
        given = [n for n in ready if n.op == "placeholder"]
        node = given[0] if given else [n for n in ready if n.op != "output" or len(order) + 1 == len(nodes)][-1]
        done.add(node)
        order.append(node)
    changed, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in order:
        copies[node] = changed.node_copy(node, copies.__getitem__)
    return make_boxed_func(fx.GraphModule(graph, changed).forward)


@pytest.mark.every
def test_a_compiler_that_changes_the_order_of_calls_gives_the_same() -> None:
    made: list[Any] = []

    def every_other(graph: fx.GraphModule, inputs: Any) -> Any:
        made.append(graph)
        return late_first(graph, inputs) if len(made) % 2 else make_boxed_func(graph.forward)

    # The first iteration has a graph of its own, for its input has no gradient: the orders of two graphs differ.
    backend = aot_autograd(fw_compiler=every_other, bw_compiler=late_first)
    slow, fast, _ = pair(Block(lambda: Layer(times=3)), which=(0,), backend=backend)
    agree(slow, fast, 7)
    assert len(made) > 1


def spoiling(graph: fx.GraphModule, _inputs: Any) -> Any:
    """A compiler that writes over queries, keys and values once they have been asked with, as inductor may."""
    output = next(iter(reversed(graph.graph.nodes)))
    asked = [n for n in graph.graph.nodes if n.target is torch.ops.adadepth.attend.default]
    with graph.graph.inserting_before(output):
        for node in asked:
            for tensor in node.args[:3]:
                graph.graph.call_function(torch.ops.aten.fill_.Scalar, (tensor, float("nan")))
    graph.recompile()
    return make_boxed_func(graph.forward)


@pytest.mark.parametrize("grad", [True, pytest.param(False, marks=pytest.mark.every)])
def test_what_a_graph_writes_over_is_not_kept(grad: bool) -> None:
    backend = aot_autograd(fw_compiler=spoiling, bw_compiler=lambda graph, _: make_boxed_func(graph.forward))
    slow, fast, _ = pair(Block(), which=(0,), backend=backend)
    agree(slow, fast, 7, grad, mask=None)


@pytest.mark.every
def test_inductor_too() -> None:
    slow, fast, _ = pair(Block(lambda: Layer(times=3)), which=(1,), backend="inductor")
    agree(slow, fast, 7)


def test_a_cache_too() -> None:
    slow, fast, counter = pair(Block())
    few = 0
    for lengths in ((4, 1, 1), (6, 1, 2)):
        caches = ad.KVReuseCache(), ad.KVReuseCache()
        for length in lengths:
            with torch.inference_mode():
                a, b = (loop(**given(length), cache=cache) for loop, cache in zip((slow, fast), caches, strict=True))
            torch.testing.assert_close(b.hidden, a.hidden, rtol=1e-10, atol=1e-12)
        assert few in (0, counter.frame_count)
        few = counter.frame_count


@pytest.mark.every
def test_under_autocast() -> None:
    slow, fast, _ = pair(Block())
    case = given(7) | {"x": given(7)["x"].float()}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        a, b = (loop.float()(**case) for loop in (slow, fast))
    torch.testing.assert_close(b.hidden, a.hidden, rtol=2e-2, atol=2e-2)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.inner(x))


@pytest.mark.parametrize("checked", ["by itself", "by hand"])
def test_a_check_does_not_end_compilation(checked: str) -> None:
    torch._dynamo.reset()
    mlp, counter = Mlp(), CompileCounter()
    mlp.compile(backend=counter, dynamic=True, fullgraph=True)
    loop = looped(ad.Pointwise(mlp))
    loop.self_check = checked == "by itself"
    if not loop.self_check:
        ad.testing.check_looped(loop, given(7)["x"])
    loop(**given(7))
    assert counter.frame_count > 0


@pytest.mark.parametrize("compiled", ["in place", "wrapped"])
def test_a_compiled_block_without_attention_is_not_refused(compiled: str) -> None:
    torch._dynamo.reset()
    mlp = Mlp().double()
    inner: Any = copy.deepcopy(mlp)
    if compiled == "in place":
        inner.compile(backend="eager", dynamic=True)
    else:
        inner = torch.compile(inner, backend="eager", dynamic=True)
    agree(looped(ad.Pointwise(mlp)), looped(ad.Pointwise(inner)), 6)


CUT = (
    "A compiled layer keeps keys and values for the next iteration. For their gradients it must read the block's input "
    "and add to its output, and the backward pass must go through all of it; got a layer that is cut off. Call "
    "loss.backward(), or pass the weights of all layers to torch.autograd.grad; do not detach the layer's input or "
    "output. Or run that layer without torch.compile."
)


class Detached(Block):
    """A block whose first layer is cut off in the first iteration, or all of it in all."""

    whole = False

    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        first = self.layers[0](x, view)
        x = self.layers[1](first.detach() if view.step == 0 else first, view)
        return x.detach() if self.whole else x


def test_a_layer_that_is_cut_off_is_refused_in_the_backward_pass() -> None:
    _, fast, _ = pair(Detached())
    loss = fast(**given(7)).hidden.sum()
    with pytest.raises(ValueError, match="compiled layer") as error:
        loss.backward()
    assert str(error.value) == CUT


def test_a_block_that_is_cut_off_is_refused() -> None:
    block = Detached()
    block.whole = True
    _, fast, _ = pair(block)
    with pytest.raises(ValueError, match="compiled layer") as error:
        fast(**given(7))
    assert str(error.value) == CUT


def test_gradients_of_layers_whose_loop_is_forgotten_are_refused() -> None:
    _, fast, _ = pair(Block(), which=(0,))
    seen: list[Tensor] = []
    second = the(nn.ModuleList, fast.block.layers)[1]
    fast(**given(7))  # the first call is held by the compiler for a while
    second.register_forward_pre_hook(lambda _, args: None if seen else seen.append(args[0]))
    fast(**given(7))
    with pytest.raises(ValueError, match="was freed") as error:
        seen[0].sum().backward()
    assert str(error.value) == (
        "The backward pass reached a compiled layer of a loop whose output was freed. Keep the loop's output until the "
        "backward pass is done, or run the layers without torch.compile."
    )


def test_a_loop_that_checkpoints_is_refused() -> None:
    _, fast, _ = pair(Block(), checkpoint=True)
    with pytest.raises(ValueError, match="checkpoint") as error:
        fast(**given(7))
    assert str(error.value) == (
        "A compiled layer attends in a loop with checkpoint=True; expected checkpoint=False, because the backward pass "
        "would run the iterations again. Set it, or compile only submodules without attention."
    )


class Frozen(Block):
    def forward(self, x: Tensor, view: ad.TokenView) -> Tensor:
        with torch.set_grad_enabled(view.step == 0):
            x = self.layers[0](x, view)
        return the(Tensor, self.layers[1](x, view))


def test_gradients_that_an_operator_would_cut_are_refused() -> None:
    _, fast, _ = pair(Frozen())
    with pytest.raises(ValueError, match="would be cut") as error:
        fast(**given(7))
    assert str(error.value) == (
        "A compiled layer attends without gradients in a loop with gradients: those of earlier iterations' keys and "
        "values would be cut. Put torch.no_grad() around the whole loop, compile the layer as a module, "
        "layer.compile(), or run it without torch.compile."
    )


def test_the_operator_alone() -> None:
    q = torch.randn(1, 2, 3, 4)
    turn = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="outside of it") as error:
        torch.ops.adadepth.attend(q, q, q, turn, False)
    assert str(error.value) == (
        "A graph that was compiled inside a looped block was called outside of it. Call it only through the "
        "RecurrentWrapper that runs the block."
    )
