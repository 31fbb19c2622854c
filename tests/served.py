"""Requests served by a `DepthBatch`: rows of a case, cut into prompts and single tokens, in any order of arrival."""

import random
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from cases import Setting
from torch import Tensor

import adadepth as ad
from adadepth.cache.kv_reuse import LayoutName
from adadepth.serving import DepthBatch, Failed, Ran


class How(NamedTuple):
    """How requests come and are served; all choices come from the seed."""

    seed: int
    layout: LayoutName
    rows: int
    width: int
    times: int  # how often each row of the case is requested
    draft: int | None  # a token begins when the one before it has run so many iterations
    waits: bool  # some of those in flight wait now and then
    spoiled: bool  # whether some of these begin with another input, and anew when that is seen


class Request:
    """The real tokens of one row of a case."""

    def __init__(self, s: Setting, row: int) -> None:
        mask = s.arguments["mask"]
        self.setting, self.row = s, row
        self.columns = list(range(s.x.shape[1])) if mask is None else mask[row].nonzero().flatten().tolist()
        self.begun = 0  # of these
        self.hidden: dict[int, Tensor] = {}
        self.depth: dict[int, int] = {}
        self.wrong: set[int] = set()  # those that began with another input

    @property
    def done(self) -> bool:
        return len(self.hidden) == len(self.columns) and not self.wrong

    def next(self, tokens: int, spoil: bool = False) -> dict[str, Any]:
        """What its next tokens begin with, one row of `DepthBatch.begin`."""
        s, columns = self.setting, self.columns[self.begun : self.begun + tokens]

        def cut(given: Any) -> Any:
            if not isinstance(given, Tensor) or not given.dim():
                return given
            own = given[self.row : self.row + 1]
            return own[:, columns] if own.shape[1] > 1 or s.x.shape[1] == 1 else own

        x, arguments = cut(s.x), {name: cut(given) for name, given in s.arguments.items() if name != "mask"}
        if spoil:
            self.wrong.add(self.begun)
            x = x + torch.randn_like(x)
        self.begun += len(columns)
        tau = s.tau[self.row : self.row + 1] if isinstance(s.tau, Tensor) else None
        return {"x": x, "tau": tau, **arguments}

    def forget(self, position: int) -> None:
        """Its tokens from a position on are to begin anew."""
        self.begun = position
        for held in (self.hidden, self.depth):
            for later in [p for p in held if p >= position]:
                del held[later]
        self.wrong = {p for p in self.wrong if p < position}


def begin(batch: DepthBatch, s: Setting, rows: dict[int, dict[str, Any]]) -> None:
    """Some rows together, each with as many tokens."""
    if not rows:
        return
    parts = list(rows.values())
    together: dict[str, Any] = {
        name: torch.cat([part[name] for part in parts]) if isinstance(given, Tensor) and given.dim() else given
        for name, given in parts[0].items()
    }
    tau = together.pop("tau")
    rule = s.pieces["rule"] if tau is None else type(s.pieces["rule"])(tau)
    batch.begin([*rows], rule=rule, **together)


def serve(loop: ad.RecurrentWrapper, s: Setting, how: How) -> tuple[list[Request], int]:
    """All requests, and how many calls mixed tokens of several iterations."""
    chance, batch_size, seq = random.Random(how.seed), *s.x.shape[:2]
    batch = DepthBatch(loop, ad.KVReuseCache(how.layout, seq), how.rows, how.width)
    requests = [Request(s, row) for row in range(batch_size) for _ in range(how.times)]
    chance.shuffle(requests)
    waiting = [request for request in requests if request.columns]
    owners: dict[int, Request] = {}
    mixed = 0
    while waiting or owners:
        for row in range(how.rows):
            if row not in owners and waiting and chance.random() < 0.7:
                owners[row] = waiting.pop()
                begin(batch, s, {row: owners[row].next(chance.randint(1, 3))})
        mixed += len({run.ask.step for run in batch._passes if run.ask is not None}) > 1
        results = [ran for ran in _call(batch, how, chance) if isinstance(ran, Ran)]
        last = [ran for ran in results if _take(batch, owners[ran.row], ran)]
        for row, request in [*owners.items()]:
            if request.done:
                batch.release(row)
                del owners[row]
        begin(batch, s, _drafts(batch, owners, last, how, chance))
        waits = {row: one for row, one in owners.items() if one.begun == len(one.hidden) < len(one.columns)}
        begin(batch, s, {row: request.next(1) for row, request in waits.items()})
    assert batch.room == how.width
    assert not int(batch.cache.lengths.sum())
    return requests, mixed


def _call(batch: DepthBatch, how: How, chance: random.Random) -> list[Ran | Failed]:
    """A call, in which some wait if they may; where they may not, that is said, and nothing has changed."""
    if not how.waits or chance.random() < 0.4:
        return batch.call()
    for run in batch._passes:
        run.apply_drops()
    wait, steps = set[tuple[int, int]](), dict[tuple[int, int], int]()
    for run in batch._passes:
        places = {(run.chunks[i].row, run.chunks[i].position) for i in run.active}
        steps |= dict.fromkeys(places, run.part[0]) if places else {}
        wait |= places if chance.random() < 0.4 else set()
    ordered = sorted(steps)
    wrong = any(a[0] == b[0] and a in wait and b not in wait and steps[b] >= steps[a] for a, b in pairwise(ordered))
    if not wrong:
        return batch.call(wait)
    with pytest.raises(ValueError, match="Let both wait, or neither"):
        batch.call(wait)
    return batch.call()


def _take(batch: DepthBatch, request: Request, ran: Ran) -> bool:
    """What ran in a row, and whether it stands: a successor that began wrong is dropped when that is seen."""
    if ran.position >= request.begun:
        return False
    if ran.left:
        for i, (hidden, depth) in enumerate(zip(ran.hidden, ran.depth.tolist(), strict=True)):
            request.hidden[ran.position + i], request.depth[ran.position + i] = hidden, depth
        if (end := ran.position + len(ran.hidden)) in request.wrong:
            batch.drop(ran.row, end)
            request.forget(end)
    return True


def _drafts(
    batch: DepthBatch, owners: dict[int, Request], results: list[Ran], how: How, chance: random.Random
) -> dict[int, dict[str, Any]]:
    """The next tokens of the rows in which the one before has run enough, as long as there is room."""
    drafts: dict[int, dict[str, Any]] = {}
    for ran in results:
        request, end = owners.get(ran.row), ran.position + len(ran.hidden)
        enough = how.draft is not None and int(ran.depth[-1]) >= how.draft
        if enough and request and end == request.begun < len(request.columns) and len(drafts) < batch.room:
            drafts[ran.row] = request.next(1, spoil=how.spoiled and not ran.left and chance.random() < 0.5)
    return drafts
