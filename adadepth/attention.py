"""The one bridge between a block's attention and the loop: `TokenView.attend`.

A view is made for each iteration. It knows which tokens the iteration runs and where they stand,
takes the keys and values of those, sees that the others' stay what they were, and answers the
queries. It knows nothing of gates and losses.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from ._lazy import lazy
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from ._types import Attended, Keys, Queries, Values
from .groups import Group
from .tokens import DenseTokens, PackedTokens, TokenSet

KV = tuple[Tensor, Tensor]


def _checkpointing() -> object:
    """What packs saved tensors for the innermost activation checkpoint around us; None where there is none."""
    if torch.compiler.is_compiling():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks and "checkpoint" in hooks[0].__qualname__ else None


class TokenView(ABC):
    """What a block may know of the iteration that runs it.

    A block written for adadepth has a class attribute `takes_view = True`, is called as
    `block(x, view)`, and calls `view.attend(q, k, v)` where it would call
    `F.scaled_dot_product_attention`. `x (rows, length, dim)` holds the tokens that run.

    `present` fills with the keys and values of each attention call, in call order, as the next
    iteration will need them.
    """

    def __init__(self, tokens: TokenSet, step: int, causal: bool, past: Sequence[KV] | None, keep: bool) -> None:
        self.tokens, self.step, self.causal, self.past, self.keep = tokens, step, causal, past, keep
        self.calls = 0
        self.present: list[KV] = []
        self._grad = torch.is_grad_enabled()
        self._saving = _checkpointing()

    @lazy
    def iteration(self) -> Int[Tensor, "rows length"]:
        """The iteration each token of the input is in, int64, from 0."""
        return torch.full(self.tokens.shape, self.step, dtype=torch.int64, device=self.tokens.live.device)

    @lazy
    def positions(self) -> Int[Tensor, "rows length"]:
        """The place of each token of the input among its row's real tokens, int64, from 0."""
        return self.tokens.take(self.tokens.positions)

    def attend(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        *,
        dropout_p: float = 0.0,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Attended:
        """Attention of the tokens that run over all tokens of their rows.

        Shapes: `q (rows, heads, length, head_dim)`, `k` and `v` with as many or, with `enable_gqa`,
        fewer heads; `rows` and `length` are those of the block's input. The result is shaped like
        `q`, with the head dimension of `v`. A token that left shows the keys and values of its last
        iteration; padding is not seen; whether later tokens are is the wrapper's `causal`.

        Raises: `ValueError` if the shapes are not those of the block's input, or if the block
        attends more often than in the iteration before.
        """
        self._check(q, k, v)
        past = None
        if self.past is not None:
            if self.calls >= len(self.past):
                raise ValueError(
                    f"Iteration {self.step} made more than the {len(self.past)} attention calls of the iteration "
                    "before. A looped block must call attention equally often every time; which layer a call is, "
                    "is told by their order."
                )
            past = self.past[self.calls]
        self.calls += 1
        kv = self._merge(k, v, past)
        if self.keep:
            self.present.append(kv)
        return self._attend(q, *kv, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if self._grad != torch.is_grad_enabled() or self._saving is not _checkpointing():
            raise ValueError(
                "The block checkpoints its own attention, or runs it under torch.no_grad(). A recomputation in the backward "
                "pass would no longer know which tokens ran. Switch checkpointing off inside the block and let the loop "
                "checkpoint whole iterations: RecurrentWrapper(..., checkpoint=True)."
            )
        rows, length = self.tokens.shape
        for name, t in (("q", q), ("k", k), ("v", v)):
            if t.dim() != 4 or t.shape[0] != rows or t.shape[2] != length:
                raise ValueError(
                    f"Attention expected {name} of shape ({rows}, heads, {length}, head_dim), got {tuple(t.shape)}: "
                    "queries, keys and values must be those of the block's own input, one per token. Cross-attention "
                    "and keys of another length cannot be looped; batch and heads must be separate axes."
                )

    @abstractmethod
    def _merge(self, k: Tensor, v: Tensor, past: KV | None) -> KV:
        """All tokens' keys and values, given those of the tokens that run."""

    @abstractmethod
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options: float | bool | None) -> Tensor:
        """The answers to the queries of the tokens that run."""


@final
class DenseView(TokenView):
    """All tokens ask and are computed; keys and values are `(batch, kv_heads, seq, head_dim)`."""

    tokens: DenseTokens

    def _merge(self, k: Tensor, v: Tensor, past: KV | None) -> KV:
        if self.tokens.everyone:
            return k, v
        live = self.tokens.live[:, None, :, None]
        old_k, old_v = (k.new_zeros(()), v.new_zeros(())) if past is None else past
        return torch.where(live, k, old_k), torch.where(live, v, old_v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options: float | bool | None) -> Tensor:
        if self.tokens.mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, **options)  # type: ignore[arg-type]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._allowed, **options)  # type: ignore[arg-type]

    @lazy
    def _allowed(self) -> Tensor:
        """`(batch, 1, seq, seq)` bool. A padded query sees itself: a row of nothing would be NaN."""
        assert self.tokens.mask is not None
        seq = self.tokens.mask.shape[1]
        itself = torch.ones(seq, seq, dtype=torch.bool, device=self.tokens.mask.device)
        real = self.tokens.mask[:, None, None, :]
        seen = real & itself.tril() if self.causal else real
        return seen | itself.tril().triu()


