"""Exit criteria measure what they say, of each token alone, and hold no logits of all tokens."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import allocations
import pytest
import torch
from narrow import the
from torch import Tensor, nn

import adadepth as ad
from adadepth import _vocabulary

pytestmark = pytest.mark.shapes

DIM, VOCABULARY = 6, 11
Token = list[float]


def softmax(logits: Token) -> Token:
    exponentials = [math.exp(logit) for logit in logits]
    return [value / sum(exponentials) for value in exponentials]


def divergence(now: Token, before: Token) -> float:
    return sum(p * math.log(p / q) for p, q in zip(before, now, strict=True))


def entropy(now: Token, _: Token) -> float:
    return -sum(p * math.log(p) for p in now)


def doubt(now: Token, _: Token) -> float:
    return 1 - max(now)


def closeness(now: Token, _: Token) -> float:
    second, first = sorted(now)[-2:]
    return 1 - (first - second)


PREDICTIVE: dict[type[ad.Gate], Callable[[Token, Token], float]] = {
    ad.KLGate: divergence,
    ad.MaxProbGate: doubt,
    ad.MarginGate: closeness,
    ad.EntropyGate: entropy,
}
predictive = pytest.mark.parametrize("kind", PREDICTIVE, ids=lambda kind: kind.__name__)


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens at a time."""
    monkeypatch.setattr(_vocabulary, "ON_CPU", 3 * VOCABULARY)


def make_head() -> nn.Module:
    """With the norm that stands outside the loop."""
    return nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, VOCABULARY))


def states(*shape: int) -> tuple[Tensor, Tensor]:
    h, previous = torch.randn(2, *shape, DIM).unbind()
    return h, previous


@predictive
@pytest.mark.parametrize("shape", [(), (4,), (2, 5), (0,), (2, 0)])
@pytest.mark.usefixtures("double", "small_chunks")
def test_a_prediction_is_scored_as_defined(kind: type[ad.Gate], shape: tuple[int, ...]) -> None:
    head = make_head()
    h, previous = states(*shape)
    scores = kind(head)(h, previous, 1)
    assert scores.shape == shape
    now, before = (head(state).reshape(-1, VOCABULARY).tolist() for state in (h, previous))
    for score, a, b in zip(scores.flatten().tolist(), now, before, strict=True):
        assert score == pytest.approx(PREDICTIVE[kind](softmax(a), softmax(b)), rel=1e-10)


@pytest.mark.parametrize("shape", [(), (4,), (2, 5), (0,)])
@pytest.mark.usefixtures("double")
def test_convergence_is_the_relative_change(shape: tuple[int, ...]) -> None:
    h, previous = states(*shape)
    scores = ad.ConvergenceGate()(h, previous, 1)
    assert scores.shape == shape
    for score, a, b in zip(
        scores.flatten().tolist(), h.reshape(-1, DIM).tolist(), previous.reshape(-1, DIM).tolist(), strict=True
    ):
        assert score == pytest.approx(math.dist(a, b) / math.hypot(*b), rel=1e-10)


def test_convergence_is_finite_where_there_was_nothing() -> None:
    nothing, something = torch.zeros(DIM), torch.ones(DIM)
    gate = ad.ConvergenceGate()
    assert gate(nothing, nothing, 0) == 0
    assert gate(something, something, 0) == 0
    assert gate(nothing, something, 0) == 1
    assert 1e6 < gate(something, nothing, 0) < torch.inf


def score(kind: type[ad.Gate], now: Tensor, before: Tensor) -> float:
    """The score of given logits."""
    return float(kind(nn.Identity())(now, before, 1))


