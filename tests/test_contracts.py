"""Every public piece keeps the contract of its kind: add yours to a table and it is tested."""

import abc
import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import adadepth as ad

DIM, STEPS, VOCAB = 8, 4, 11


class TwoOpinions(ad.Gate):
    """A user's gate: goes on while either the state or its change says so."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.state, self.change = nn.Linear(dim, 1), nn.Linear(dim, 1)

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        del step
        votes = torch.cat([self.state(h), self.change(h - previous)], -1)
        return votes.sigmoid().amax(-1)


class Patience:
    """A user's rule: a token leaves once its score was below tau twice running."""

    def __init__(self, tau: float) -> None:
        self.tau = tau

    def __call__(self, scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
        del positions
        twice = scores.shape[-1] > 1 and (scores[..., -2:] < self.tau).all(-1)
        return remaining * torch.as_tensor(twice).logical_not()


def _embedding() -> nn.Embedding:
    return nn.Embedding(VOCAB, DIM)


def _head() -> nn.Linear:
    return nn.Linear(DIM, VOCAB, bias=False)


def _opened(update: ad.ReZero) -> ad.ReZero:
    nn.init.constant_(update.alpha, 0.3)
    return update


GATES: dict[str, Callable[[], ad.Gate]] = {
    "LinearGate": lambda: ad.LinearGate(DIM),
    "SharedMLPGate": lambda: ad.SharedMLPGate(DIM),
    "PerIterationMLPGate": lambda: ad.PerIterationMLPGate(DIM, STEPS, hidden=5),
    "ConvergenceGate": lambda: ad.ConvergenceGate(),
    "KLGate": lambda: ad.KLGate(_head()),
    "MaxProbGate": lambda: ad.MaxProbGate(_head()),
    "MarginGate": lambda: ad.MarginGate(_head()),
    "EntropyGate": lambda: ad.EntropyGate(_head()),
    "TwoOpinions": lambda: TwoOpinions(DIM),
}
RULES: dict[str, ad.Rule] = {
    "Threshold": ad.Threshold(0.5),
    "SurvivalThreshold": ad.SurvivalThreshold(0.3),
    "Survival": ad.Survival(),
    "ACT": ad.ACT(0.05),
    "Lookahead": ad.Lookahead(ad.Threshold(0.5)),
    "NotBefore": ad.NotBefore(2, ad.Threshold(0.5)),
    "Patience": Patience(0.5),
}
UPDATES: dict[str, Callable[[], ad.Update]] = {
    "Replace": ad.Replace,
    "Residual": ad.Residual,
    "Interpolate": ad.Interpolate,
    "InputInjection": ad.InputInjection,
    "Ponder": lambda: ad.Ponder(_embedding(), _head()),
    "SurvivalScaled": lambda: ad.SurvivalScaled(ad.Interpolate()),
    "Ungated": lambda: ad.Ungated(ad.Residual()),
    "ReZero": lambda: _opened(ad.ReZero(ad.Interpolate())),
}
FUNCTIONS = """bottom_k check_block depth_mask depth_prior expected_depth geometric_depths is_monotonic iteration
live_share loss_gain make_monotonic mask_depth per_iteration_loss ponder_cost positions random_depth top_k
uniform_depths"""
OTHERS = """BottomKPenalty CausalEncoder Cost Flops Gate KVReuseCache LossGain Output Pointwise RecurrentWrapper
Rule TokenFlops TokenView Trace Update diagnostics ranks testing"""


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.usefixtures("default_dtype")
def test_gate(name: str) -> None:
    ad.testing.check_gate(GATES[name](), DIM, STEPS)


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str) -> None:
    ad.testing.check_rule(RULES[name], STEPS)


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.usefixtures("default_dtype")
def test_update(name: str) -> None:
    ad.testing.check_update(UPDATES[name](), DIM, STEPS)


def test_public_names_are_these_and_every_piece_is_in_its_table() -> None:
    names = {name for name in vars(ad) if not name.startswith("_")}
    modules = {name for name in names if inspect.ismodule(getattr(ad, name))} - {"diagnostics", "ranks", "testing"}
    pieces = ({*GATES} | {*RULES} | {*UPDATES}) - {"TwoOpinions", "Patience"}
    assert names - modules == pieces | {*FUNCTIONS.split()} | {*OTHERS.split()}


def _classes() -> list[type]:
    return [thing for name, thing in vars(ad).items() if inspect.isclass(thing) and not name.startswith("_")]


@pytest.mark.parametrize("kind", _classes(), ids=lambda kind: kind.__name__)
def test_a_public_class_is_abstract_or_final(kind: type) -> None:
    abstract = inspect.isabstract(kind) or abc.ABC in kind.__bases__
    protocol = getattr(kind, "_is_protocol", False)
    assert abstract or protocol or getattr(kind, "__final__", False)


@pytest.mark.parametrize("kind", _classes(), ids=lambda kind: kind.__name__)
def test_a_constructor_takes_at_most_five_arguments_and_no_switch(kind: type) -> None:
    if kind is ad.RecurrentWrapper or inspect.isabstract(kind):
        return  # the one written exemption, and interfaces
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert len(named) <= 5
    assert not [p.name for p in named if p.annotation is bool]


@pytest.mark.parametrize("name", [*FUNCTIONS.split(), *(kind.__name__ for kind in _classes())])
def test_every_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(ad, name))


class _Peeks(ad.Gate):
    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        return h.sum(-1) - (h.sum(-1).mean() if h.numel() else 0)


class _Writes(ad.Update):
    def forward(self, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int) -> Tensor:
        return x.add_(h)


def _top_one(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    return remaining * (scores[..., -1] == scores[..., -1].amax(-1, keepdim=True))


def _below_all_before(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    return remaining * (scores[..., -1] <= scores[..., -1].cummin(-1).values)


def test_the_suites_fail_on_pieces_that_break_them() -> None:
    with pytest.raises(AssertionError, match="The gate gave another result for a token alone: off by"):
        ad.testing.check_gate(_Peeks(), DIM)
    with pytest.raises(AssertionError, match=r"^_Writes changed an argument in place; make a new tensor[.]$"):
        ad.testing.check_update(_Writes(), DIM)
    with pytest.raises(
        AssertionError, match="The rule gave another result for the first tokens without the later ones"
    ):
        ad.testing.check_rule(_top_one)
    ad.testing.check_rule(_top_one, causal=False)
    with pytest.raises(AssertionError, match="the later tokens without the first ones, as in decoding: off by"):
        ad.testing.check_rule(_below_all_before)
    ad.testing.check_rule(_below_all_before, causal=False)
    with pytest.raises(AssertionError, match=r"^A rule must say how much stays, got torch.bool[.] For a cut write "):
        ad.testing.check_rule(lambda scores, remaining, positions: scores[..., -1] > 0.5)