@final
class PackedView(TokenView):
    """Only the tokens that run ask; keys and values are a grid `(batch, width, kv_heads, head_dim)`."""

    tokens: PackedTokens

    def _merge(self, k: Tensor, v: Tensor, past: KV | None) -> KV:
        old_k, old_v = (None, None) if past is None else past
        return self._scatter(k, old_k), self._scatter(v, old_v)

    def _scatter(self, new: Tensor, old: Tensor | None) -> Tensor:
        batch, width = self.tokens.live.shape[0], self.tokens.width
        new = new.squeeze(0).transpose(0, 1)
        if self.tokens.index is None:
            return new.unflatten(0, (batch, width))
        if old is None:
            grid = new.new_zeros(batch * width, *new.shape[1:]).index_copy_(0, self.tokens.slots, new)
        else:
            grid = old.flatten(0, 1).index_copy(0, self.tokens.slots, new)
        return grid.unflatten(0, (batch, width))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options: float | bool | None) -> Tensor:
        groups, gather, back = self.tokens.groups
        q = q.squeeze(0).transpose(0, 1)
        if gather is not None:
            q = q.index_select(0, gather)
        parts = q.split([group.size * group.queries for group in groups])
        answers = [self._ask(g, part, k, v, options) for g, part in enumerate(parts)]
        out = answers[0] if len(answers) == 1 else torch.cat(answers)
        if back is not None:
            out = out.index_select(0, back)
        return out.transpose(0, 1).unsqueeze(0)

    def _ask(self, g: int, q: Tensor, k: Tensor, v: Tensor, options: dict[str, float | bool | None]) -> Tensor:
        group = self.tokens.groups.groups[g]
        if group.rows is not None:
            k, v = k.index_select(0, group.rows), v.index_select(0, group.rows)
        allowed = self._allowed(g, group, q)
        if allowed is None and self.causal and group.queries < self.tokens.width:
            k, v = k[:, : group.queries], v[:, : group.queries]
        out = F.scaled_dot_product_attention(
            q.unflatten(0, (group.size, group.queries)).transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=allowed,
            is_causal=self.causal and allowed is None,
            **options,  # type: ignore[arg-type]
        )
        return out.transpose(1, 2).flatten(0, 1)

    def _allowed(self, g: int, group: Group, q: Tensor) -> Tensor | None:
        """What the group's queries may see, added to the scores; None: what `is_causal` says."""
        if group.whole and self.causal or not self.causal and self.tokens.mask is None:
            return None
        if g not in self._masks:
            self._masks[g] = self._bias(self._seen(g, group), q.dtype)
        return self._masks[g]

    @lazy
    def _masks(self) -> dict[int, Tensor]:
        return {}

    def _seen(self, g: int, group: Group) -> Tensor:
        """`(size, 1, queries or 1, width)` bool."""
        slot = torch.arange(self.tokens.width, device=self.tokens.live.device)
        if not self.causal:
            assert self.tokens.mask is not None
            lengths = self.tokens.mask.sum(-1)
            lengths = lengths if group.rows is None else lengths[group.rows]
            return (slot < lengths[:, None])[:, None, None, :]
        groups, gather, _ = self.tokens.groups
        own = self.tokens.slots % self.tokens.width
        own = own if gather is None else own.index_select(0, gather)
        sizes = [other.size * other.queries for other in groups]
        return slot <= own.split(sizes)[g].view(group.size, 1, group.queries, 1)

    @staticmethod
    def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
        # Added once here: a bool mask would be turned into this by every attention call.
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
