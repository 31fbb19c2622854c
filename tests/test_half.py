"""In bfloat16, as on a GPU: every execution is as near to the definition in float64 as bfloat16 itself allows.

What it allows is what the definition is off by when it is computed in bfloat16.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import oracle
import pytest
import torch
from blocks_zoo import BLOCKS, DIM, looped, mixed
from narrow import the
from torch import Tensor, nn

import adadepth as ad
from adadepth import _modes

SHAPE, STEPS, HALF = (3, 12), 4, torch.bfloat16
MASK = torch.arange(12) >= torch.tensor([[0], [3], [1]])
KINDS = ["attention", "grouped-query", "window", "softcap and sinks"]
# Roundings fall otherwise where sums have another order; a few tokens have most of a gradient, and of its error.
SLACK = {"hidden": 2.0, "x": 4.0, "block": 4.0, "gate": 4.0}
ORDINARY = [("attention", False), ("softcap and sinks", True)]
kinds = pytest.mark.parametrize("kind", KINDS)
precisions = pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])


def model_of(kind: str) -> ad.RecurrentWrapper:
    """Its numbers are in float32, and are those of bfloat16; no score is near its threshold."""
    loop = looped(kind).to(HALF).float()
    out = loop(rows(), mask=MASK, min_depth=STEPS)
    scores = out.trace.scores[MASK].flatten().sort().values
    middle = scores[len(scores) // 3 : 2 * len(scores) // 3]
    at = middle.diff().argmax()
    loop.rule = ad.Threshold(((middle[at] + middle[at + 1]) / 2).item())
    return loop


def rows() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(*SHAPE, DIM).to(HALF).float()


def precision(autocast: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", HALF) if autocast else nullcontext()


def by_definition(kind: str, loop: ad.RecurrentWrapper, depth: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The outputs at these depths, and the gradients of their sum of squares."""
    loop, x = copy.deepcopy(loop).to(dtype), rows().to(dtype).requires_grad_()
    gate, update = oracle.per_iteration_gate(loop.gate), oracle.interpolate
    given = (gate, oracle.never, update, x, depth, depth)
    hidden = oracle.loop(loop.block, BLOCKS[kind].layers, x, MASK, STEPS, True, *given).hidden
    return measured(loop, x, hidden)


