"""Cases of a loop: drawn by hypothesis, made into pieces and numbers, and answered by definition."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from blocks_zoo import BLOCKS, DIM, Kind, spread
from hypothesis import seed, settings
from hypothesis import strategies as st
from narrow import the
from torch import Tensor, nn

import adadepth as ad

TAU = 0.5


class Change(ad.Gate):
    """A user's own gate: reads the state before, and its scores are not in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(DIM))

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        return 0.5 + 0.2 * step + ((h - previous) @ self.weight).tanh()


def change(module: Change) -> oracle.Gate:
    return lambda h, previous, step: 0.5 + 0.2 * step + ((h - previous) @ module.weight).tanh()


def unruly(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    """A user's own rule: asks for more than there is, for less than nothing, and for tokens that left."""
    return 3 * scores[..., -1] - 1 + 0.1 * positions


# name: (what makes the piece, its formula)
GATES: dict[str, tuple[Callable[[int], Any], Callable[[Any], oracle.Gate]]] = {
    "per iteration": (lambda steps: ad.PerIterationMLPGate(DIM, steps, hidden=6), oracle.per_iteration_gate),
    "shared": (lambda steps: ad.SharedMLPGate(DIM), oracle.shared_gate),
    "linear": (lambda steps: ad.LinearGate(DIM), oracle.linear_gate),
    "change": (lambda steps: Change(), change),
    "none": (lambda steps: None, oracle.no_gate),
}
# tau is a number, or for the rules named "per row" a tensor (batch, 1)
RULES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], oracle.Rule]]] = {
    "threshold": (ad.Threshold, oracle.threshold),
    "threshold per row": (ad.Threshold, oracle.threshold),
    "survival threshold": (ad.SurvivalThreshold, oracle.survival_threshold),
    "survival threshold per row": (ad.SurvivalThreshold, oracle.survival_threshold),
    "ACT": (lambda tau: ad.ACT(0.3), lambda tau: oracle.act(0.3)),
    "survival": (lambda tau: ad.Survival(), lambda tau: oracle.survival),
    "lookahead threshold": (
        lambda tau: ad.Lookahead(ad.Threshold(tau)),
        lambda tau: oracle.lookahead(oracle.threshold(tau)),
    ),
    "lookahead ACT": (lambda tau: ad.Lookahead(ad.ACT(0.3)), lambda tau: oracle.lookahead(oracle.act(0.3))),
    "not before threshold": (
        lambda tau: ad.NotBefore(2, ad.Threshold(tau)),
        lambda tau: oracle.not_before(2, oracle.threshold(tau)),
    ),
    "unruly": (lambda tau: unruly, lambda tau: unruly),
    "none": (lambda tau: None, lambda tau: oracle.never),
}
UPDATES: dict[str, tuple[Callable[[], Any], oracle.Update]] = {
    "interpolate": (ad.Interpolate, oracle.interpolate),
    "residual": (ad.Residual, oracle.residual),
    "replace": (ad.Replace, oracle.replace),
    "input injection": (ad.InputInjection, oracle.input_injection),
    "survival scaled": (
        lambda: ad.SurvivalScaled(ad.Interpolate()),
        oracle.survival_scaled(oracle.interpolate),
    ),
    "ungated": (lambda: ad.Ungated(ad.Residual()), oracle.ungated(oracle.residual)),
}
SOFT = ["ACT", "survival", "lookahead ACT", "unruly"]


class Case(NamedTuple):
    """What hypothesis draws; all numbers come from the seed."""

    seed: int
    batch: int
    seq: int
    steps: int
    causal: bool
    gate: str
    rule: str
    update: str
    mask: str
    min_depth: str
    max_depth: str
    start: bool


def cases(rules: Iterable[str] = RULES, causal: Iterable[bool] = (True, False)) -> st.SearchStrategy[Case]:
    bounds = st.sampled_from(["none", "token", "row", "int", "scalar", "none", "token", "none"])
    return st.builds(
        Case,
        seed=st.integers(0, 2**31),
        batch=st.sampled_from([2, 3, 3, 1]),
        seq=st.sampled_from([5, 6, 4, 5, 6, 3, 5, 4, 2, 6, 1]),
        steps=st.sampled_from([4, 3, 4, 3, 2, 4, 3, 2, 4, 1]),
        causal=st.sampled_from(list(causal)),
        gate=st.sampled_from([*GATES, "per iteration", "shared", "linear", "change"]),
        rule=st.sampled_from([*rules, *(rule for rule in rules if rule in SOFT)]),
        update=st.sampled_from(list(UPDATES)),
        mask=st.sampled_from(["none", "left", "right", "ragged"]),
        min_depth=bounds,
        max_depth=bounds,
        start=st.booleans(),
    )


