"""The view of packed execution: active tokens attend to a grid of keys and values, which is made for the pass."""

import torch
from torch import Tensor

from .groups import Group
from .how import How
from .tokens import PackedTokens
from .view import KV, TokenView, bias, seen


class PackedView(TokenView):
    """Attends to a grid of keys and values; in each of its rows, the real tokens are at the left."""

    tokens: PackedTokens

    def _merge(self, k: Tensor, v: Tensor) -> KV:
        old_k, old_v = self._past()
        return self._scatter(k, old_k), self._scatter(v, old_v)

    def _scatter(self, new: Tensor, old: Tensor | None) -> Tensor:
        """The grid `(batch, kv_heads, width, head_dim)`; in memory token by token, so that one entry is contiguous."""
        rows, width, slots = len(self.tokens.grid_rows), self.tokens.width, self.tokens.slots
        new = new.squeeze(0).transpose(0, 1)
        if old is None:
            flat = new.new_zeros(rows * width, *new.shape[1:]).index_copy_(0, slots, new)
        elif old.shape[0] == rows:
            flat = old.transpose(1, 2).flatten(0, 1).index_copy(0, slots, new)
        else:  # rows without active tokens are dropped, and this copy can be written into
            kept = old.transpose(1, 2).index_select(0, self.tokens.inherited)
            flat = kept.flatten(0, 1).index_copy_(0, slots, new)
        return flat.unflatten(0, (rows, width)).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        groups, gather, back = self.tokens.groups
        q = q.squeeze(0).transpose(0, 1)
        if gather is not None:
            q = q.index_select(0, gather)
        # The backward pass of a split copies all its parts, so one group is not split.
        parts = [q] if len(groups) == 1 else q.split([group.size * group.queries for group in groups])
        answers = [self._ask(g, part, k, v, how) for g, part in enumerate(parts)]
        out = answers[0] if len(answers) == 1 else torch.cat(answers)
        if back is not None:
            out = out.index_select(0, back)
        return out.transpose(0, 1).unsqueeze(0)

    def _ask(self, g: int, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        group = self.tokens.groups.groups[g]
        if group.rows is not None:
            k, v = k.index_select(0, group.rows), v.index_select(0, group.rows)
        allowed = self._allowed(g, group, q.dtype, how.window)
        if allowed is None and self.causal and group.queries < self.tokens.width:
            k, v = k[:, :, : group.queries], v[:, :, : group.queries]
        q = q.unflatten(0, (group.size, group.queries)).transpose(1, 2)
        return how.ask(q, k, v, allowed, self.causal).transpose(1, 2).flatten(0, 1)

    def _allowed(self, g: int, group: Group, dtype: torch.dtype, window: int | None) -> Tensor | None:
        """The mask of the group as a term to add to the scores; None if `is_causal` is enough."""
        if not self.causal and self.tokens.mask is None:
            return None
        if self.causal and group.whole and (window is None or window >= group.queries):
            return None
        return self._mask_of((g, window), lambda: bias(self._seen(g, group, window), dtype))

    def _seen(self, g: int, group: Group, window: int | None) -> Tensor:
        """`(size, 1, queries or 1, width)` bool."""
        slots = torch.arange(self.tokens.width, device=self.tokens.live.device)
        if not self.causal:
            lengths = self.tokens.lengths if group.rows is None else self.tokens.lengths[group.rows]
            return (slots < lengths[:, None])[:, None, None, :]
        groups, gather, _ = self.tokens.groups
        own = self.tokens.slots % self.tokens.width
        own = own if gather is None else own.index_select(0, gather)
        sizes = [other.size * other.queries for other in groups]
        return seen(own.split(sizes)[g].view(group.size, 1, group.queries, 1), slots, window)
