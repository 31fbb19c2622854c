"""What runs once for each token of a request: before the loop, and between the loop and its next token."""

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..cache.kv_reuse import KVReuseCache
from ..loop.wrapper import RecurrentWrapper
from ..serving import DepthBatch, Ran
from .ends import around, before, head
from .requests import Request

_TILE = 16  # a matrix product of fewer rows often costs more


@final
class Outside:
    """Embeddings and prelude, coda and head of an adapted model, for tokens of many requests.

    The model's own forward runs around layers that are not there: up to the first of them, and, for the same
    embeddings at the same positions, from the last of them on. Prelude and coda have caches of their own, of `capacity`
    tokens in each of `rows`.
    """

    def __init__(self, model: Any, rows: int, width: int, capacity: int) -> None:
        def batch(part: RecurrentWrapper | None) -> DepthBatch | None:
            return None if part is None else DepthBatch(part, KVReuseCache(capacity=capacity), rows, width)

        self.model, self.prelude, self.coda = model, batch(model.prelude), batch(model.coda)

    @property
    def device(self) -> torch.device:
        """Where ids are given to the model."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def before(self, requests: list[Request], places: list[range]) -> list[Tensor]:
        """What the loop is given for tokens of requests, `(n, dim)` each: those at `places`, the next of their rows."""
        self.model.bind()
        x = self._embedded(requests, places)
        if self.model.config.span is not None:
            x = before(self.model.base, self.model.anatomy, x, self._tensor([at for span in places for at in span]))
        return _once(self.prelude, requests, [*x[0].split([len(span) for span in places])])

    def logits(self, requests: list[Request], states: list[Tensor]) -> Tensor:
        """Logits `(len(requests), vocabulary)` behind the newest token of each.

        `states (n, dim)` are what the loop gave for the newest tokens; only with a coda those before the last are read.
        """
        states = _once(self.coda, requests, states)
        hidden = self._after(requests, torch.stack([state[-1] for state in states]).unsqueeze(0))
        padded = F.pad(hidden, (0, 0, 0, -hidden.shape[1] % _TILE))
        logits: Tensor = head(self.model.base, self.model.anatomy, padded).logits[0, : hidden.shape[1]]
        return logits.float()  # as `generate` chooses

    def release(self, row: int) -> None:
        """Forget a row."""
        for batch in (self.prelude, self.coda):
            if batch is not None:
                batch.release(row)

    def _after(self, requests: list[Request], hidden: Tensor) -> Tensor:
        """What the head is given for the newest tokens, for what the layers gave, `(1, n, dim)` both."""
        if self.model.config.span is None:
            return hidden
        places = [range(len(request.ids) - 1, len(request.ids)) for request in requests]
        x, positions = self._embedded(requests, places), self._tensor([span.start for span in places])
        tuples = self.model.loop.block.tuples
        return around(self.model.base, self.model.anatomy, x, positions, lambda _: hidden, lambda: tuples)

    def _embedded(self, requests: list[Request], places: list[range]) -> Tensor:
        """Embeddings `(1, n, dim)` of tokens at some places, one request behind the other."""
        ids = [word for one, span in zip(requests, places, strict=True) for word in one.ids[span.start : span.stop]]
        x: Tensor = self.model.get_input_embeddings()(self._tensor(ids))
        return x

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor([numbers], device=self.device)


def _once(batch: DepthBatch | None, requests: list[Request], states: list[Tensor]) -> list[Tensor]:
    """What layers that run once give for the newest tokens of requests, `(n, dim)` each."""
    if batch is None:
        return states
    rows = [request.row for request in requests]
    x, mask = in_rows(states)
    batch.begin(rows, x, mask=mask)
    ran = {one.row: one.hidden for one in batch.call() if isinstance(one, Ran)}
    return [ran[row] for row in rows]


def in_rows(states: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """States `(n, dim)` each, as rows `(batch, longest, dim)` with their mask; None: they are equally long."""
    lengths = torch.tensor([len(state) for state in states], device=states[0].device)
    x = pad_sequence(states, batch_first=True)
    mask = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
    return x, None if len({len(state) for state in states}) == 1 else mask