class Setting(NamedTuple):
    """A case with its numbers: the pieces of a wrapper and the arguments of its call."""

    pieces: dict[str, Any]
    x: Tensor
    arguments: dict[str, Any]
    tau: float | Tensor

    def tensors(self) -> list[Tensor]:
        """Everything that a gradient is compared of."""
        modules = [m for m in self.pieces.values() if isinstance(m, nn.Module)]
        start = self.arguments["start"]
        return [self.x, *([] if start is None else [start]), *(p for m in modules for p in m.parameters())]

    def piece(self, first: int, last: int) -> "Setting":
        """The columns from `first` to before `last`."""
        seq = self.x.shape[1]

        def columns(t: Any) -> Any:
            return t[:, first:last] if isinstance(t, Tensor) and t.dim() > 1 and t.shape[1] == seq else t

        return self._replace(x=self.x[:, first:last], arguments={k: columns(t) for k, t in self.arguments.items()})

    def run(self, loop: ad.RecurrentWrapper, **options: Any) -> oracle.Result:
        out = loop(self.x, states=True, **self.arguments, **options)
        return oracle.Result(out.hidden, the(Tensor, out.states), *out.trace)


def examples(few: int, many: int) -> pytest.MarkDecorator:
    """So few in the ordinary run, and so many by `make test-every`."""
    return pytest.mark.parametrize(
        "examples", [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.every)]
    )


def in_turn(cases: Iterable[tuple[Any, ...]], modes: Sequence[Any]) -> list[Any]:
    """Each case with one of the modes, in turn; `make test-every` has the others."""
    return [
        pytest.param(*case, mode, marks=[] if (at + at // len(modes)) % len(modes) == number else [pytest.mark.every])
        for at, case in enumerate(cases)
        for number, mode in enumerate(modes)
    ]


# Each kind of block with or without skipping.
each = pytest.mark.parametrize(("kind", "skip"), in_turn([(kind,) for kind in BLOCKS], (True, False)))


def of_its_own(kind: str, count: int) -> Callable[[Any], Any]:
    """So many examples, other ones for each kind of block: by default all kinds would be given the same."""
    return lambda check: seed(zlib.crc32(kind.encode()))(settings(max_examples=count)(check))


def setting(kind: Kind, case: Case, dtype: torch.dtype) -> Setting:
    torch.manual_seed(case.seed)
    block, gate = kind.make(DIM, case.causal), GATES[case.gate][0](case.steps)
    if gate is not None:
        spread(gate)
    shape = (case.batch, case.seq)
    tau = TAU + 0.1 * torch.randn(case.batch, 1, dtype=dtype) if "per row" in case.rule else TAU
    pieces = {
        "block": block.to(dtype),
        "steps": case.steps,
        "gate": None if gate is None else gate.to(dtype),
        "rule": RULES[case.rule][0](tau),
        "update": UPDATES[case.update][0](),
        "causal": case.causal,
    }
    arguments = {
        "mask": mask_of(case.mask, shape),
        "min_depth": depth_of(case.min_depth, shape, case.steps, low=0, high=2),
        "max_depth": depth_of(case.max_depth, shape, case.steps, low=case.steps - 3, high=case.steps + 1),
        "start": torch.randn(*shape, DIM, dtype=dtype).requires_grad_() if case.start else None,
    }
    return Setting(pieces, torch.randn(*shape, DIM, dtype=dtype).requires_grad_(), arguments, tau)


def mask_of(kind: str, shape: tuple[int, int]) -> Tensor | None:
    """Some rows are only padding."""
    batch, seq = shape
    lengths = torch.randint((seq + 1) // 2, seq + 1, (batch, 1)) * (torch.rand(batch, 1) > 0.2)
    place = torch.arange(seq)
    masks = {"left": place >= seq - lengths, "right": place < lengths, "ragged": torch.rand(shape) < lengths / seq}
    return masks.get(kind)


def depth_of(kind: str, shape: tuple[int, int], steps: int, low: int, high: int) -> int | Tensor | None:
    """From low to high; tensors may lie outside 1..steps, and are clamped."""
    batch, seq = shape
    drawn = torch.randint(low, high + 1, {"token": (batch, seq), "row": (batch, 1)}.get(kind, ()))
    return None if kind == "none" else min(max(1, int(drawn)), steps) if kind == "int" else drawn


def by_definition(kind: Kind, case: Case, s: Setting, past: oracle.Past | None = None) -> oracle.Result:
    shape = s.x.shape[:2]
    mask = torch.ones(shape, dtype=torch.bool) if s.arguments["mask"] is None else s.arguments["mask"]
    least, most = s.arguments["min_depth"], s.arguments["max_depth"]
    tau = s.tau.expand(shape)[mask] if isinstance(s.tau, Tensor) else s.tau
    return oracle.loop(
        s.pieces["block"],
        kind.layers,
        s.x,
        mask,
        steps=most if isinstance(most, int) else case.steps,
        causal=case.causal,
        gate=GATES[case.gate][1](s.pieces["gate"]),
        rule=RULES[case.rule][1](tau),
        update=UPDATES[case.update][1],
        start=s.x if s.arguments["start"] is None else s.arguments["start"],
        least=torch.as_tensor(1 if least is None else least).expand(shape),
        most=torch.as_tensor(case.steps if most is None else most).expand(shape),
        past=past,
    )


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], relative: float, absolute: float) -> None:
    """max|Δ| against max|want|; `absolute` is rounding alone, for what is 0 by calculus (a key's bias, say)."""
    assert torch.equal(got["live"], want["live"])
    for name, a in got.items():
        b = want[name]
        assert a.shape == b.shape and a.dtype == b.dtype, (name, a.shape, a.dtype, b.shape, b.dtype)
        if b.numel():
            error, size = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
            assert error <= relative * size + absolute, f"{name}: off by {error:.1e}, largest {size:.1e}"
