"""`Ponder` is softmax(h Wᵀ + b) E as if written plainly, but for the matrix that it never makes."""

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator

import allocations
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad
from adadepth import _vocabulary

pytestmark = pytest.mark.shapes

DIM, VOCABULARY = 6, 11
TABLES = list(itertools.product((False, True), repeat=2))
WANTED = list(itertools.product((False, True), repeat=4))


@pytest.fixture(params=["words", "tokens"])
def ragged_tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tiles of 4, 4 and 3 words, however few the tokens, as on a CPU; or of 3 tokens and all words, as elsewhere."""
    if request.param == "words":
        monkeypatch.setattr(_vocabulary, "ON_CPU", 1)
        monkeypatch.setattr(_vocabulary, "_WORDS", 4)
    else:
        tile_of, device = _vocabulary.tile_of, torch.device("cuda")
        monkeypatch.setattr(_vocabulary, "ELSEWHERE", 3 * VOCABULARY + 1)
        monkeypatch.setattr(_vocabulary, "tile_of", lambda tokens, words, _device: tile_of(tokens, words, device))


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(tied: bool, bias: bool, scale: float = 1.0) -> ad.Ponder:
    embedding, head = nn.Embedding(VOCABULARY, DIM), nn.Linear(DIM, VOCABULARY, bias=bias)
    if tied:
        head.weight = embedding.weight
    return ad.Ponder(embedding, head, scale)


def plain(ponder: ad.Ponder, x: Tensor, h: Tensor, scores: Tensor) -> Tensor:
    logits = ponder.logit_scale * ponder.head(h)
    if ponder.softcap is not None:
        logits = ponder.softcap * torch.tanh(logits / ponder.softcap)
    mixed = logits.softmax(-1) @ ponder.embedding.weight
    return x + ponder.scale * scores[..., -1:] * mixed


def ours(ponder: ad.Ponder, x: Tensor, h: Tensor, scores: Tensor) -> Tensor:
    return ponder(x, h, x, scores, scores.shape[-1] - 1)


def inputs(*shape: int) -> list[Tensor]:
    sizes = (DIM, DIM, 2)
    return [torch.randn(*shape, size).requires_grad_() for size in sizes]


def tables(ponder: ad.Ponder) -> list[Tensor]:
    return list({id(p): p for p in (*ponder.head.parameters(), ponder.embedding.weight)}.values())


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference by the largest value; as it is where all of them are 0."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    got, expected = got.detach(), expected.detach()
    if not got.numel():
        return 0.0
    return float((got - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def compare(ponder: ad.Ponder, given: list[Tensor], tolerance: float) -> None:
    """Values and the gradient of everything that wants one."""
    wanting = [t for t in (*given, *tables(ponder)) if t.requires_grad]
    a, b = ours(ponder, *given), plain(ponder, *given)
    assert error(a, b) <= tolerance
    weight = torch.randn_like(a)
    for got, expected in zip(
        torch.autograd.grad(a, wanting, weight), torch.autograd.grad(b, wanting, weight), strict=True
    ):
        assert error(got, expected) <= tolerance


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize(("tied", "bias"), TABLES)
@pytest.mark.usefixtures("double", "ragged_tiles")
def test_values_and_gradients_are_those_of_the_plain_formula(shape: tuple[int, ...], tied: bool, bias: bool) -> None:
    compare(make(tied, bias, scale=0.7), inputs(*shape), 1e-10)


@pytest.mark.parametrize(("logit_scale", "softcap"), [(0.3, None), (1.0, 0.9), (2.5, 1.7)])
@pytest.mark.parametrize(("tied", "bias"), TABLES)
@pytest.mark.usefixtures("double", "ragged_tiles")
def test_logits_are_scaled_and_bounded(tied: bool, bias: bool, logit_scale: float, softcap: float | None) -> None:
    ponder = make(tied, bias)
    ponder.logit_scale, ponder.softcap = logit_scale, softcap
    compare(ponder, inputs(2, 3), 1e-10)


@pytest.mark.usefixtures("double")
def test_one_tile_is_as_good_as_many() -> None:
    compare(make(tied=False, bias=True), inputs(5), 1e-10)


@pytest.mark.parametrize(("tied", "bias"), TABLES)
@pytest.mark.usefixtures("double", "ragged_tiles")
def test_gradients_are_those_of_finite_differences(tied: bool, bias: bool) -> None:
    ponder = make(tied, bias)

    def update(x: Tensor, h: Tensor, scores: Tensor, *_: Tensor) -> Tensor:
        return ours(ponder, x, h, scores)

    assert torch.autograd.gradcheck(update, (*inputs(3), *tables(ponder)))


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.usefixtures("double", "ragged_tiles")
def test_what_is_frozen_gets_no_gradient_and_the_rest_keep_theirs(wanted: tuple[bool, ...]) -> None:
    ponder = make(tied=False, bias=True)
    x, h, scores = inputs(5)
    for tensor, want in zip((h, *tables(ponder)), wanted, strict=True):
        tensor.requires_grad_(want)
    compare(ponder, [x, h, scores], 1e-10)


@pytest.mark.usefixtures("double")
def test_a_second_derivative_is_refused() -> None:
    x, h, scores = inputs(3)
    (gradient,) = torch.autograd.grad(ours(make(False, False), x, h, scores).sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|autograd formula"):
        gradient.sum().backward()


@pytest.mark.usefixtures("ragged_tiles")
def test_huge_logits_are_no_trouble() -> None:
    ponder, given = make(tied=False, bias=True), inputs(50)
    with torch.no_grad():
        ponder.head.weight.mul_(1e4)
    assert ponder.head(given[1]).abs().max() > 1e4
    wanting = [*given, *tables(ponder)]
    results = [update(ponder, *given) for update in (ours, plain)]
    assert error(*results) <= 1e-5
    x, h, *others = zip(*(torch.autograd.grad(new.sin().sum(), wanting) for new in results), strict=True)
    # All but one word have no chance, and h no gradient: what is left of it is rounding times the weights.
    assert (h[0] - h[1]).abs().max() <= 1e-6 * ponder.head.weight.abs().max()
    for got, expected in (x, *others):
        assert (got - expected).abs().max() <= 1e-5


@pytest.mark.usefixtures("double", "ragged_tiles")
def test_words_that_cannot_be_may_fill_a_tile() -> None:
    ponder = make(tied=False, bias=True)
    with torch.no_grad():
        ponder.head.bias[:6] = -torch.inf
    compare(ponder, inputs(5), 1e-10)


def gradients(compute: Callable[[], Tensor], wanting: list[Tensor], *, inside: bool) -> list[Tensor]:
    """The result and its gradients, with autocast on in the forward pass or in both."""
    with torch.autocast("cpu", torch.bfloat16):
        new = compute()
        if inside:
            return [new, *torch.autograd.grad(new.float().sin().sum(), wanting)]
    return [new, *torch.autograd.grad(new.float().sin().sum(), wanting)]


@pytest.mark.usefixtures("ragged_tiles")
def test_under_autocast_products_are_rounded_and_the_rest_is_not() -> None:
    ponder, given = make(tied=False, bias=True), inputs(50)
    wanting = [*given, *tables(ponder)]
    got = gradients(lambda: ours(ponder, *given), wanting, inside=False)
    for a, b in zip(got, gradients(lambda: ours(ponder, *given), wanting, inside=True), strict=True):
        assert torch.equal(a, b)
    new = plain(ponder, *given)
    exact = [new, *torch.autograd.grad(new.sin().sum(), wanting)]
    rough = gradients(lambda: plain(ponder, *given), wanting, inside=False)
    for a, b, c in zip(got, exact, rough, strict=True):
        assert a.dtype == torch.float32
        assert error(a, b) <= max(2 * error(c, b), 4e-3)
    assert error(got[0], exact[0]) > 1e-4


def test_autocast_around_the_backward_pass_alone_changes_nothing() -> None:
    ponder, given = make(tied=False, bias=True), inputs(50)
    wanting = [*given, *tables(ponder)]
    outside, inside = (ours(ponder, *given).sin().sum() for _ in range(2))
    expected = torch.autograd.grad(outside, wanting)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(inside, wanting)
    assert all(map(torch.equal, got, expected))


@pytest.mark.usefixtures("double")
def test_autocast_leaves_float64_alone() -> None:
    ponder, given = make(tied=False, bias=True), inputs(5)
    with torch.autocast("cpu", torch.bfloat16):
        new = ours(ponder, *given)
    assert error(new, plain(ponder, *given)) <= 1e-10


def test_a_model_in_bfloat16_keeps_its_dtype_and_sums_in_float32() -> None:
    ponder = make(tied=True, bias=False)
    ponder.embedding.bfloat16()
    ponder.head.weight = ponder.embedding.weight
    given = [t.detach().bfloat16().requires_grad_() for t in inputs(50)]
    wanting = [*given, ponder.head.weight]
    new = ours(ponder, *given)
    got = [new, *torch.autograd.grad(new.float().sum(), wanting)]
    assert all(t.dtype == torch.bfloat16 for t in got)
    x, h, scores = (t.detach().float() for t in given)
    weight = ponder.head.weight.detach().float()
    assert error(new.detach().float(), x + scores[..., -1:] * (F.linear(h, weight).softmax(-1) @ weight)) < 1e-2


def test_no_matrix_of_tokens_by_vocabulary_is_made() -> None:
    tokens, vocabulary, dim = 512, 16384, 16
    ponder = ad.Ponder(nn.Embedding(vocabulary, dim), nn.Linear(dim, vocabulary))
    x, h = torch.randn(2, tokens, dim, requires_grad=True)
    matrix = 4 * tokens * vocabulary

    def step(update: Callable[[ad.Ponder, Tensor, Tensor, Tensor], Tensor]) -> None:
        update(ponder, x, h, torch.ones(tokens, 1)).sum().backward()

    assert allocations.largest(lambda: step(plain)) >= matrix
    two_tiles = 2 * 4 * _vocabulary.ON_CPU
    assert two_tiles <= matrix / 2
    assert allocations.largest(lambda: step(ours)) <= two_tiles


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, DIM), nn.Linear(DIM, VOCABULARY)
        if tied:
            self.head.weight = self.embedding.weight
        block = ad.Pointwise(nn.Linear(DIM, DIM))
        ponder = ad.Ponder(self.embedding, self.head)
        self.looped = ad.RecurrentWrapper(block, 3, ad.LinearGate(DIM, bias=0.0), ad.Threshold(0.5), ponder, skip=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.looped(self.embedding(ids)).hidden)


def test_the_tables_are_not_its_own() -> None:
    model = Model()
    assert not list(model.looped.update.parameters()) and not list(model.looped.update.children())
    assert {name.split(".")[0] for name in model.looped.state_dict()} == {"block", "gate"}
    assert sum(p.numel() for p in model.looped.parameters()) == 2 * DIM + 1 + DIM * DIM


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_refers_to_its_own_tables(twin: Callable[[Model], Model]) -> None:
    model = Model(tied=True)
    copied = twin(model)
    update = copied.looped.update
    assert update.head is copied.head and update.embedding is copied.embedding
    assert copied.head is not model.head and copied.head.weight is copied.embedding.weight
    ids = torch.arange(5)[None]
    assert torch.equal(copied(ids), model(ids))


def test_new_tables_are_used_once_they_are_assigned() -> None:
    ponder, other = make(tied=False, bias=True), make(tied=False, bias=False)
    x, h, scores = inputs(5)
    ponder.embedding, ponder.head = other.embedding, other.head
    assert torch.equal(ours(ponder, x, h, scores), ours(other, x, h, scores))
    assert not list(ponder.parameters())


def test_a_meta_device_gives_shapes() -> None:
    with torch.device("meta"):
        new = ours(make(tied=False, bias=True), *inputs(2, 3))
    new.sum().backward()
    assert new.is_meta and new.shape == (2, 3, DIM)


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.every), torch.bfloat16])
def test_what_is_said_of_the_operator_to_a_compiler_is_true(dtype: torch.dtype) -> None:
    h, weight, table = (torch.randn(n, DIM, dtype=dtype, requires_grad=True) for n in (5, VOCABULARY, VOCABULARY))
    bias = torch.randn(VOCABULARY, dtype=dtype, requires_grad=True)
    torch.library.opcheck(_vocabulary._mix, (h, weight, bias, table, dtype, 0.5, 2.0))
    given = [t.detach() for t in (h, h, weight, bias, table)]
    mixed, log_total = _vocabulary._mix(*given[1:], dtype, 0.5, 2.0)
    for needed in ([True] * 4, [True, False, False, True]):
        torch.library.opcheck(_vocabulary._unmix, (*given, mixed, log_total, dtype, 0.5, 2.0, needed))


@pytest.mark.skipif(torch.__version__ < "2.9", reason="Dynamo of torch 2.8 does not trace the loop")
@pytest.mark.plain
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.every), True])
@pytest.mark.usefixtures("double")
def test_the_dense_loop_compiles_whole(tied: bool) -> None:
    model, ids = Model(tied), torch.arange(10).view(2, 5)
    expected = model(ids)
    wanted = torch.autograd.grad(expected.sin().sum(), list(model.parameters()))
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(ids)
    assert error(got, expected) <= 1e-10
    for a, b in zip(torch.autograd.grad(got.sin().sum(), list(model.parameters())), wanted, strict=True):
        assert error(a, b) <= 1e-10


@pytest.mark.plain
def test_anything_but_an_embedding_and_a_linear_map_is_refused() -> None:
    head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, VOCABULARY))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ad.Ponder(nn.Embedding(VOCABULARY, DIM), head)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "Ponder expected an nn.Embedding and an nn.Linear, whose weights it reads, got embedding=Embedding and "
        "head=Sequential. Give it the linear map itself; a norm before it belongs in the block."
    )


SHAPES = (
    "Ponder expected embedding.weight and head.weight of one shape (vocabulary, dim), got (12, 6) and (11, 6). Resize "
    "both and reassign ponder.embedding and ponder.head."
)


def test_tables_of_two_shapes_are_refused_when_given_and_when_used() -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ad.Ponder(nn.Embedding(VOCABULARY + 1, DIM), nn.Linear(DIM, VOCABULARY))
    assert str(caught.value) == SHAPES
    ponder = make(tied=False, bias=False)
    ponder.embedding = nn.Embedding(VOCABULARY + 1, DIM)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ours(ponder, *inputs(5))
    assert str(caught.value) == SHAPES
