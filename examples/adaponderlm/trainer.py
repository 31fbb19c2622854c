"""One training run, on one process or many: exactly resumable, whenever it was ended."""

import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, final

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

import adadepth as ad

from . import config as settings
from .checkpoints import PART, Checkpoints, replace
from .config import BadInput, Config
from .model import build, flops_of
from .objective import Figures, Objective
from .plan import Plan, Turn, schedule
from .routers import Router
from .text import check_vocabulary, tokenizer_of, windows

METRICS = "metrics.jsonl"
ADDED = "router.", "told.", "model.loop.gate.", "model.loop.update."  # to what a run without gate and router has


class Diverged(RuntimeError):
    """Training stopped because something was not finite; the message is one line for the user."""


@final
class Trainer:
    """A run: `steps()` goes on from the newest checkpoint, if there is one, to the end, and yields its figures."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.plan = config, accelerator, Plan(config)
        self.out = Path(config.out)
        train, world = config.train, accelerator.num_processes
        self.share = _divided(train.batch, world, "train.batch", "ranks")
        self.micro = train.micro or self.share
        accelerator.gradient_accumulation_steps = _divided(self.share, self.micro, "rows of a rank", "train.micro")
        self.tokenizer = tokenizer_of(config.data)
        torch.manual_seed(config.seed)
        model = build(config.model)
        check_vocabulary(self.tokenizer, model.base.config.vocab_size)
        model.loop.checkpoint = train.checkpointing
        self.whole = Objective(model, config).train()  # pretrained weights come in eval mode
        optimiser = optimiser_of(self.whole, config)
        self.flops = flops_of(model, config.model.layers)
        with accelerator.main_process_first():
            self.data = windows(config.data, self.tokenizer, config.seed, accelerator.process_index, world)
        self.step, self.tokens = 0, 0
        if accelerator.is_fsdp2:
            self._shard_exactly()
        self.objective, self.optimiser = accelerator.prepare(self.whole, optimiser)
        self.checkpoints = Checkpoints(self.out / "checkpoints", accelerator, train.keep)
        self._resume()

    @property
    def last(self) -> int:
        """The number of steps after which this run is done."""
        return self.config.train.stop or self.config.train.steps

    def steps(self) -> Iterator[dict[str, Any]]:
        """Train, and yield the means of every `log` steps; write checkpoints, metrics, and at the end the model."""
        seen: list[dict[str, Any]] = []
        began = time.perf_counter()
        while self.step < self.last:
            turn = self.plan.turn(self.step)
            if turn.since == 0 and turn.stage.fit and self.whole.router is not None:
                self._fit(self.whole.router)
            seen.append(self._update(turn))
            self.step += 1
            saves = self.step % self.config.train.save == 0 or self.step == self.last
            if saves or self.step % self.config.train.log == 0:
                line = self._line(turn, seen, time.perf_counter() - began)
                seen, began = [], time.perf_counter()
                self._write(line)
                yield line
            if saves:
                self._save()
        if self.last == self.config.train.steps:
            self._export()

    def _shard_exactly(self) -> None:
        """Where FSDP2 would round: accelerate's own bf16 also adds up gradients in it, and returns the loss in it."""
        plugin = self.accelerator.state.fsdp_plugin
        if self.accelerator.mixed_precision == "bf16":
            plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
        if self.whole.router is not None:
            plugin.ignored_modules = [self.whole.router]  # it is fitted whole, on every rank

    def _update(self, turn: Turn) -> dict[str, Any]:
        """One step of the optimiser on the rows of all ranks."""
        rows = self.data.batch(self.share).to(self.accelerator.device)
        first = self.accelerator.process_index * self.share
        rate = schedule(self.config.train, turn.at)
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.train.rate * rate * (turn.stage.gate_rate if group["gates"] else 1.0)
        parts = []
        for ids in rows.split(self.micro):
            with self.accelerator.accumulate(self.objective):
                figures = self.objective(ids, turn, first)
                self.accelerator.backward(figures.loss)
                norm = self._clip(turn)
                parts.append(self._figures(figures, norm))
                self._check(parts[-1], ids, turn)
                self.optimiser.step()
                self.optimiser.zero_grad()
            first += len(ids)
        self.tokens += self.config.train.batch * self.config.data.window
        return _mean(parts)

    def _clip(self, turn: Turn) -> Tensor | None:
        """Clip, once all rows have been seen; a frozen backbone gets no gradient."""
        if not self.accelerator.sync_gradients:
            return None
        if turn.stage.learns == "gates":
            for group in self.optimiser.param_groups:
                if not group["gates"]:
                    for weight in group["params"]:
                        weight.grad = None
        return self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.train.clip)

    def _figures(self, figures: Figures, norm: Tensor | None) -> dict[str, Any]:
        """The figures of rows of all ranks, as numbers."""
        depth, seen = figures.live.sum(-1).double().mean(), figures.live[..., :-1].sum((0, 1)).double()
        relative = depth.new_tensor(self.flops.count(figures.live).relative)
        names = "loss", "depth", "relative_flops", "penalty", "guidance"
        own = torch.stack([figures.nats, depth, relative, figures.penalty, figures.guidance])
        own = torch.cat([own.double(), figures.scores * seen, seen])
        parts = self.accelerator.reduce(own, "mean").split([len(names), len(seen), len(seen)])
        means, sums, counts = (part.tolist() for part in parts)
        values: dict[str, Any] = dict(zip(names, means, strict=True))
        values["scores"] = [total / count if count else total for total, count in zip(sums, counts, strict=True)]
        return values | ({} if norm is None else {"norm": float(norm)})

    def _check(self, values: dict[str, Any], ids: Tensor, turn: Turn) -> None:
        """Stop before the weights are touched."""
        numbers = {name: value for name, value in values.items() if name != "scores"}
        numbers |= {f"score of iteration {i}": value for i, value in enumerate(values["scores"], 1)}
        if bad := [name for name, value in numbers.items() if not math.isfinite(value)]:
            path = self.out / f"diverged-{turn.at + 1}-rank-{self.accelerator.process_index}.pt"
            torch.save(ids.cpu(), path)
            raise Diverged(
                f"step {turn.at + 1}, stage {turn.name}: {', '.join(bad)} is not finite; the batch is in {path}. "
                f"{self._advice()}"
            )

    def _check_weights(self) -> None:
        """Stop before they are saved."""
        bad = not all(bool(_local(weight).isfinite().all()) for weight in self.whole.parameters())
        if ad.ranks.any_rank(bad):
            raise Diverged(f"step {self.step}: the weights are not finite after it. {self._advice()}")

    def _advice(self) -> str:
        steps = self.checkpoints.steps()
        kept = f"The newest checkpoint is of step {steps[-1]}" if steps else "There is no checkpoint yet"
        if steps and steps[-1] == self.step:
            kept += ", right before it: remove it to go on from an older one"
        tries = "a lower train.rate, gate_rate or penalty, a longer train.warmup, or train.precision=fp32"
        return f"{kept}. Try {tries}"

    def _fit(self, router: Router) -> None:
        """Let the model say what its iterations are worth, and the router learn it, the same on every rank."""
        probe = windows(self.config.data, self.tokenizer, self.config.seed + 1)
        rows = probe.batch(self.config.model.router.probed).to(self.accelerator.device)
        each = _divided(len(rows), self.accelerator.num_processes, "model.router.probed", "ranks")
        mine = rows[self.accelerator.process_index * each :][:each]
        with torch.no_grad():
            parts = [self.objective(ids, None) for ids in mine.split(self.micro)]
        losses = self.accelerator.gather(torch.cat(parts).float())
        router.fit(rows[:, :-1], losses, self.config.model.router.mean)
        broadcast(list(router.state_dict().values()))  # one device may add up in another order than the next

    def _line(self, turn: Turn, seen: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        tokens = len(seen) * self.config.train.batch * self.config.data.window
        rate = self.config.train.rate * schedule(self.config.train, turn.at)
        about = {"step": self.step, "stage": turn.name, "tokens": self.tokens, "rate": rate}
        return about | _mean(seen) | {"seconds": seconds, "tokens_per_second": tokens / seconds}

    def _write(self, line: dict[str, Any]) -> None:
        self.accelerator.log({name: value for name, value in line.items() if isinstance(value, float)}, self.step)
        if self.accelerator.is_main_process:
            with (self.out / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        self._check_weights()
        more = {"step": self.step, "tokens": self.tokens, "data": self.data.state_dict()}
        self.checkpoints.save(self.step, self.whole, self.optimiser, more)

    def _resume(self) -> None:
        """Go on from the newest checkpoint, or begin where another run is."""
        if self.accelerator.is_main_process:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadInput(f"cannot write to {self.out}: {error.strerror}") from None
            for path in [*self.out.glob(f"*{PART}"), *self.checkpoints.folder.glob(f"*{PART}")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.accelerator.wait_for_everyone()
        if steps := self.checkpoints.steps():
            self._check_settings()
            self._load(self.checkpoints, steps[-1])
        elif self.config.begin is not None:
            self._begin(Path(self.config.begin) / "checkpoints")
        if self.accelerator.is_main_process:
            keep_until(self.out / METRICS, self.step)
            part = self.out / f"config.yaml{PART}"
            settings.write(self.config, part)
            replace(part, self.out / "config.yaml")

    def _check_settings(self) -> None:
        """A run goes on as it began: what is learned, by what, from what."""
        path = self.out / "config.yaml"
        if not path.exists():
            return
        before, now = settings.read([str(path)]), self.config
        parts = {name: (getattr(before, name), getattr(now, name)) for name in ("model", "stages", "seed")}
        parts["data.window"] = before.data.window, now.data.window
        if other := [name for name, (old, new) in parts.items() if old != new]:
            raise BadInput(f"{self.out} holds a run with other {', '.join(other)}: give another out, or remove it")

    def _load(self, checkpoints: Checkpoints, step: int, new: tuple[str, ...] = ()) -> None:
        try:
            more = checkpoints.load(step, self.whole, self.optimiser, new)
        except ValueError as error:
            raise BadInput(str(error)) from None
        self.step, self.tokens = more["step"], more["tokens"]
        self.data.load_state_dict(more["data"])

    def _begin(self, folder: Path) -> None:
        """Weights and moments of another run, of a model that may lack gates and router; all else is new."""
        other = Checkpoints(folder, self.accelerator, 1)
        if not (steps := other.steps()):
            raise BadInput(f"cannot begin where there is no checkpoint: {folder}")
        self._load(other, steps[-1], ADDED)
        if self.step < self.config.train.steps:
            self._check_fitted(self.plan.turn(self.step))
        if self.accelerator.is_main_process:
            shutil.copy(Path(self.config.begin or "") / METRICS, self.out / METRICS)

    def _check_fitted(self, turn: Turn) -> None:
        router, fits = self.whole.router, turn.stage.fit and turn.since == 0
        if router is not None and turn.routed and not fits and not router.fitted:
            raise BadInput(
                f"cannot begin at step {self.step}, in stage {turn.name}, with a router that was never fitted: begin "
                "from a run with one, or at the first step of a stage with fit: true"
            )

    def _export(self) -> None:
        """The model as transformers reads it, with its tokenizer, and the router."""
        main = self.accelerator.is_main_process
        weights: dict[str, Tensor] = {}
        for name, weight in self.whole.state_dict().items():
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # by all ranks
            weights |= {name: whole.cpu()} if main else {}
        if main:
            part = self.out / f"model{PART}"
            self.whole.model.generation_config.eos_token_id = self.tokenizer.eos_token_id
            self.whole.model.save_pretrained(part, state_dict=_under("model.", weights))
            self.tokenizer.save_pretrained(part)
            if self.whole.router is not None:
                parts = {"router": _under("router.", weights), "told": _under("told.", weights)}
                torch.save(parts, part / "router.pt")
            replace(part, self.out / "model")
        self.accelerator.wait_for_everyone()


def optimiser_of(objective: Objective, config: Config) -> torch.optim.Optimizer:
    """AdamW in groups: matrices, which decay; the rest of the backbone; gates, last, which have a rate of their own.

    The scale before a gated update goes with the gates: while it is 0, they have no gradient.
    """
    loop = objective.model.loop
    gates = [] if loop.gate is None else [*loop.gate.parameters(), *loop.update.parameters()]
    known = {id(weight) for weight in gates}
    backbone = [weight for weight in objective.parameters() if weight.requires_grad and id(weight) not in known]
    groups = [
        {"params": [weight for weight in backbone if weight.dim() > 1], "weight_decay": config.train.decay},
        {"params": [weight for weight in backbone if weight.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group | {"gates": False} for group in groups]
    if gates:
        groups.append({"params": gates, "weight_decay": config.train.decay, "gates": True})
    return torch.optim.AdamW(groups, config.train.rate, betas=config.train.betas, fused=True)


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def keep_until(path: Path, step: int) -> None:
    """Drop what a file of metrics says of steps after `step`, and a line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    part = path.with_name(path.name + PART)
    part.write_text("".join(kept), "utf-8")
    replace(part, path)


def _mean(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of numbers, and of numbers in lists, place by place; of what only some parts have, over those."""
    means: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        means[name] = (
            [_mean_of(each) for each in zip_longest(*values)] if isinstance(values[0], list) else _mean_of(values)
        )
    return means


def _mean_of(values: Iterable[float | None]) -> float:
    there = [value for value in values if value is not None]
    return sum(there) / len(there)


def _local(weight: Tensor) -> Tensor:
    """What this rank holds of it."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _divided(whole: int, by: int, what: str, parts: str) -> int:
    if whole % by:
        raise BadInput(f"expected {what} to be a multiple of {parts}={by}, got {whole}")
    return whole // by
