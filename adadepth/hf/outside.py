"""`Outside`: the layers before and after the loop, which run once for each token of a request."""

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

_TILE = 16  # the head often runs faster on a multiple of this many rows


@final
class Outside:
    """Embeddings and prelude, coda and head of an adapted model, for tokens of many requests.

    For a slice, the model's own forward runs with stand-ins for its layers: first up to the first layer, later from
    the last layer on, with the same embeddings and positions. The prelude and the coda use their parts of `cache`. It
    must be new and have a capacity.
    """

    def __init__(self, model: Any, rows: int, width: int, cache: AdaptiveCache) -> None:
        def batch(name: str) -> DepthBatch | None:
            part: RecurrentWrapper | None = getattr(model, name)
            return None if part is None else DepthBatch(part, cache.parts[name], rows, width)

        self.model, self.prelude, self.coda = model, batch("prelude"), batch("coda")

    @property
    def device(self) -> torch.device:
        """The device of the token ids."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def before(self, new: list[Tokens]) -> list[Tensor]:
        """Run embeddings and prelude on the next tokens of some rows; returns inputs of the loop, `(n, dim)` each."""
        self.model.bind()
        x = self._embedded([token for tokens in new for token in tokens.ids])
        if self.model.config.span is not None:
            positions = self._tensor([i for tokens in new for i in range(tokens.position, tokens.end)])
            x = before(self.model.base, self.model.anatomy, x, positions)
        return _run_once(self.prelude, [tokens.request.row for tokens in new], [*x[0].split([len(t.ids) for t in new])])

    def logits(self, certain: list[Tokens], guesses: list[Tokens]) -> Tensor:
        """Logits `(n, vocabulary)` of the next token after each. `certain` tokens have exited and are no guesses.

        For `guesses` the next token is only guessed now. The coda does not keep their cache entries.
        """
        states = self._after_loop(certain, guesses)
        hidden = self._after([*certain, *guesses], torch.stack(states).unsqueeze(0))
        padding = -hidden.shape[1] % _TILE if hidden.shape[1] > _TILE // 2 else 0
        logits: Tensor = head(self.model.base, self.model.anatomy, F.pad(hidden, (0, 0, 0, padding))).logits
        return logits[0, : hidden.shape[1]].float()  # `generate` chooses in float32

    def drop(self, row: int, position: int) -> None:
        """Drop the tokens of a row from `position` on."""
        for batch in (self.prelude, self.coda):
            if batch is not None:
                batch.drop(row, position)

    def release(self, row: int) -> None:
        """Drop all tokens of a row."""
        for batch in (self.prelude, self.coda):
            if batch is not None:
                batch.release(row)

    def _after_loop(self, certain: list[Tokens], guesses: list[Tokens]) -> list[Tensor]:
        """The last state of each after the coda, `(dim,)`; without a coda, after the loop."""
        coda = self.coda
        if coda is None:
            return [_state(tokens)[-1] for tokens in [*certain, *guesses]]
        rows = [tokens.request.row for tokens in certain]
        states = [state[-1] for state in _run_once(coda, rows, [*map(_state, certain)])] if certain else []
        if not guesses:
            return states
        latest = {tokens.request.row: tokens for tokens in sorted(guesses, key=lambda tokens: tokens.position)}
        lengths = {row: coda.length(row) for row in latest}
        chains = [
            [one for one in tokens.request.chain if lengths[row] <= one.position <= tokens.position]
            for row, tokens in latest.items()
        ]
        outputs = _run_once(coda, [*latest], [torch.cat([*map(_state, chain)]) for chain in chains])
        by_row = dict(zip(latest, outputs, strict=True))
        for row, length in lengths.items():
            coda.drop(row, length)
        last = [(tokens.request.row, tokens.end - 1) for tokens in guesses]
        return [*states, *(by_row[row][position - lengths[row]] for row, position in last)]

    def _after(self, some: list[Tokens], hidden: Tensor) -> Tensor:
        """The input of the head for the last token of each, from the output of the layers, `(1, n, dim)` both."""
        if self.model.config.span is None:
            return hidden
        x, positions = self._embedded([one.ids[-1] for one in some]), self._tensor([one.end - 1 for one in some])
        tuples = self.model.loop.block.tuples
        return around(self.model.base, self.model.anatomy, x, positions, lambda _: hidden, lambda: tuples)

    def _embedded(self, ids: list[int]) -> Tensor:
        """The embeddings of token ids, `(1, n, dim)`."""
        x: Tensor = self.model.get_input_embeddings()(self._tensor(ids))
        return x

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor([numbers], device=self.device)


def _state(tokens: Tokens) -> Tensor:
    assert tokens.state is not None, "set when the tokens begin"
    return tokens.state


def _run_once(batch: DepthBatch | None, rows: list[int], states: list[Tensor]) -> list[Tensor]:
    """Run the prelude or the coda, if there is one, on the next tokens of some rows, `(n, dim)` each."""
    if batch is None:
        return states
    order = sorted(range(len(rows)), key=rows.__getitem__)
    x, mask = in_rows([states[i] for i in order])
    batch.begin([rows[i] for i in order], x, mask=mask)
    ran = {one.row: one.hidden for one in batch.call() if isinstance(one, Ran)}
    return [ran[row] for row in rows]


def in_rows(states: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """States, `(n, dim)` each, as padded rows `(batch, longest, dim)`, and their mask; None if no row is padded."""
    lengths = torch.tensor([len(state) for state in states], device=states[0].device)
    x = pad_sequence(states, batch_first=True)
    mask = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
    return x, None if len({len(state) for state in states}) == 1 else mask
