"""Several texts in one row, told apart by positions that begin again: as rows of their own, and back."""

from typing import Any, final

import torch
from torch import Tensor

from ..attention.tokens import places


@final
class Segments:
    """The texts of a batch, each of which a loop sees as a row.

    `real (batch, seq)` bool are the tokens; `row` and `place`, one for each of them in order, say where it stands
    among the texts; `mask (texts, longest)` bool is theirs.
    """

    def __init__(self, real: Tensor, row: Tensor, place: Tensor) -> None:
        self.real, self.row, self.place = real, row, place
        lengths = torch.bincount(row)
        self.mask = torch.arange(int(lengths.max()), device=real.device) < lengths.unsqueeze(1)

    @classmethod
    def of(cls, positions: Tensor | None, shape: torch.Size, mask: Tensor | None) -> "Segments | None":
        """The texts in rows `shape (batch, seq)` by their `position_ids`; None where no row holds several.

        Raises: `ValueError` if positions begin again elsewhere than at 0, or do not count.
        """
        if positions is None:
            return None
        positions = positions.expand(shape)
        real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask.to(positions.device)
        begins = (positions == 0) & real
        begins |= real & (real.cumsum(-1) == 1)  # each row begins one, whatever it says
        if not bool((begins.sum(-1) > 1).any()):
            return None
        row = begins.flatten().cumsum(0)[real.flatten()] - 1
        rank = places(real)
        place = (rank - torch.where(begins, rank, 0).cummax(-1).values)[real]
        if not torch.equal(place, positions[real]):
            raise ValueError(
                "position_ids begin again, so a row holds several texts, but within one they do not count its real "
                "tokens from 0. Pass those of each text as 0, 1, 2, ...; an adapted model takes no others."
            )
        return cls(real, row, place)

    def rows(self, tokens: Any) -> Any:
        """What broadcasts to `(batch, seq, ...)`, as `(texts, longest, ...)`; what is no tensor stays."""
        if not isinstance(tokens, Tensor) or tokens.dim() == 0:
            return tokens
        whole = tokens.expand(*self.real.shape, *tokens.shape[2:])
        rows = whole.new_zeros(*self.mask.shape, *whole.shape[2:])
        return rows.index_put((self.row, self.place), whole[self.real])

    def back(self, rows: Tensor) -> Tensor:
        """`(texts, longest, ...)` as `(batch, seq, ...)`, 0 at padding."""
        whole = rows.new_zeros(*self.real.shape, *rows.shape[2:])
        return whole.index_put((self.real,), rows[self.row, self.place])
