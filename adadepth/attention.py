"""The one bridge between a block's attention and the loop: `TokenView.attend`.

A view is made for each iteration. It knows which tokens the iteration runs and where they stand,
takes the keys and values of those, sees that the others' stay what they were, and answers the
queries. It knows nothing of gates and losses.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn, final

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from ._lazy import lazy
from ._types import Attended, Keys, Queries, Values
from .groups import Group
from .tokens import DenseTokens, PackedTokens, TokenSet, WholeTokens

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
    iteration will need them. `bare` is True where the block's own attention is all there is to do:
    everything runs, nothing is kept, and the first iteration has shown what the block's calls are like.
    """

    def __init__(self, tokens: TokenSet, step: int, causal: bool, past: Sequence[KV] | None, keep: bool) -> None:
        self.tokens, self.step, self.causal, self.past, self.keep = tokens, step, causal, past, keep
        self.bare = step > 0 and not keep and isinstance(tokens, WholeTokens)
        self.calls = 0
        self.present: list[KV] = []
        self._grad = torch.is_grad_enabled()
        self._saving = _checkpointing() if self._grad else None
        self._shape = tokens.shape

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
        if self.bare:
            return self._attend(q, k, v, dropout_p, scale, enable_gqa)
        grad = torch.is_grad_enabled()
        if grad is not self._grad or (grad and self._saving is not _checkpointing()):
            raise ValueError(
                "The block checkpoints its own attention, or runs it under torch.no_grad(). A recomputation in the "
                "backward pass would no longer know which tokens ran. Switch checkpointing off inside the block and "
                "let the loop checkpoint whole iterations: RecurrentWrapper(..., checkpoint=True)."
            )
        rows, length = self._shape
        if not (
            (q.dim() == k.dim() == v.dim() == 4)
            and (q.size(0) == k.size(0) == v.size(0) == rows)
            and (q.size(2) == k.size(2) == v.size(2) == length)
        ):
            self._refuse(q, k, v)
        past = None if self.past is None else self._past(self.past)
        self.calls += 1
        k, v = self._merge(k, v, past)
        if self.keep:
            self.present.append((k, v))
        return self._attend(q, k, v, dropout_p, scale, enable_gqa)

    def _past(self, past: Sequence[KV]) -> KV:
        """The keys and values of this layer in the iteration before."""
        if self.calls >= len(past):
            raise ValueError(
                f"Iteration {self.step} made more than the {len(past)} attention calls of the iteration before. A "
                "looped block must call attention equally often every time; which layer a call is, is told by their "
                "order."
            )
        return past[self.calls]

    def _refuse(self, *qkv: Tensor) -> NoReturn:
        rows, length = self._shape
        name, shape = next(
            (name, tuple(t.shape))
            for name, t in zip("qkv", qkv, strict=True)
            if t.dim() != 4 or t.shape[0] != rows or t.shape[2] != length
        )
        raise ValueError(
            f"Attention expected {name} of shape ({rows}, heads, {length}, head_dim), got {shape}: queries, keys and "
            "values must be those of the block's own input, one per token. Cross-attention and keys of another length "
            "cannot be looped; batch and heads must be separate axes."
        )

    @abstractmethod
    def _merge(self, k: Tensor, v: Tensor, past: KV | None) -> KV:
        """All tokens' keys and values, given those of the tokens that run."""

    @abstractmethod
    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float | None, enable_gqa: bool
    ) -> Tensor:
        """The answers to the queries of the tokens that run."""


@final
class WholeView(TokenView):
    """Everything runs: the block's own attention."""

    tokens: WholeTokens

    def _merge(self, k: Tensor, v: Tensor, past: KV | None) -> KV:
        del past  # replaced whole
        return k, v

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float | None, enable_gqa: bool
    ) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, None, dropout_p, self.causal, scale=scale, enable_gqa=enable_gqa)


