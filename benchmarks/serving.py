"""What serving gains where tokens of many iterations share calls, against the same engine at fixed depth.

`python -m benchmarks.serving` serves a random looped model of Pythia-70M's sizes. Depths are given from outside, so
that they are the wanted ones. The engines of a row take turns, action by action, in one process, and what is
compared is their tokens a second, counted from when all rows are in use.
"""

import argparse
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import adadepth as ad
from adadepth.cache.kv_reuse import LayoutName
from adadepth.serving import DepthBatch, Ran

from ._blocks import stack
from ._measure import machine, write_section

LAYERS, DIM, HEADS = 6, 512, 8
PROMPT, NEW = 16, 48  # tokens of a request


class Model(NamedTuple):
    """A looped language model."""

    embed: nn.Embedding
    looped: ad.RecurrentWrapper
    head: nn.Linear


def model(vocabulary: int, steps: int, ponder: bool = False) -> Model:
    torch.manual_seed(0)
    embed, head = nn.Embedding(vocabulary, DIM), nn.Linear(DIM, vocabulary, bias=False)
    update = ad.Ungated(ad.Ponder(embed, head)) if ponder else ad.Replace()
    return Model(embed, ad.RecurrentWrapper(stack(LAYERS, DIM, HEADS), steps, update=update).eval(), head)


