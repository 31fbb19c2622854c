"""What runs once for each token of a request: before the loop, and between the loop and its next token."""

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..loop.wrapper import RecurrentWrapper
from ..serving import DepthBatch, Ran
from .cache import AdaptiveCache
from .ends import around, before, head
from .requests import Tokens

_TILE = 16  # a matrix product of fewer rows often costs more


@final
class Outside:
    """Embeddings and prelude, coda and head of an adapted model, for tokens of many requests.

    The model's own forward runs around layers that are not there: up to the first of them, and, for the same
    embeddings at the same positions, from the last of them on. Prelude and coda have their parts
    of the cache, which is new and has a capacity.
    """

    def __init__(self, model: Any, rows: int, width: int, cache: AdaptiveCache) -> None:
        def batch(name: str) -> DepthBatch | None:
            part: RecurrentWrapper | None = getattr(model, name)
            return None if part is None else DepthBatch(part, cache.parts[name], rows, width)

        self.model, self.prelude, self.coda = model, batch("prelude"), batch("coda")

    @property
    def device(self) -> torch.device:
        """Where ids are given to the model."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def before(self, new: list[Tokens]) -> list[Tensor]:
        """What the loop is given for new tokens, `(n, dim)` each: the next of their rows."""
        self.model.bind()
        x = self._embedded([word for tokens in new for word in tokens.ids])
        if self.model.config.span is not None:
            places = self._tensor([at for tokens in new for at in range(tokens.position, tokens.end)])
            x = before(self.model.base, self.model.anatomy, x, places)
        return _once(self.prelude, [tokens.request.row for tokens in new], [*x[0].split([len(t.ids) for t in new])])

    def logits(self, certain: list[Tokens], guesses: list[Tokens]) -> Tensor:
        """Logits `(n, vocabulary)` of what stands behind some tokens: of certain ones that have left, and of others.

        What the layers behind the loop were given for the others, they forget.
        """
        states = self._after_loop(certain, guesses)
        hidden = self._after([*certain, *guesses], torch.stack(states).unsqueeze(0))
        more = -hidden.shape[1] % _TILE if hidden.shape[1] > _TILE // 2 else 0
        logits: Tensor = head(self.model.base, self.model.anatomy, F.pad(hidden, (0, 0, 0, more))).logits
        return logits[0, : hidden.shape[1]].float()  # as `generate` chooses

    def drop(self, row: int, position: int) -> None:
        """Forget the tokens of a row from `position` on."""
        for batch in (self.prelude, self.coda):
            if batch is not None:
                batch.drop(row, position)

    def release(self, row: int) -> None:
        """Forget a row."""
        for batch in (self.prelude, self.coda):
            if batch is not None:
                batch.release(row)

    def _after_loop(self, certain: list[Tokens], guesses: list[Tokens]) -> list[Tensor]:
        """What the coda gives for the last of each, `(dim,)`; without one, what the loop gave."""
        coda = self.coda
        if coda is None:
            return [_state(tokens)[-1] for tokens in [*certain, *guesses]]
        rows = [tokens.request.row for tokens in certain]
        states = [state[-1] for state in _once(coda, rows, [_state(tokens) for tokens in certain])] if certain else []
        if not guesses:
            return states
        farthest = {tokens.request.row: tokens for tokens in sorted(guesses, key=lambda tokens: tokens.position)}
        lengths = {row: coda.length(row) for row in farthest}
        chains = [
            [one for one in tokens.request.chain if lengths[row] <= one.position <= tokens.position]
            for row, tokens in farthest.items()
        ]
        outs = _once(coda, [*farthest], [torch.cat([*map(_state, chain)]) for chain in chains])
        given = dict(zip(farthest, outs, strict=True))
        for row, length in lengths.items():
            coda.drop(row, length)
        places = [(tokens.request.row, tokens.end - 1) for tokens in guesses]
        return [*states, *(given[row][place - lengths[row]] for row, place in places)]

    def _after(self, read: list[Tokens], hidden: Tensor) -> Tensor:
        """What the head is given for the last of each, for what the layers gave, `(1, n, dim)` both."""
        if self.model.config.span is None:
            return hidden
        x, positions = self._embedded([one.ids[-1] for one in read]), self._tensor([one.end - 1 for one in read])
        tuples = self.model.loop.block.tuples
        return around(self.model.base, self.model.anatomy, x, positions, lambda _: hidden, lambda: tuples)

    def _embedded(self, ids: list[int]) -> Tensor:
        """Embeddings `(1, n, dim)`."""
        x: Tensor = self.model.get_input_embeddings()(self._tensor(ids))
        return x

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor([numbers], device=self.device)


def _state(tokens: Tokens) -> Tensor:
    assert tokens.state is not None, "they have begun"
    return tokens.state


def _once(batch: DepthBatch | None, rows: list[int], states: list[Tensor]) -> list[Tensor]:
    """What layers that run once give for the next tokens of rows, `(n, dim)` each."""
    if batch is None:
        return states
    order = sorted(range(len(rows)), key=rows.__getitem__)
    x, mask = in_rows([states[i] for i in order])
    batch.begin([rows[i] for i in order], x, mask=mask)
    ran = {one.row: one.hidden for one in batch.call() if isinstance(one, Ran)}
    return [ran[row] for row in rows]


def in_rows(states: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """States `(n, dim)` each, as rows `(batch, longest, dim)` with their mask; None: they are equally long."""
    lengths = torch.tensor([len(state) for state in states], device=states[0].device)
    x = pad_sequence(states, batch_first=True)
    mask = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
    return x, None if len({len(state) for state in states}) == 1 else mask
