"""The loop against its definition: packed = dense = oracle, in every output and every gradient."""

import ast
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from blocks_zoo import BLOCKS, DIM, looped, mixed, spread
from hypothesis import assume, given, settings
from hypothesis import strategies as st
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


def cases(rules: Iterable[str] = RULES) -> st.SearchStrategy[Case]:
    bounds = st.sampled_from(["none", "token", "row", "int", "scalar", "none", "token", "none"])
    return st.builds(
        Case,
        seed=st.integers(0, 2**31),
        batch=st.sampled_from([2, 3, 3, 1]),
        seq=st.sampled_from([5, 6, 4, 5, 6, 3, 5, 4, 2, 6, 1]),
        steps=st.sampled_from([4, 3, 4, 3, 2, 4, 3, 2, 4, 1]),
        causal=st.booleans(),
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

    def run(self, skip: bool) -> oracle.Result:
        out = ad.RecurrentWrapper(**self.pieces, skip=skip)(self.x, states=True, **self.arguments)
        return oracle.Result(out.hidden, out.states, *out.trace)


def setting(kind: str, case: Case, dtype: torch.dtype) -> Setting:
    torch.manual_seed(case.seed)
    block, gate = BLOCKS[kind].make(DIM, case.causal), GATES[case.gate][0](case.steps)
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


def by_definition(kind: str, case: Case, s: Setting) -> oracle.Result:
    shape = s.x.shape[:2]
    mask = torch.ones(shape, dtype=torch.bool) if s.arguments["mask"] is None else s.arguments["mask"]
    least, most = s.arguments["min_depth"], s.arguments["max_depth"]
    tau = s.tau.expand(shape)[mask] if isinstance(s.tau, Tensor) else s.tau
    return oracle.loop(
        s.pieces["block"],
        BLOCKS[kind].layers,
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
    )


def everything(result: oracle.Result, s: Setting) -> dict[str, Tensor]:
    """All outputs, and the gradients of a linear function of them, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    outputs = result._asdict()
    loss = 0 * s.x.sum()  # where all is padding, nothing depends on anything
    for name in ("hidden", "states", "scores", "exit_probs"):
        t = outputs[name]
        loss = loss + (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)).sum()
    gradients = torch.autograd.grad(loss, s.tensors(), allow_unused=True, materialize_grads=True)
    return outputs | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], relative: float, absolute: float) -> None:
    """max|Δ| against max|want|; `absolute` is rounding alone, for what is 0 by calculus (a key's bias, say)."""
    assert torch.equal(got["live"], want["live"])
    for name, a in got.items():
        b = want[name]
        assert a.shape == b.shape and a.dtype == b.dtype, (name, a.shape, a.dtype, b.shape, b.dtype)
        if b.numel():
            error, size = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
            assert error <= relative * size + absolute, f"{name}: off by {error:.1e}, largest {size:.1e}"


def test_the_oracle_shares_no_code() -> None:
    imported = set()
    for node in ast.walk(ast.parse(Path(oracle.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"collections.abc", "typing", "torch"}


@pytest.mark.parametrize("kind", BLOCKS)
def test_packed_equals_dense_equals_oracle_at_mixed_depths(kind: str) -> None:
    seen = compare(kind, only_mixed=True, examples=200)
    assert seen >= 200


@pytest.mark.parametrize("kind", BLOCKS)
def test_packed_equals_dense_equals_oracle_in_any_case(kind: str) -> None:
    compare(kind, only_mixed=False, examples=60)


def compare(kind: str, only_mixed: bool, examples: int) -> int:
    """How many cases were compared."""
    seen = 0

    @settings(max_examples=examples)
    @given(case=cases())
    def check(case: Case) -> None:
        nonlocal seen
        s = setting(kind, case, torch.float64)
        want = by_definition(kind, case, s)
        assume(mixed(want.live) or not only_mixed)
        want = everything(want, s)
        for skip in (True, False):
            assert_same(everything(s.run(skip), s), want, 1e-10, 1e-13)
        seen += 1

    check()
    return seen


@pytest.mark.parametrize("kind", BLOCKS)
def test_packed_equals_dense_in_float32(kind: str) -> None:
    @settings(max_examples=20)
    @given(case=cases(["threshold", "threshold per row", "lookahead threshold"]))
    def check(case: Case) -> None:
        s = setting(kind, case, torch.float32)
        dense = everything(s.run(skip=False), s)
        # Rounding differs between the two, so a score within rounding of tau may flip.
        margin = (dense["scores"] - torch.as_tensor(s.tau).reshape(-1, 1, 1)).abs()
        assume(mixed(dense["live"]) and bool((margin > 1e-4).all()))
        assert_same(everything(s.run(skip=True), s), dense, 1e-5, 1e-6)

    check()


def ponder() -> ad.Ponder:
    return ad.Ponder(nn.Embedding(11, DIM), nn.Linear(DIM, 11))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("rule", [None, ad.Threshold(0.0), ad.SurvivalThreshold(0.0)])
@pytest.mark.parametrize("update", [ad.Residual, ad.Interpolate, ponder])
@pytest.mark.parametrize("scaled", [False, True])
def test_every_gate_learns_where_nobody_leaves(skip: bool, rule: Any, update: Any, scaled: bool) -> None:
    piece = ad.SurvivalScaled(update()) if scaled else update()
    gate = ad.PerIterationMLPGate(DIM, 4)
    loop = ad.RecurrentWrapper(BLOCKS["attention"].make(DIM, True), 4, gate, rule, piece, skip=skip)
    loop(torch.randn(2, 5, DIM)).hidden.square().sum().backward()
    for mlp in gate.mlps:
        assert all(bool((p.grad != 0).any()) for p in mlp.parameters())


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("update", [ad.Replace, ad.InputInjection, lambda: ad.Ungated(ad.Residual())])
def test_a_gate_that_only_cuts_learns_from_the_scores_alone(skip: bool, update: Any) -> None:
    loop = looped("attention", skip=skip)
    loop.rule, loop.update = None, update()
    out = loop(torch.randn(3, 6, DIM, dtype=torch.float64))
    gate = list(loop.gate.parameters())
    assert torch.autograd.grad(out.hidden.sum(), gate, allow_unused=True, retain_graph=True) == (None,) * len(gate)
    assert all(bool((g != 0).any()) for g in torch.autograd.grad(out.trace.scores.sum(), gate))