class Engine:
    """Serves requests without end, greedy; `depths` are drawn for each token, None: all go to the end.

    `waits`: a step begins when all rows are done with the last one. `rows` are in flight, `width` tokens in a call.
    """

    def __init__(
        self,
        model: Model,
        rows: int,
        width: int,
        depths: Tensor | None,
        waits: bool = False,
        layout: LayoutName = "filled",
    ) -> None:
        self.model, self.width, self.depths, self.waits = model, width, depths, waits
        self.batch = DepthBatch(model.looped, ad.KVReuseCache(layout, PROMPT + NEW), rows, width)
        self.random = torch.Generator().manual_seed(0)
        self.left = [0] * rows  # tokens that each row is to make
        self.finished, self.ready = deque[tuple[int, Tensor]](), deque[tuple[int, int]]()
        self.tokens, self.seconds = 0, 0.0

    def actions(self) -> Iterator[None]:
        """One after the other: prompts, the head, a call of the block."""
        rows = len(self.left)
        for row in range(rows):  # rows are at different places of their texts
            self.admit(row, NEW - row * NEW // rows)
        while True:
            if self.finished and len(self.ready) < self.room():
                self.read()
                yield
            elif (room := min(self.room(), len(self.ready))) > 0:
                self.begin(sorted(self.ready.popleft() for _ in range(room)))
            else:
                self.finished += [
                    (ran.row, ran.hidden[-1]) for ran in self.batch.call() if isinstance(ran, Ran) and ran.left
                ]
                yield

    def room(self) -> int:
        """How many tokens may begin now."""
        return self.batch.room if not self.waits else self.width if self.batch.room == self.width else 0

    def admit(self, row: int, new: int) -> None:
        self.left[row] = new
        ids = torch.randint(0, self.model.embed.num_embeddings, (1, PROMPT), generator=self.random)
        self.batch.begin([row], self.model.embed(ids), max_depth=self.depth(1, PROMPT))

    def begin(self, some: list[tuple[int, int]]) -> None:
        rows, ids = zip(*some, strict=True)
        self.batch.begin(rows, self.model.embed(torch.tensor(ids).unsqueeze(1)), max_depth=self.depth(len(rows), 1))

    def depth(self, *shape: int) -> Tensor | None:
        if self.depths is None:
            return None
        return self.depths[torch.randint(0, len(self.depths), shape, generator=self.random)]

    def read(self) -> None:
        some = [self.finished.popleft() for _ in range(min(self.width, len(self.finished)))]
        states = torch.stack([hidden for _, hidden in some])
        ids = self.model.head(nn.functional.pad(states, (0, 0, 0, -len(some) % 16))).argmax(-1).tolist()
        self.tokens += len(some)
        for (row, _), new in zip(some, ids, strict=False):
            self.left[row] -= 1
            if self.left[row]:
                self.ready.append((row, new))
            else:
                self.batch.release(row)
                self.admit(row, NEW)


def rates(engines: dict[str, Engine], seconds: float) -> dict[str, float]:
    """Tokens a second of each, of the time that its own actions took."""
    running = {name: engine.actions() for name, engine in engines.items()}
    with torch.inference_mode():
        for engine, actions in zip(engines.values(), running.values(), strict=True):
            while engine.tokens < 2 * len(engine.left):
                next(actions)
            engine.tokens = 0
        while min(engine.seconds for engine in engines.values()) < seconds:
            for name, engine in engines.items():
                if engine.seconds < seconds:
                    start = time.perf_counter()
                    next(running[name])
                    engine.seconds += time.perf_counter() - start
    return {name: engine.tokens / engine.seconds for name, engine in engines.items()}


def bound(vocabulary: int, steps: int, mean: float, ponder: bool) -> float:
    """By how much the FLOPs of a token fall, from fixed depth to a mean depth; attention is not counted."""
    head, block = 2 * DIM * vocabulary, LAYERS * 24 * DIM**2
    between = 2 * head if ponder else 0  # the update between two iterations
    fixed, adaptive = head + steps * block + (steps - 1) * between, head + mean * block + (mean - 1) * between
    return fixed / adaptive


def row(vocabulary: int, steps: int, width: int, seconds: float, ponder: bool = False) -> str:
    """One line of the table: depths are uniform from 1 to `steps`."""
    served, depths = model(vocabulary, steps, ponder), torch.arange(1, steps + 1)
    engines = {
        "fixed": Engine(served, width, width, None),
        "fixed, 2W rows": Engine(served, 2 * width, width, None),
        "waits": Engine(served, width, width, depths, waits=True),
        "2W rows": Engine(served, 2 * width, width, depths),
        "compact": Engine(served, 2 * width, width, depths, layout="compact"),
    }
    rate = rates(engines, seconds)
    fixed, limit = max(rate["fixed"], rate["fixed, 2W rows"]), bound(vocabulary, steps, (steps + 1) / 2, ponder)
    gains = " | ".join(f"{rate[name] / fixed:.2f} ×" for name in ("waits", "2W rows", "compact"))
    share = rate["2W rows"] / fixed / limit
    update = "Ponder" if ponder else "Replace"
    return f"| {width} | {vocabulary:,} | {steps} | {update} | {fixed:.0f} | {gains} | {limit:.2f} × | {share:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="of each engine")
    parser.add_argument("--small", action="store_true", help="one row, and nothing written")
    chosen = parser.parse_args()
    if chosen.small:
        return print(row(2048, 4, 8, chosen.seconds))
    rows = [(vocabulary, 4, width, False) for vocabulary in (50304, 2048) for width in (8, 16, 32)]
    rows += [(2048, 12, 16, False), (50304, 4, 16, True), (50304, 4, 32, True)]
    lines = [
        machine() + ".",
        "",
        f"{LAYERS} layers of {DIM}; requests of {PROMPT} tokens that make {NEW} more; depths uniform from 1 to steps. "
        "Tokens a second over those of the same engine at fixed depth, the faster one of W and 2W rows; the bound is "
        "that of FLOPs.",
        "",
        "| W | vocabulary | steps | update | tokens/s at fixed depth | rows wait for the slowest | 2W rows "
        "| 2W rows, compact | bound | share of it |",
        "|" + "---|" * 10,
    ]
    for vocabulary, steps, width, ponder in rows:
        lines.append(row(vocabulary, steps, width, chosen.seconds, ponder))
        print(lines[-1], flush=True)
    write_section("serving", "\n".join(lines))
    return None


if __name__ == "__main__":
    main()