def measured(loop: nn.Module, x: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    hidden[MASK].float().square().sum().backward()
    parts = {
        part: torch.cat([p.grad.flatten() for p in loop.get_submodule(part).parameters() if p.grad is not None])
        for part in ("block", "gate")
    }
    return {"hidden": hidden.detach()[MASK], "x": the(Tensor, x.grad)[MASK], **parts}


def off(got: Tensor, want: Tensor) -> float:
    """The size of the difference, against that of what is wanted."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def executed(loop: ad.RecurrentWrapper, autocast: bool, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    """The outputs, their gradients, and the depths."""
    loop = copy.deepcopy(loop)
    for name, value in options.items():
        setattr(loop, name, value)
    x = rows().requires_grad_()
    if not autocast:
        loop, x = loop.to(HALF), rows().to(HALF).requires_grad_()
    with precision(autocast):
        out = loop(x, mask=MASK)
    assert mixed(out.trace.live)
    return measured(loop, x, out.hidden), out.trace.depth


@kinds
@precisions
def test_training_is_as_near_as_bfloat16_allows(kind: str, autocast: bool) -> None:
    loop = model_of(kind)
    results = {
        name: executed(loop, autocast, **options)
        for name, options in {"packed": {}, "dense": {"skip": False}, "checkpoint": {"checkpoint": True}}.items()
    }
    depth = results["packed"][1]
    exact, allowed = (by_definition(kind, loop, depth, dtype) for dtype in (torch.float64, HALF))
    for name, (got, its) in results.items():
        assert torch.equal(its, depth), name
        for what, want in exact.items():
            assert off(got[what], want) <= SLACK[what] * off(allowed[what], want), (name, what)


def at_once(loop: ad.RecurrentWrapper, x: Tensor) -> ad.Output:
    return loop(x, mask=MASK)


def with_flex(loop: ad.RecurrentWrapper, x: Tensor) -> ad.Output:
    loop.one_call = True
    return loop(x, mask=MASK)


def token_by_token(loop: ad.RecurrentWrapper, x: Tensor, layout: Any) -> ad.Output:
    cache = ad.KVReuseCache(layout)
    first = [loop(x[:, :8], mask=MASK[:, :8], cache=cache)]
    outs = first + [loop(x[:, t : t + 1], cache=cache) for t in range(8, 12)]
    hidden, *trace = (torch.cat(parts, 1) for parts in zip(*((o.hidden, *o.trace) for o in outs), strict=True))
    return ad.Output(hidden, ad.Trace(*trace), None)


EXECUTIONS: dict[str, Callable[[ad.RecurrentWrapper, Tensor], ad.Output]] = {
    "packed": at_once,
    "flex": with_flex,
    "filled": lambda loop, x: token_by_token(loop, x, "filled"),
    "compact": lambda loop, x: token_by_token(loop, x, "compact"),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(  # `make test-every` has the others: bfloat16 is slow on CPUs
    ("kind", "autocast"),
    [
        pytest.param(kind, autocast, marks=[] if (kind, autocast) in ORDINARY else [pytest.mark.every])
        for kind in KINDS
        for autocast in (False, True)
    ],
)
def test_inference_is_as_near_as_bfloat16_allows(kind: str, autocast: bool) -> None:
    loop, x = model_of(kind).eval(), rows()
    half = loop if autocast else copy.deepcopy(loop).to(HALF)
    half.self_check = False
    with torch.no_grad(), precision(autocast):
        outs = {
            name: execute(copy.deepcopy(half), x if autocast else x.to(HALF)) for name, execute in EXECUTIONS.items()
        }
    depth = outs["packed"].trace.depth
    exact, allowed = (by_definition(kind, loop, depth, dtype)["hidden"] for dtype in (torch.float64, HALF))
    for name, out in outs.items():
        assert torch.equal(out.trace.depth, depth), name
        assert off(out.hidden[MASK], exact) <= SLACK["hidden"] * off(allowed, exact), name


@pytest.mark.parametrize("separates", [True, False])
def test_what_runs_without_gradients_takes_none_from_the_region_of_autocast(
    separates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 2.11, torch used the casts of weights that it keeps there also where gradients are wanted."""
    if not separates:
        monkeypatch.setattr(_modes, "_SEPARATES_CASTS", False)
    monkeypatch.setattr(ad.RecurrentWrapper, "self_check", True)
    head, cached = nn.Linear(DIM, 11), set[tuple[bool, bool]]()
    loop = ad.RecurrentWrapper(looped("attention").block.float(), 3, ad.EntropyGate(head), ad.Threshold(0.3))
    for part in (head, loop.block):
        part.register_forward_hook(lambda *_: cached.add((torch.is_grad_enabled(), torch.is_autocast_cache_enabled())))
    for _ in range(2):  # the second time without a self check
        with torch.autocast("cpu", HALF):
            loss = head(loop(rows(), mask=MASK).hidden).float().logsumexp(-1).mean()
        loss.backward()
        for parameter in (*loop.parameters(), *head.parameters()):
            assert the(Tensor, parameter.grad).abs().sum() > 0
            parameter.grad = None
    assert cached == {(True, True), (False, _modes._SEPARATES_CASTS)}


def by_word(ids: Tensor) -> Tensor:
    """Depths that are the word's: no rounding changes them."""
    return ids % 3 + 1


def test_generated_logits_are_as_near_as_bfloat16_allows() -> None:
    from hf_zoo import IDS, spread  # transformers takes its time
    from hf_zoo import MASK as REAL

    model = spread("llama", slice(1, 3), torch.float32).to(HALF)
    model.loop.rule = None
    options: Any = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    out: Any = model.generate(IDS, attention_mask=REAL, return_dict_in_generate=True, max_depth=by_word, **options)
    ids, real = out.sequences, torch.cat([REAL, torch.ones(3, 4, dtype=REAL.dtype)], 1)
    plain = copy.deepcopy(model)
    plain.loop.skip = False
    models = {"packed": model, "dense": plain, "exact": copy.deepcopy(model).double()}
    with torch.no_grad():
        outs = {name: each(ids, attention_mask=real, max_depth=by_word(ids)) for name, each in models.items()}
    assert mixed(outs["packed"].trace.live)
    logits = {name: each.logits[:, 8:-1] for name, each in outs.items()} | {"generated": torch.stack(out.logits, 1)}
    allowed = off(logits["dense"], logits["exact"])
    assert allowed > 1e-3
    assert all(off(logits[name], logits["exact"]) <= 2 * allowed for name in ("packed", "generated"))
