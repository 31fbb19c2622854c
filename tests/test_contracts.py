"""Every public piece keeps the contract of its kind: add yours to a table and it is tested."""

import abc
import inspect
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import adadepth as ad

pytestmark = pytest.mark.shapes

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


def _top_one(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    return remaining * (scores[..., -1] == scores[..., -1].amax(-1, keepdim=True))


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
    "TrainingOnly": ad.TrainingOnly(_top_one),
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
FUNCTIONS = """bottom_k calibrate check_block check_looped depth_mask depth_prior expected_depth geometric_depths
is_monotonic iteration live_share loss_gain make_monotonic mask_depth per_iteration_loss ponder_cost positions
random_depth rows take top_k uniform_depths"""
OTHERS = """BottomKPenalty Calibration CausalEncoder Cost DepthBudget Flops Gate KVReuseCache LossGain OutOfReach Output
Pointwise RecurrentWrapper RowPerToken Rule TokenFlops TokenView Trace Update diagnostics ranks testing"""


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
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]  # type: ignore[misc]
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


def _below_all_before(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    newest = scores[..., -1].masked_fill(remaining == 0, torch.inf)
    return remaining * (newest <= newest.cummin(-1).values)


def _above_the_mean(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    return torch.where(scores[..., -1] >= scores[..., -1].mean(-1, keepdim=True), remaining, 0)


def _above_the_mean_of_the_live(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    count = (remaining > 0).sum(-1, keepdim=True).clamp_min(1)
    return torch.where(scores[..., -1] >= scores[..., -1].sum(-1, keepdim=True) / count, remaining, 0)


def _every_second_slot(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    return torch.where(torch.arange(scores.shape[1]) % 2 == 0, remaining, 0)


def _last_slots(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    return torch.where(torch.arange(scores.shape[1]).flip(0) < 5, remaining, 0)


def _first_neighbours(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    """Whoever has another token right behind it: wrong only where padding stands between two."""
    behind = torch.cat([remaining[:, 1:], torch.zeros_like(remaining[:, :1])], 1)
    return torch.where(behind > 0, remaining, 0)


def _share_of_the_row(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    return remaining * (scores[..., -1] / scores[..., -1].sum(-1, keepdim=True))


class _Raw(ad.Gate):
    """A learned gate without its sigmoid; `near` makes its logits of usual states lie near one half."""

    def __init__(self, near: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(DIM, 1)
        if near:
            nn.init.normal_(self.proj.weight, std=0.01)
            nn.init.constant_(self.proj.bias, 0.5)

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        return self.proj(h).squeeze(-1)


class _NoAxis(ad.Update):
    def forward(self, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int) -> Tensor:
        return x + scores[..., -1] * h


class _Tells(ad.Update):
    """`compute` of `h` and of the scores; its `scales` is as told."""

    def __init__(self, scales: bool, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.scales, self.compute = scales, compute

    def forward(self, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int) -> Tensor:
        return x + self.compute(h, scores)


def _later(h: Tensor, scores: Tensor) -> Tensor:
    """Multiplies by the first score, from the second iteration on."""
    return h * scores[..., :1] if scores.shape[-1] > 1 else h


class _Pair(ad.Gate):
    def forward(self, h: Tensor, previous: Tensor, step: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return h[..., 0].sigmoid(), h


ONLY_LIVE = "Padding has remaining 0: count and average only where remaining > 0, and read positions instead of slots."
TRAINING = "If it is for training only, say so: TrainingOnly(rule)."
AXIS = "To scale by a score, keep its axis: write scores[..., -1:], not scores[..., -1]."
LOGITS = (
    "A score that scales an update must be in [0, 1]: _Raw gave scores from # to # for {}. If they are logits, end the "
    "gate in .sigmoid(). If they only decide exits, use an update that ignores them, here and in the loop: "
    "check_gate(gate, dim, update=Ungated(Interpolate()))."
)
OFF = "The {} gave another result for {}: off by # of #.{}"
GATE, RULE, UPDATE = ad.testing.check_gate, ad.testing.check_rule, ad.testing.check_update
# A message has # where it has a number.
BROKEN: dict[str, tuple[Callable[[], object], str]] = {
    "a gate that peeks": (lambda: GATE(_Peeks(), DIM), OFF.format("gate", "a token alone", "")),
    "two scores": (
        lambda: GATE(_Pair(), DIM),
        "_Pair must return one tensor, got tuple. Return it alone, and from every branch.",
    ),
    "logits": (lambda: GATE(_Raw(), DIM), LOGITS.format("Interpolate")),
    "logits in [0, 1] by chance": (lambda: GATE(_Raw(near=True), DIM), LOGITS.format("Interpolate")),
    "logits behind a closed scale": (
        lambda: GATE(_Raw(), DIM, update=ad.ReZero(ad.Residual())),
        LOGITS.format("ReZero"),
    ),
    "an update that writes": (
        lambda: UPDATE(_Writes(), DIM),
        "_Writes changed an argument in place; make a new tensor.",
    ),
    **{
        f"an update that multiplies unsaid, {name}": (
            lambda compute=compute: UPDATE(_Tells(False, compute), DIM),  # type: ignore[misc]
            "_Tells computes with a score, but has scales = False: the loop would accept an exit criterion, and scores "
            "outside [0, 1]. Write scales = True in its class.",
        )
        for name, compute in {"always": lambda h, scores: h * scores[..., -1:], "later": _later}.items()
    },
    "an update that says what it does not": (
        lambda: UPDATE(_Tells(True, lambda h, scores: h), DIM),
        "_Tells has scales = True, but its result does not depend on the scores: the loop would refuse an exit "
        "criterion. Remove the attribute: it is False by default.",
    ),
    "no axis": (
        lambda: UPDATE(_NoAxis(), DIM),
        f"An update must give the next input, shape (5, {DIM}): _NoAxis raised The size of tensor a (5) must match the "
        f"size of tensor b ({DIM}) at non-singleton dimension 1. {AXIS}",
    ),
    "no axis, one dimension": (
        lambda: UPDATE(_NoAxis(), 1),
        f"An update must give the next input: expected shape (5, 1), got (5, 5). {AXIS}",
    ),
    "a rule that looks ahead": (
        lambda: RULE(_top_one),
        OFF.format("rule", "the first tokens without the later ones", f" {TRAINING}"),
    ),
    "a rule that looks back": (
        lambda: RULE(_below_all_before),
        OFF.format("rule", "the later tokens without the first ones, as in decoding", f" {TRAINING}"),
    ),
    "a rule that says whether": (
        lambda: RULE(lambda scores, remaining, positions: scores[..., -1] > 0.5),
        "A rule must return how much of each token continues, in floating point, got torch.bool. For hard exits, write "
        "torch.where(condition, remaining, 0).",
    ),
    "a forgotten return": (
        lambda: RULE(lambda scores, remaining, positions: None),  # type: ignore[arg-type]
        "function must return one tensor, got None. Return it alone, and from every branch.",
    ),
    "a mean with padding": (
        lambda: RULE(_above_the_mean, causal=False),
        OFF.format("rule", "rows with padding at the left", f" {ONLY_LIVE}"),
    ),
    "slots": (
        lambda: RULE(_every_second_slot),
        OFF.format("rule", "rows with padding at the left", f" {ONLY_LIVE}"),
    ),
    "slots from the end": (
        lambda: RULE(ad.TrainingOnly(_last_slots)),
        OFF.format("rule", "rows with padding at the right", f" {ONLY_LIVE}"),
    ),
    "neighbours": (
        lambda: RULE(ad.TrainingOnly(_first_neighbours)),
        OFF.format("rule", "rows with padding in between", f" {ONLY_LIVE}"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_suite_fails_on_a_piece_that_breaks_it(name: str) -> None:
    call, message = BROKEN[name]
    number = r"-?[0-9.]+(e[-+][0-9]+)?"
    with pytest.raises(AssertionError, match=f"^{re.escape(message).replace(re.escape('#'), number)}$"):
        call()


def test_scores_that_are_detached_or_only_compared_may_scale_or_not() -> None:
    UPDATE(_Tells(True, lambda h, scores: h * scores[..., -1:].detach()), DIM)
    UPDATE(_Tells(False, lambda h, scores: torch.where(scores[..., -1:] > 0.5, h, 0)), DIM)


def test_a_row_of_padding_alone_gives_numbers() -> None:
    with pytest.raises(AssertionError, match=r"^A rule must be finite, also for a row of padding alone, got .*nan"):
        RULE(_share_of_the_row, causal=False)


def test_a_rule_may_look_at_its_row_if_it_says_so() -> None:
    for rule in (_top_one, _below_all_before, _above_the_mean_of_the_live):
        RULE(rule, causal=False)
        RULE(ad.TrainingOnly(rule))


def test_a_score_in_another_unit_may_cut() -> None:
    for update in (ad.Replace(), ad.ReZero(ad.Ungated(ad.Residual())), ad.Ungated(ad.Ponder(_embedding(), _head()))):
        GATE(_Raw(), DIM, update=update)
    criterion = _Raw().requires_grad_(False)
    GATE(criterion, DIM)
    with pytest.raises(AssertionError, match=r"must be in \[0, 1\]"):
        GATE(criterion, DIM, update=ad.Interpolate())