@pytest.mark.parametrize(
    ("kind", "sure", "tie"),
    [(ad.MaxProbGate, 0, 0.5), (ad.MarginGate, 0, 1), (ad.EntropyGate, 0, math.log(2)), (ad.KLGate, 0, 0)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_predictions_at_the_extremes(kind: type[ad.Gate], sure: float, tie: float) -> None:
    one = torch.tensor([1e4, 0, -1e4, -torch.inf])
    two = torch.tensor([1e4, 1e4, -1e4, -torch.inf])
    assert score(kind, one, one) == pytest.approx(sure, abs=1e-6)
    assert score(kind, two, two) == pytest.approx(tie, rel=1e-6)


def test_the_divergence_is_of_the_new_prediction_from_the_old() -> None:
    sure, open_ = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0])
    now, before = softmax(sure.tolist()), softmax(open_.tolist())
    assert score(ad.KLGate, sure, open_) == pytest.approx(divergence(now, before), rel=1e-5)
    assert abs(divergence(now, before) - divergence(before, now)) > 0.1


def with_head(kind: type[ad.Gate]) -> ad.Gate:
    return kind(make_head())


GATES: dict[str, Callable[[], ad.Gate]] = {
    "ConvergenceGate": ad.ConvergenceGate,
    **{kind.__name__: partial(with_head, kind) for kind in PREDICTIVE},
}
every = pytest.mark.parametrize("name", GATES)


@every
def test_scores_are_float32_under_autocast_and_in_bfloat16(name: str) -> None:
    gate = GATES[name]()
    h, previous = states(50)
    exact = gate(h, previous, 1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gate(h, previous, 1)
    assert exact.dtype == rough.dtype == torch.float32
    assert torch.allclose(rough, exact, rtol=0.1, atol=0.02)
    if name != "ConvergenceGate":
        gate.head.bfloat16()
    rough = gate(h.bfloat16(), previous.bfloat16(), 1)
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, rtol=0.1, atol=0.02)


@every
def test_no_gradient_flows(name: str) -> None:
    h, previous = (state.requires_grad_() for state in states(4))
    assert not GATES[name]()(h, previous, 1).requires_grad


@predictive
def test_no_matrix_of_tokens_by_vocabulary_is_made(kind: type[ad.Gate]) -> None:
    tokens, vocabulary = 2048, 16384
    head = nn.Linear(DIM, vocabulary)
    h, previous = states(tokens)
    matrix = 4 * tokens * vocabulary
    with torch.no_grad():
        assert allocations.largest(lambda: head(h)) == matrix
    assert allocations.largest(lambda: kind(head)(h, previous, 1)) <= 4 * _vocabulary.ON_CPU <= matrix / 16


class Model(nn.Module):
    def __init__(self, kind: type[ad.Gate]) -> None:
        super().__init__()
        self.head = nn.Linear(DIM, VOCABULARY)
        block = ad.Pointwise(nn.Linear(DIM, DIM))
        self.looped = ad.RecurrentWrapper(block, 3, kind(self.head), ad.Threshold(0.5), skip=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.looped(x).hidden)


@predictive
def test_the_head_is_not_its_own(kind: type[ad.Gate]) -> None:
    model = Model(kind)
    gate = the(kind, model.looped.gate)
    assert not list(gate.parameters()) and not list(gate.children())
    assert {name.split(".")[0] for name in model.looped.state_dict()} == {"block"}


@predictive
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_refers_to_its_own_head(kind: type[ad.Gate], twin: Callable[[Model], Model]) -> None:
    model = Model(kind)
    copied = twin(model)
    assert the(kind, copied.looped.gate).head is copied.head
    assert copied.head is not model.head


@predictive
def test_a_new_head_is_used_once_it_is_assigned(kind: type[ad.Gate]) -> None:
    gate, other = kind(make_head()), kind(make_head())
    h, previous = states(4)
    assert not torch.equal(gate(h, previous, 1), other(h, previous, 1))
    gate.head = other.head
    assert torch.equal(gate(h, previous, 1), other(h, previous, 1))
    assert not list(gate.parameters())


