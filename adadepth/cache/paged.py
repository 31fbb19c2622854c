"""The view by which all active tokens attend to a cache in one call for each layer."""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import varlen
from ..attention.how import How, answering
from ..attention.varlen import Sequences
from .pages import Pages
from .runs import Span
from .view import CachedView


@final
class PagedView(CachedView):
    """One call for each layer, whatever the lengths, depths and iterations of the rows.

    Each sequence of the call is a run of neighbouring positions in a row: one token in decoding, the whole prompt in
    prefill. The sequences are found once for all layers, on the device, without waiting for it. In decoding, shapes
    depend only on the number of active tokens. The call has no softcap, sinks or dropout, and on a GPU only half
    precision. With any of these, and with the layout "compact", there is one call for each group of rows.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        if not isinstance(self.entries, Pages) or not varlen.serves(q, k, v, how):
            return super()._attend(q, k, v, how)
        pages, device = self.entries.pages(self.calls - 1), q.device
        of = self._mask_of(("sequences", device), lambda: self._sequences(device))
        with answering():
            out = varlen.attend(q.squeeze(0).transpose(0, 1), *pages, of, how)
        return out.transpose(0, 1).unsqueeze(0)

    def _sequences(self, device: torch.device) -> Sequences:
        assert isinstance(self.entries, Pages)
        number, longest = self._bounds()
        return sequences(self.entries.places(device), number, longest, self.entries)

    def _bounds(self) -> tuple[int, int]:
        """Upper bounds of the number of sequences and of their queries, from what is on the host."""
        number = sum(
            _most_runs(n, span) for _, part in self.parts for n, span in zip(part.queries, part.held.spans, strict=True)
        )
        most = [max(part.queries) for _, part in self.parts]
        # Tokens of one row that are in two parts may be neighbours in one plane.
        return number, 1 if max(most) == 1 else sum(most)


def _most_runs(queries: int, span: Span) -> int:
    """The most runs that `queries` tokens of a row can form: between two runs there is a token that does not run."""
    return min(queries, span.after - span.before - queries + 1)


def sequences(places: Tensor, number: int, longest: int, entries: Pages) -> Sequences:
    """The runs of neighbours in a row among `places (T,)` int64, filled up to `number` with empty ones."""
    total, capacity, device = len(places), entries.capacity, places.device
    if longest == 1:
        starts, last = torch.arange(total + 1, dtype=torch.int32, device=device), places
    else:
        begins = F.pad(places[1:] != places[:-1] + 1, (1, 0), value=True) | (places % capacity == 0)
        found = torch.nonzero_static(begins, size=number, fill_value=total).squeeze(1)
        starts = F.pad(found, (0, 1), value=total)
        last = places.index_select(0, starts[1:] - 1)
        starts = starts.int()
    row, slot = last // capacity, last % capacity
    each = capacity // entries.page
    pages = (row * each).unsqueeze(1) + torch.arange(each, device=device)
    return Sequences(starts, (slot + 1).int(), pages.int(), longest)
