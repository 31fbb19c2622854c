"""What an output, a trace and a cache say of themselves."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import adadepth as ad

STEPS, DIM = 4, 6
MASK = torch.arange(5) < torch.tensor([[5], [3]])


def by_position(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    """Token i leaves after iteration i + 1."""
    return remaining * (positions >= scores.shape[-1])


def looped(steps: int = STEPS) -> ad.RecurrentWrapper:
    layer = nn.TransformerEncoderLayer(DIM, 2, 8, batch_first=True)
    return ad.RecurrentWrapper(ad.CausalEncoder(layer), steps, rule=by_position).eval()


@torch.no_grad()
def test_an_output_names_its_shapes_and_how_deep_its_tokens_went() -> None:
    out = looped()(torch.randn(2, 5, DIM), mask=MASK, states=True)
    trace = "Trace(8 tokens in (2, 5), 4 steps, mean depth 2.50, live 1.00, 0.75, 0.50, 0.25)"
    assert repr(out.trace) == trace
    assert repr(out) == f"Output(hidden=(2, 5, 6) float32, trace={trace}, states=(2, 5, 4, 6) float32)"
    assert repr(out._replace(states=None)) == f"Output(hidden=(2, 5, 6) float32, trace={trace})"


@torch.no_grad()
def test_of_many_iterations_the_first_and_the_last_are_named() -> None:
    trace = looped(10)(torch.randn(1, 1, DIM), min_depth=7).trace
    assert repr(trace) == (
        "Trace(1 tokens in (1, 1), 10 steps, mean depth 7.00, live 1.00, 1.00, 1.00, 1.00, 1.00, 1.00, ..., 0.00)"
    )


@torch.no_grad()
def test_where_there_are_no_tokens_there_is_no_depth() -> None:
    x = torch.randn(2, 5, DIM)
    assert repr(looped()(x[:0]).trace) == "Trace(0 tokens in (0, 5), 4 steps)"
    assert repr(looped()(x, mask=torch.zeros_like(MASK)).trace) == "Trace(0 tokens in (2, 5), 4 steps)"


def test_tensors_without_numbers_and_what_is_no_tensor_have_a_text() -> None:
    nowhere, live = torch.zeros(2, 5, DIM, device="meta"), torch.ones(2, 5, STEPS, dtype=torch.bool)
    out = ad.Output(nowhere, ad.Trace(live.to("meta"), nowhere, nowhere))
    assert repr(out) == "Output(hidden=(2, 5, 6) float32 on meta, trace=Trace(tokens in (2, 5), 4 steps))"
    with FakeTensorMode() as mode:
        assert repr(ad.Trace(mode.from_tensor(live), nowhere, nowhere)) == "Trace(tokens in (2, 5), 4 steps)"
    assert repr(ad.Output("a", ad.Trace(1, 2, 3))) == "Output(hidden='a', trace=Trace(1, 2, 3))"  # type: ignore[arg-type]


@torch.no_grad()
def test_a_cache_names_its_arguments_and_what_it_holds() -> None:
    model, x, cache = looped(), torch.randn(2, 5, DIM), ad.KVReuseCache()
    assert repr(cache) == "KVReuseCache(layout='filled', capacity=None, empty)"
    model(x, mask=MASK, cache=cache)
    # 2 rows of 5 places, each a depth of 8 bytes and for 4 iterations keys and values of 6 numbers of 4 bytes
    held = f"{2 * 5 * (8 + 4 * 2 * 6 * 4):,}"
    assert repr(cache) == (
        f"KVReuseCache(layout='filled', capacity=None, steps=4, layers=1, rows=2 of 3 to 5 tokens, {held} bytes on cpu)"
    )
    cache.crop(3)
    assert " rows=2 of 3 tokens, " in repr(cache)
