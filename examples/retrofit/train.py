"""Training: every model on the same windows for as many steps, by the loss of the state at which each token exits."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import adadepth as ad
from adadepth.hf import calibrate, flops

from ..figures import cosine
from .model import Arm, learned

RATES = {"lora": 5e-4, "gate": 3e-3, "update": 3e-2}  # by what a parameter belongs to
OPEN = 0.4  # of the steps, before any token may exit
EARLIER = 0.3  # weight of the answers before the last one
AGAIN = 20  # steps after which the threshold is fitted anew


class Plan(NamedTuple):
    """Steps of training, windows in a step, tokens in a window; windows to fit on and to judge on; rounds of timing."""

    steps: int = 100
    batch: int = 4
    window: int = 128
    fitted: int = 16
    judged: int = 64
    rounds: int = 3


QUICK = Plan(steps=2, batch=2, window=16, fitted=4, judged=4, rounds=1)


def train(model: Any, arm: Arm, windows: Tensor, plan: Plan, seed: int) -> list[float]:
    """The loss of every step, in nats per token. Thresholds are fitted on some of the same windows."""
    fitted = windows[:: max(1, len(windows) // plan.fitted)][: plan.fitted]
    order = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(groups(model), weight_decay=0.0)
    rates, losses = [group["lr"] for group in optimiser.param_groups], []
    objective: Callable[[Any, Tensor], tuple[Tensor, Tensor]] = guided if arm.gates else plain
    first = math.ceil(OPEN * plan.steps)
    model.train()
    for step in range(plan.steps):
        if arm.gates and step >= first and (step - first) % AGAIN == 0:
            model.loop.rule = rule_for(model, fitted, plan.batch)
        rows = windows[torch.randint(len(windows), (plan.batch,), generator=order)]
        total, loss = objective(model, rows)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * cosine(step, plan.steps, max(1, plan.steps // 10))
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(learned(model).values(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    return losses


def groups(model: Any) -> list[dict[str, Any]]:
    """What is trained, each part at its learning rate."""
    parts: dict[str, list[Tensor]] = {part: [] for part in RATES}
    for name, parameter in learned(model).items():
        part = next((part for part in ("gate", "update") if f".{part}." in name), "lora")
        parts[part].append(parameter)
    return [{"params": parts[part], "lr": rate} for part, rate in RATES.items() if parts[part]]


def plain(model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, to be minimised and to be reported."""
    loss = nats(model(input_ids=rows).logits, rows).mean()
    return loss, loss


def guided(model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One window runs at every depth, and its gates learn what is to come; in the others tokens exit.

    The window stands in the batch once for every depth.
    """
    steps = model.loop.steps
    depths = torch.arange(1, steps + 1).unsqueeze(1)
    free = torch.ones(len(rows) - 1, 1, dtype=depths.dtype)
    batch = torch.cat([rows[:1].expand(steps, -1), rows[1:]])
    out = model(input_ids=batch, min_depth=torch.cat([depths, free]), max_depth=torch.cat([depths, steps * free]))
    each = nats(out.logits, batch)
    gain = (each[: steps - 1] - each[steps - 1]).detach()  # (steps - 1, window - 1)
    taught = each[steps - 1].mean() + EARLIER * each[: steps - 1].mean()
    taught = taught + F.mse_loss(out.trace.scores[steps - 1, :-1].T, gain)
    at_exit = each[steps:].mean() if len(rows) > 1 else taught
    total = (taught + (len(rows) - 1) * at_exit) / len(rows)
    return total, at_exit


def nats(logits: Tensor, ids: Tensor) -> Tensor:
    """Each next token's loss `(rows, window - 1)`."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def rule_for(model: Any, fitted: Tensor, batch: int, depth: float = 2.0) -> ad.Rule:
    """The rule by which tokens exit after `depth` iterations, on average."""
    return calibrate(model, fitted.split(batch), flops.relative(model, depth)).rule
