"""What is run on the CPU and on a stand-in for a GPU.

A scenario is a function of a device. It makes its tensors from a seed, moves them there, and returns what came.
"""

import re
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from blocks_zoo import BLOCKS, DEEP, DIM, spread
from stand_in import CPU
from stand_in_checks import Scenario
from test_contracts import GATES, RULES, UPDATES
from torch import Tensor, nn

import adadepth as ad
from adadepth import diagnostics
from adadepth.serving import DepthBatch, Ran
from adadepth.testing import check_block, check_gate, check_looped, check_rule, check_update

STEPS, BATCH, SEQ = 4, 3, 6
MASKS = {
    "none": None,
    "left": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]],
    "ragged": [[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0]],
}


def placed(piece: Any, device: torch.device, dtype: torch.dtype = torch.float64) -> Any:
    """A piece on a device, with the heads and embeddings that it refers to."""
    for part in piece.modules() if isinstance(piece, nn.Module) else ():
        for name in ("head", "embedding"):
            if isinstance(model := getattr(part, name, None), nn.Module):
                model.to(device, dtype)
    return piece.to(device, dtype) if isinstance(piece, nn.Module) else piece


def rows(device: torch.device, batch: int = BATCH, seq: int = SEQ) -> Tensor:
    return torch.randn(batch, seq, DIM, dtype=torch.float64).to(device)


def mask_of(kind: str, device: torch.device) -> Tensor | None:
    return None if MASKS[kind] is None else torch.tensor(MASKS[kind], dtype=torch.bool).to(device)


def loop_of(
    device: torch.device,
    kind: str = "attention",
    gate: str | None = "PerIterationMLPGate",
    rule: Any = "Threshold",
    update: str = "Interpolate",
    causal: bool = True,
    **options: Any,
) -> ad.RecurrentWrapper:
    """Seeded; its tokens leave all over it."""
    torch.manual_seed(1)
    zoo = DEEP if kind in DEEP and options.pop("deep", False) else BLOCKS
    block = zoo[kind].make(DIM, causal)
    scores = None if gate is None else spread(GATES[gate]())
    rule = RULES[rule] if isinstance(rule, str) else rule
    makes = UPDATES[update]()
    makes = ad.Ungated(makes) if scores is not None and scores.measures else makes
    block, scores, makes = (placed(piece, device) for piece in (block, scores, makes))
    return ad.RecurrentWrapper(block, STEPS, scores, rule, makes, causal=causal, **options)


def trained(device: torch.device, mask: str = "none", call: Any = None, train: bool = True, **loop: Any) -> Any:
    """A pass, and with `train` the gradients of everything."""
    looped = loop_of(device, **loop).train(train)
    torch.manual_seed(2)
    x, start = rows(device).requires_grad_(train), rows(device).requires_grad_(train)
    out = looped(x, start=start, mask=mask_of(mask, device), states=True, **(call(device) if call else {}))
    if train:
        (out.hidden.square().sum() + out.trace.exit_probs.square().sum()).backward()
    grads = {name: p.grad for name, p in looped.named_parameters()} if train else {}
    return out.hidden, out.states, *out.trace, x.grad, start.grad, grads


