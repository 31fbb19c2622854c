"""The loop against its definition: packed = dense = oracle, in every output and every gradient."""

import ast
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from blocks_zoo import BLOCKS, DIM, looped, mixed
from cases import Case, Setting, assert_same, by_definition, cases, examples, of_its_own, setting
from hypothesis import assume, given
from narrow import the
from torch import Tensor, nn

import adadepth as ad


def run(s: Setting, skip: bool) -> oracle.Result:
    return s.run(ad.RecurrentWrapper(**s.pieces, skip=skip))


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


def test_the_oracle_shares_no_code() -> None:
    imported = set()
    for node in ast.walk(ast.parse(Path(oracle.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(the(str, node.module))
    assert imported == {"collections.abc", "typing", "torch"}


@examples(8, 60)
@pytest.mark.parametrize("kind", BLOCKS)
def test_packed_equals_dense_equals_oracle_at_mixed_depths(kind: str, examples: int) -> None:
    seen = compare(kind, only_mixed=True, examples=examples)
    assert seen >= examples


@examples(4, 30)
@pytest.mark.parametrize("kind", BLOCKS)
def test_packed_equals_dense_equals_oracle_in_any_case(kind: str, examples: int) -> None:
    compare(kind, only_mixed=False, examples=examples)


def compare(kind: str, only_mixed: bool, examples: int) -> int:
    """How many cases were compared."""
    seen = 0

    @of_its_own(kind, examples)
    @given(case=cases())
    def check(case: Case) -> None:
        nonlocal seen
        s = setting(BLOCKS[kind], case, torch.float64)
        result = by_definition(BLOCKS[kind], case, s)
        assume(mixed(result.live) or not only_mixed)
        want = everything(result, s)
        for skip in (True, False):
            assert_same(everything(run(s, skip), s), want, 1e-10, 1e-13)
        seen += 1

    check()
    return seen


@pytest.mark.shapes
@examples(3, 20)
@pytest.mark.parametrize("kind", BLOCKS)
def test_packed_equals_dense_in_float32(kind: str, examples: int) -> None:
    @of_its_own(kind, examples)
    @given(case=cases(["threshold", "threshold per row", "lookahead threshold"]))
    def check(case: Case) -> None:
        s = setting(BLOCKS[kind], case, torch.float32)
        dense = everything(run(s, skip=False), s)
        # Rounding differs between the two, so a score within rounding of tau may flip.
        margin = (dense["scores"] - torch.as_tensor(s.tau).reshape(-1, 1, 1)).abs()
        assume(mixed(dense["live"]) and bool((margin > 1e-4).all()))
        packed = everything(run(s, skip=True), s)
        gradients = [name for name in dense if name.startswith("gradient")]  # sums of more terms
        assert_same({name: packed.pop(name) for name in gradients} | {"live": packed["live"]}, dense, 3e-5, 1e-6)
        assert_same(packed, dense, 1e-5, 1e-6)

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
        assert all(bool((the(Tensor, p.grad) != 0).any()) for p in mlp.parameters())


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("update", [ad.Replace, ad.InputInjection, lambda: ad.Ungated(ad.Residual())])
def test_a_gate_that_only_cuts_learns_from_the_scores_alone(skip: bool, update: Any) -> None:
    loop = looped("attention", skip=skip)
    loop.rule, loop.update = None, update()
    out = loop(torch.randn(3, 6, DIM, dtype=torch.float64))
    gate = list(the(nn.Module, loop.gate).parameters())
    assert torch.autograd.grad(out.hidden.sum(), gate, allow_unused=True, retain_graph=True) == (None,) * len(gate)
    assert all(bool((g != 0).any()) for g in torch.autograd.grad(out.trace.scores.sum(), gate))
