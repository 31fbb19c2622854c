"""The views for a block that gets the rows as they are: all tokens run, or the results of active ones are selected."""

from typing import final

import torch
from torch import Tensor

from .how import How
from .tokens import DenseTokens, WholeTokens
from .view import KV, TokenView, bias, seen


@final
class WholeView(TokenView):
    """All tokens run: attention is computed as the block calls it."""

    tokens: WholeTokens

    def _merge(self, k: Tensor, v: Tensor) -> KV:
        return k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        window, seq = how.window, q.shape[2]
        if window is None or window >= seq:
            return how.ask(q, k, v, None, self.causal)
        allowed = self._mask_of((window, q.dtype), lambda: bias(self._seen(seq, window), q.dtype))
        return how.ask(q, k, v, allowed, self.causal)

    def _seen(self, seq: int, window: int) -> Tensor:
        """`(seq, seq)` bool."""
        slots = torch.arange(seq, device=self.tokens.live.device)
        return seen(slots[:, None], slots, window)


@final
class DenseView(TokenView):
    """All tokens are computed, also skipped ones; the loop then selects."""

    tokens: DenseTokens

    def _merge(self, k: Tensor, v: Tensor) -> KV:
        live = self.tokens.live[:, None, :, None]
        old_k, old_v = self._past()
        return torch.where(live, k, 0 if old_k is None else old_k), torch.where(live, v, 0 if old_v is None else old_v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        return how.ask(q, k, v, self._allowed(how.window, q.dtype), self.causal)

    def _allowed(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """The mask as a term to add to the scores, `(batch, 1, seq, seq)`; None if `is_causal` is enough."""
        mask, seq = self.tokens.mask, self.tokens.live.shape[1]
        if mask is None and (window is None or window >= seq):
            return None
        return self._mask_of((window, dtype), lambda: bias(self._mask(window), dtype))

    def _mask(self, window: int | None) -> Tensor:
        """`(batch or 1, 1, seq, seq)` bool."""
        mask, positions = self.tokens.mask, self.tokens.positions[:, None]
        if mask is None:
            return seen(positions[:1].unsqueeze(-1), positions[:1].unsqueeze(-2), window)
        real = mask[:, None, None]
        if self.causal:
            real = real & seen(positions.unsqueeze(-1), positions.unsqueeze(-2), window)
        # A query at padding attends to itself: without any key, softmax would give NaN.
        return real | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