@final
class DenseView(TokenView):
    """All tokens ask and are computed."""

    tokens: DenseTokens

    def _merge(self, k: Tensor, v: Tensor, past: KV | None) -> KV:
        live = self.tokens.live[:, None, :, None]
        old_k, old_v = (0, 0) if past is None else past
        return torch.where(live, k, old_k), torch.where(live, v, old_v)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float | None, enable_gqa: bool
    ) -> Tensor:
        allowed = None if self.tokens.mask is None else self._allowed
        causal = self.causal and allowed is None
        return F.scaled_dot_product_attention(q, k, v, allowed, dropout_p, causal, scale=scale, enable_gqa=enable_gqa)

    @lazy
    def _allowed(self) -> Tensor:
        """`(batch, 1, seq, seq)` bool. A padded query sees itself: a row of nothing would be NaN."""
        assert self.tokens.mask is not None
        seq = self.tokens.mask.shape[1]
        ones = torch.ones(seq, seq, dtype=torch.bool, device=self.tokens.mask.device)
        real = self.tokens.mask[:, None, None, :]
        seen = real & ones.tril() if self.causal else real
        return seen | ones.tril().triu()


@final
class PackedView(TokenView):
    """Only the tokens that run ask, of a grid in which each row's real tokens stand at its left."""

    tokens: PackedTokens

    def _merge(self, k: Tensor, v: Tensor, past: KV | None) -> KV:
        old_k, old_v = (None, None) if past is None else past
        return self._scatter(k, old_k), self._scatter(v, old_v)

    def _scatter(self, new: Tensor, old: Tensor | None) -> Tensor:
        """The grid `(batch, kv_heads, width, head_dim)`, token by token in memory: one copy is one run."""
        rows, width, slots = len(self.tokens.grid_rows), self.tokens.width, self.tokens.slots
        new = new.squeeze(0).transpose(0, 1)
        if old is None:
            flat = new.new_zeros(rows * width, *new.shape[1:]).index_copy_(0, slots, new)
        elif old.shape[0] == rows:
            flat = old.transpose(1, 2).flatten(0, 1).index_copy(0, slots, new)
        else:  # rows in which nothing runs any more are dropped, which makes a copy to write into
            kept = old.transpose(1, 2).index_select(0, self.tokens.inherited)
            flat = kept.flatten(0, 1).index_copy_(0, slots, new)
        return flat.unflatten(0, (rows, width)).transpose(1, 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float | None, enable_gqa: bool
    ) -> Tensor:
        groups, gather, back = self.tokens.groups
        q = q.squeeze(0).transpose(0, 1)
        if gather is not None:
            q = q.index_select(0, gather)
        parts = q.split([group.size * group.queries for group in groups])
        options = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
        answers = [self._ask(g, part, k, v, options) for g, part in enumerate(parts)]
        out = answers[0] if len(answers) == 1 else torch.cat(answers)
        if back is not None:
            out = out.index_select(0, back)
        return out.transpose(0, 1).unsqueeze(0)

    def _ask(self, g: int, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        group = self.tokens.groups.groups[g]
        if group.rows is not None:
            k, v = k.index_select(0, group.rows), v.index_select(0, group.rows)
        allowed = self._allowed(g, group, q)
        if allowed is None and self.causal and group.queries < self.tokens.width:
            k, v = k[:, :, : group.queries], v[:, :, : group.queries]
        q = q.unflatten(0, (group.size, group.queries)).transpose(1, 2)
        causal = self.causal and allowed is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal, **options)
        return out.transpose(1, 2).flatten(0, 1)

    def _allowed(self, g: int, group: Group, q: Tensor) -> Tensor | None:
        """What the group's queries may see, added to the scores; None: what `is_causal` says."""
        if (group.whole and self.causal) or (not self.causal and self.tokens.mask is None):
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
            lengths = self.tokens.lengths if group.rows is None else self.tokens.lengths[group.rows]
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


_KINDS: dict[type[TokenSet], type[TokenView]] = {
    WholeTokens: WholeView,
    DenseTokens: DenseView,
    PackedTokens: PackedView,
}


def view_of(tokens: TokenSet, step: int, causal: bool, past: Sequence[KV] | None, keep: bool) -> TokenView:
    """The view of one iteration."""
    return _KINDS[type(tokens)](tokens, step, causal, past, keep)