LOOPS: dict[str, Scenario] = {}
EXECUTIONS: list[dict[str, Any]] = [{"skip": True}, {"skip": False}, {"skip": True, "checkpoint": True}]
for i, (gate, rule) in enumerate(product([*GATES, None], [*RULES, None])):
    options = EXECUTIONS[i % 3] | {"update": [*UPDATES][i % len(UPDATES)], "mask": [*MASKS][i // 3 % 3]}
    name = f"{gate}, {rule}, " + ", ".join(map(str, options.values()))
    LOOPS[name] = partial(trained, gate=gate, rule=rule, train=i % 4 > 0, **options)


BLOCK_RUNS: dict[str, Scenario] = {
    f"{kind}, causal {causal}, skip {skip}, mask {mask}": partial(
        trained, kind=kind, causal=causal, skip=skip, mask=mask, train=train
    )
    for i, (kind, causal) in enumerate(product(BLOCKS, [True, False]))
    for skip, mask, train in [(True, ["left", "ragged", "none"][i % 3], True), (False, "ragged", i % 2 == 0)]
}


def drawn(draw: Callable[..., Tensor], device: torch.device) -> dict[str, Any]:
    """Depths that stay where a generator of the CPU made them."""
    return {"min_depth": 1, "max_depth": draw((BATCH, SEQ), STEPS, 2.5, torch.Generator().manual_seed(0))}


def given(device: torch.device) -> dict[str, Any]:
    return {
        "min_depth": torch.tensor([[2], [1], [3]], device=device),
        "max_depth": torch.arange(1, SEQ + 1, device=device).clamp_max(STEPS).unsqueeze(0),
    }


CALLS: dict[str, Scenario] = {
    f"{name}, {options}": partial(trained, call=call, mask=mask, **options)
    for name, call, mask in [
        ("uniform depths", partial(drawn, ad.uniform_depths), "left"),
        ("geometric depths", partial(drawn, ad.geometric_depths), "none"),
        ("depths of rows and columns", given, "ragged"),
        ("ints", lambda device: {"min_depth": 2, "max_depth": 3}, "left"),
    ]
    for options in EXECUTIONS
}


@torch.no_grad()
def cached(device: torch.device, layout: Any, batch: int, kind: str, one_call: bool = False) -> Any:
    """A prompt, tokens, a cropped cache, other rows, and tokens again."""
    looped = loop_of(device, kind=kind, deep=True).eval()
    looped.one_call = one_call
    torch.manual_seed(2)
    cache, x = ad.KVReuseCache(layout), rows(device, batch, 9)
    mask = torch.arange(4, device=device) >= torch.arange(batch, device=device).unsqueeze(1)
    outs = [looped(x[:, :4], mask=mask, cache=cache), looped(x[:, 4:5], cache=cache)]
    cache.crop(4 if batch == 1 else torch.tensor([4, 2, 1], device=device))
    outs.append(looped(x[:, 5:7], cache=cache))
    cache.reorder(torch.tensor([0] if batch == 1 else [2, 0, 0], device=device))
    outs += [looped(x[:, 7:8], cache=cache), looped(x[:, 8:], cache=cache, max_depth=2)]
    assert str(device) in repr(cache) or device == CPU
    return outs, cache.lengths, cache.depth


CACHES: dict[str, Scenario] = {
    f"{layout}, batch {batch}, {kind}": partial(cached, layout=layout, batch=batch, kind=kind)
    for layout in ("filled", "compact", "single")
    for batch in (1, 3)
    for kind in ("attention", "grouped-query", "window", "softcap and sinks")
} | {
    f"in one call, {layout}, {kind}": partial(cached, layout=layout, batch=3, kind=kind, one_call=True)
    for layout in ("filled", "single")
    for kind in ("window", "softcap and sinks")
}


@torch.no_grad()
def moved(device: torch.device) -> Any:
    """A cache that was filled on the CPU."""
    cache, looped = ad.KVReuseCache(), loop_of(CPU).eval()
    torch.manual_seed(2)
    x = rows(CPU, 2, 5)
    looped(x[:, :4], cache=cache)
    return looped.to(device)(x[:, 4:].to(device), cache=cache.to(device))


def served(device: torch.device, layout: Any, update: str, gate: str, one_call: bool = False) -> Any:
    """Rows that begin at different times, and one that is dropped."""
    looped = loop_of(device, update=update, gate=gate).eval()
    looped.one_call = one_call
    torch.manual_seed(2)
    batch, x = DepthBatch(looped, ad.KVReuseCache(layout, 8), 2, 4), rows(device, 2, 5)
    batch.begin([0], x[:1, :3])
    ran = batch.call()
    batch.begin([1], x[1:, :2], rule=ad.Threshold(0.3), max_depth=torch.full((1, 1), 3))
    for column in (3, 4):
        while batch.room < batch.width:
            ran += batch.call()
        batch.begin([0, 1], x[:, column : column + 1], mask=torch.ones(2, 1, dtype=torch.bool, device=device))
        ran += batch.call()
        batch.drop(1, batch.length(1) - 1)
    batch.release(0)
    whole = [one for one in ran if isinstance(one, Ran)]
    return [(one.row, one.position, one.hidden, one.depth.tolist(), one.left) for one in whole], batch.cache.lengths


SERVED: dict[str, Scenario] = {
    "a cache that moves": moved,
    "in one call": partial(served, layout="filled", update="Interpolate", gate="LinearGate", one_call=True),
    **{
        f"{layout}, {update}, {gate}": partial(served, layout=layout, update=update, gate=gate)
        for layout in ("filled", "compact")
        for update, gate in [("Interpolate", "PerIterationMLPGate"), ("Ponder", "LinearGate"), ("Residual", "KLGate")]
    },
}


def passed(device: torch.device, **loop: Any) -> tuple[ad.Output, nn.Linear, Tensor]:
    """The output of a pass, a head for it, and labels."""
    looped = loop_of(device, **loop)
    torch.manual_seed(2)
    head, labels = placed(nn.Linear(DIM, 5), device), torch.randint(5, (BATCH, SEQ)).to(device)
    return looped(rows(device), mask=mask_of("left", device), states=True), head, labels


def per_iteration(device: torch.device) -> Any:
    out, head, labels = passed(device)
    losses = ad.per_iteration_loss(out.states, head, labels, chunk=4)
    weighted = (losses * ad.depth_prior("geometric", STEPS, device=device)).sum(-1).mean()
    weighted.backward()
    return losses, weighted, head.weight.grad, *ad.loss_gain(losses, 0.1, 2)


def penalties(device: torch.device) -> Any:
    out, _, _ = passed(device, rule="Survival")
    budget = ad.DepthBudget(2.0).to(device)
    parts = [ad.ponder_cost(out.trace), ad.expected_depth(out.trace), budget(out.trace)]
    for over in ("all", "live"):
        parts.append(ad.BottomKPenalty(0.4, over=over)(out.trace.gates, out.trace.live, 1))
    loss = ad.ranks.anchor(sum(parts), budget)
    return parts, torch.autograd.grad(loss, out.trace.scores), budget.multiplier, budget(out.trace)


def chosen(device: torch.device) -> Any:
    values, live = torch.arange(12.0, device=device).view(3, 4), torch.eye(3, 4, dtype=torch.bool, device=device)
    chosen = [choose(values, 0.5, valid) for choose in (ad.bottom_k, ad.top_k) for valid in (None, live)]
    masks = [ad.make_monotonic(live), ad.mask_depth(live), ad.depth_mask(torch.arange(4, device=device), STEPS)]
    return chosen, masks, ad.is_monotonic(live), ad.live_share(live)


def depths(device: torch.device) -> Any:
    generator = torch.Generator(device).manual_seed(0)
    drawn = [draw((3, 4), STEPS, 2.5, generator) for draw in (ad.uniform_depths, ad.geometric_depths)]
    priors = [ad.depth_prior("geometric", STEPS, device=device), ad.depth_prior("uniform", STEPS, device=device)]
    return drawn, priors, [ad.random_depth(prior, 3) for prior in priors]


def diagnosed(device: torch.device) -> Any:
    looped, head = loop_of(device).eval(), placed(nn.Linear(DIM, 5), device)
    torch.manual_seed(2)
    data = [(rows(device), torch.randint(5, (BATCH, SEQ)).to(device)) for _ in range(2)]

    def score(batch: tuple[Tensor, Tensor], **depths: Any) -> tuple[Tensor, Tensor]:
        out = looped(batch[0], **depths)
        losses = ad.per_iteration_loss(out.hidden.unsqueeze(2), head, batch[1]).squeeze(2)
        return losses, out.trace.depth

    own, curve = diagnostics.measure(score, data), diagnostics.forced(score, data, STEPS)
    mixed, best = diagnostics.mixture(curve, 2.5), diagnostics.oracle(curve)
    groups = diagnostics.gain_by(curve[0], own, diagnostics.deciles(own.loss)), diagnostics.by_exit(own)
    return own, own.nats, own.mean_depth, own.against(mixed), mixed, best, groups


def calibrated(device: torch.device, gate: str) -> Any:
    looped = loop_of(device, gate=gate, rule=None, update="Replace")
    torch.manual_seed(2)
    data = [{"x": rows(CPU, 4, 8), "mask": torch.rand(4, 8) < 0.8} for _ in range(4)]  # it moves them itself
    found = ad.calibrate(looped, data, 2.5)
    return found.tau, found.depth, found.unseen_depth


def flops(device: torch.device) -> Any:
    looped = loop_of(device)
    measured = ad.TokenFlops.measure(looped, DIM, [placed(nn.Linear(DIM, 5), device)])
    return tuple(measured.count(passed(device)[0].trace.live))


class Above:
    """A rule that holds a tensor."""

    def __init__(self, tau: Tensor) -> None:
        self.tau = tau

    def __call__(self, scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
        return torch.where(scores[..., -1] >= self.tau, remaining, 0)


def suite(device: torch.device, check: Callable[..., None], piece: Callable[[], Any], sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check(placed(piece(), device, torch.float32), *sizes)


def loop_suite(device: torch.device, train: bool) -> None:
    looped = loop_of(device, kind="stack").train(train)
    looped.self_check = True
    torch.manual_seed(2)
    x, mask = rows(device), mask_of("left", device)
    looped(x, mask=mask)
    check_looped(looped, x, mask, start=rows(device))


def per_row_threshold(device: torch.device) -> Any:
    tau = torch.tensor([[0.4], [0.5], [0.6]], dtype=torch.float64, device=device)
    return trained(device, rule=ad.SurvivalThreshold(tau), mask="left")


HELPERS: dict[str, Scenario] = {
    "per-iteration loss": per_iteration,
    "penalties": penalties,
    "selection and masks": chosen,
    "depths": depths,
    "diagnostics": diagnosed,
    "calibrate": partial(calibrated, gate="PerIterationMLPGate"),
    "calibrate a criterion": partial(calibrated, gate="MaxProbGate"),
    "flops": flops,
    "a threshold per row": per_row_threshold,
    "repr": lambda device: [re.sub(r" on lazy:0", "", repr(passed(device)[0]))],
    "check_looped": partial(loop_suite, train=False),
    "check_looped in training": partial(loop_suite, train=True),
    "check_rule of one's own": lambda device: check_rule(Above(torch.tensor([0.5], device=device))),
    "check_rule of a tensor": lambda device: check_rule(ad.Lookahead(ad.Threshold(torch.tensor(0.5, device=device)))),
}
for name in GATES:
    HELPERS[f"check_gate {name}"] = partial(suite, check=check_gate, piece=GATES[name], sizes=(DIM, STEPS))
for name in UPDATES:
    HELPERS[f"check_update {name}"] = partial(suite, check=check_update, piece=UPDATES[name], sizes=(DIM, 3))
for name in ("attention", "window"):
    made = partial(BLOCKS[name].make, DIM, True)
    HELPERS[f"check_block {name}"] = partial(suite, check=check_block, piece=made, sizes=(DIM,))

SCENARIOS = {
    f"{room}: {name}": scenario
    for room, scenarios in [
        ("loop", LOOPS),
        ("block", BLOCK_RUNS),
        ("call", CALLS),
        ("cache", CACHES),
        ("serving", SERVED),
        ("helper", HELPERS),
    ]
    for name, scenario in scenarios.items()
}