@every
def test_a_token_that_has_its_answer_leaves_and_one_that_has_none_goes_on(name: str) -> None:
    gate = ad.ConvergenceGate() if name == "ConvergenceGate" else getattr(ad, name)(nn.Linear(2, 2, bias=False))
    if name != "ConvergenceGate":
        the(nn.Linear, gate.head).weight.data = 100 * torch.eye(2)
    sure, unsure = [1.0, 0.0], [0.5, 0.501]
    x = torch.tensor([[sure, unsure]])

    class Turns(nn.Module):
        """Leaves the sure as they are and turns the others over."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.where((x[..., :1] - x[..., 1:]).abs() > 0.5, x, x.flip(-1))

    block = ad.Pointwise(Turns())
    out = ad.RecurrentWrapper(block, 2, gate, ad.Threshold(1e-3), skip=False)(x)
    assert out.trace.depth.tolist() == [[1, 2]]


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(torch.__version__ < "2.9", reason="Dynamo of torch 2.8 does not trace the loop's generator")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("KLGate", "ConvergenceGate") else [pytest.mark.every]) for n in GATES]
)
@torch.no_grad()
def test_the_dense_loop_compiles_whole(name: str) -> None:
    gate = GATES[name]()
    looped = ad.RecurrentWrapper(ad.Pointwise(nn.Linear(DIM, DIM)), 3, gate, ad.Threshold(0.1), skip=False).double()
    if name != "ConvergenceGate":
        gate.head.double()
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    torch._dynamo.reset()
    got = torch.compile(looped, backend="aot_eager", fullgraph=True)(x)
    expected = looped(x)
    assert torch.allclose(got.trace.scores, expected.trace.scores, rtol=1e-10, atol=1e-12)
    assert torch.equal(got.trace.live, expected.trace.live)


class Pair(nn.Module):
    def forward(self, h: Tensor) -> tuple[Tensor, None]:
        return h, None


@predictive
@pytest.mark.parametrize(
    ("head", "got"),
    [
        (nn.Linear(DIM, 1), "(0, 1) from Linear"),
        (nn.Flatten(0), "(0,) from Flatten"),
        (Pair(), "tuple from Pair"),
    ],
    ids=["one word", "one axis", "no tensor"],
)
def test_a_head_that_makes_no_logits_is_refused(kind: type[ad.Gate], head: nn.Module, got: str) -> None:
    h, previous = states(4)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        kind(head)(h, previous, 1)
    assert str(caught.value) == (
        f"{kind.__name__} expected a head that maps (n, dim) to logits (n, vocabulary) over at least 2 words, got "
        f"{got} for (0, 6). Give it the module that computes logits; if the norm is outside the loop, include it: "
        "nn.Sequential(norm, lm_head)."
    )


@pytest.mark.plain
@predictive
@pytest.mark.parametrize(
    ("head", "got"),
    [
        (
            nn.Linear(DIM, VOCABULARY, dtype=torch.float64),
            "Linear failed on states (0, 6) torch.float32: mat1 and mat2",
        ),
        (nn.Linear(DIM + 1, VOCABULARY), "Linear failed on states (0, 6) torch.float32: mat1 and mat2 shapes"),
        (nn.Embedding(VOCABULARY, DIM), "Embedding failed on states (0, 6) torch.float32: Expected tensor"),
        (torch.zeros(VOCABULARY, DIM), "Tensor failed on states (0, 6) torch.float32: 'Tensor' object"),
    ],
    ids=["dtype", "width", "embedding", "tensor"],
)
def test_a_head_that_does_not_take_the_states_is_refused(kind: type[ad.Gate], head: nn.Module, got: str) -> None:
    h, previous = (torch.randn(4, DIM) for _ in range(2))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        kind(head)(h, previous, 1)
    message = str(caught.value)
    assert message.startswith(
        f"{kind.__name__} expected a head that maps (n, dim) to logits (n, vocabulary), but {got}"
    )
    assert message.endswith(". Give it the module that computes logits, of the width and dtype of the states.")
