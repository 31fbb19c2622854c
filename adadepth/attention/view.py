"""`TokenView.attend`: the only connection between a block's attention and the loop.

The loop makes a view for each iteration. The view holds which tokens run, and where they are. It takes their new keys
and values, keeps the old ones of all other tokens, and computes attention. It has no access to gates and losses.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Integral
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .._given import named
from .._types import Attended, Keys, Queries, Values
from .context import Here, Together
from .how import How
from .linked import Ledger
from .operator import attend_in_graph
from .tokens import TokenSet, WholeTokens

KV = tuple[Tensor, Tensor]
M = TypeVar("M")  # a mask, in the form that the view uses
ALIGNED = 16
LOOP = "adadepth.loop.blocks"  # the module that calls blocks


def seen(own: Tensor, slots: Tensor, window: int | None) -> Tensor:
    """Whether a query at `own` reads the key at `slots`: not if the key is later, nor outside of the window."""
    reach = slots <= own
    return reach if window is None else reach & (slots > own - window)


def bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as a term to add to the scores; otherwise every attention call would convert it again."""
    width = allowed.shape[-1]
    # Kernels for other devices than the CPU copy a mask whose rows do not begin at multiples of 16.
    fill = 0 if allowed.device.type == "cpu" else -width % ALIGNED
    space = torch.zeros(*allowed.shape[:-1], width + fill, dtype=dtype, device=allowed.device)
    return space[..., :width].masked_fill_(~allowed, -torch.inf)


def _in_autograd_function() -> bool:
    """Whether a custom autograd function calls the block's attention: it may call it again in the backward pass."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals["__name__"] != LOOP:
        first = next(iter(frame.f_locals.values()), None)
        if frame.f_code.co_name == "forward" and isinstance(first, FunctionCtx):
            return True
        frame = frame.f_back
    return False


def _checkpointing() -> object:
    """The hook by which the innermost activation checkpoint saves tensors; None outside of a checkpoint."""
    if torch.compiler.is_compiling():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks and "checkpoint" in hooks[0].__qualname__ else None


class TokenView(ABC):
    """What a block can read about the current iteration, and its way to call attention.

    A block written for adadepth has a class attribute `takes_view = True`. It is called as `block(x, view)`, and
    calls `view.attend(q, k, v)` instead of `F.scaled_dot_product_attention`. `x (rows, length, dim)` holds the active
    tokens.

    `present` collects the keys and values of each attention call, in call order, for the next iteration. `bare` is
    True if attention needs nothing from the loop: all tokens run, nothing is kept, and the first iteration has
    checked the block's calls. `elsewhere` is True once a call used keys that belong to no token.
    """

    known = "seen before"

    def __init__(self, tokens: TokenSet, step: int, causal: bool, past: Sequence[KV] | None, keep: bool) -> None:
        self.tokens, self.step, self.causal, self.past, self.keep = tokens, step, causal, past, keep
        self.bare = step > 0 and not keep and isinstance(tokens, WholeTokens)
        self.here: Here | Together = Here(tokens, step)
        self.calls, self.elsewhere = 0, False
        self.expected = None if past is None else len(past)
        self.present: list[KV] = []
        self.masks: dict[Any, Any] = {}
        self._grad = torch.is_grad_enabled()
        self._saving = _checkpointing() if self._grad else None
        self._shape = tokens.shape
        self.in_graph = torch.compiler.is_compiling()
        self.ledger: Ledger | None = None  # for layers that are compiled by themselves

    @property
    def checkpointed(self) -> bool:
        """Whether the backward pass computes the iteration again."""
        return self._saving is not None

    @property
    def links(self) -> bool:
        """Whether gradients of what compiled layers keep are passed around their graphs."""
        return self._grad and self._saving is None and not self.in_graph

    @property
    def iteration(self) -> Int[Tensor, "rows length"]:
        """The iteration of each token of the input, int64, from 0."""
        return self.here.iteration

    @property
    def positions(self) -> Int[Tensor, "rows length"]:
        """The position of each token of the input among the real tokens of its row, int64, from 0."""
        return self.here.positions

    def attend(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        *,
        dropout_p: float = 0.0,
        scale: float | None = None,
        enable_gqa: bool = False,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Float[Tensor, "heads"] | None = None,
    ) -> Attended:
        """Attention from the active tokens to all tokens of their rows.

        The keys and values of an exited token are those of its last iteration. No token attends to padding. The
        wrapper's `causal` decides whether tokens attend to later ones.

        Shapes: `q (rows, heads, length, head_dim)`; `k` and `v` with equally many heads or, with `enable_gqa`, fewer.
        `rows` and `length` are those of the block's input. The result has the shape of `q`, with the head dimension
        of `v`.
        Arguments:
            window: a token attends to itself and to the `window - 1` tokens before it in its row.
            softcap: above 0, bounds the scores: `softcap · tanh(score / softcap)`.
            sinks: `(heads,)`, for each head the score of one more key, to which all tokens attend and whose value
                is 0. PyTorch's kernels have neither softcap nor sinks, so with them all scores are held in memory.
            dropout_p, scale, enable_gqa: as for `F.scaled_dot_product_attention`.

        Raises: `ValueError` if the shapes are not those of the block's input; if the block calls attention more often
        than in the iteration before; if the window is no int from 1, or given in a loop that is not causal; if
        softcap is not above 0, or sinks have another shape.
        Source: softcap: Gemma 2, arXiv 2408.00118, section 2; learned sinks: Xiao et al. 2023,
        arXiv 2309.17453, section 3.3, as gpt-oss has them.
        """
        how = How(dropout_p, scale, enable_gqa, window, softcap, sinks)
        if not self.in_graph and torch.compiler.is_compiling():
            return attend_in_graph(q, k, v, how._asdict())
        if window is not None:
            self._check_window(window)
        if not self.bare:
            self.check_shapes(q, k, v)
        if softcap is not None or sinks is not None:
            how.check_scores(q.shape[1])
        return self.answer(q, k, v, how)

    def answer(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """The same, for shapes that were checked before."""
        if self.bare:
            return self._attend(q, k, v, how)
        grad = torch.is_grad_enabled()
        self._check_recomputation(grad)
        if self.calls == self.expected:
            self._uneven("more than")
        if grad is self._grad:
            k, v = self._merge(k, v)
        else:  # this call's keys and values have no gradient, those of earlier iterations have
            with torch.set_grad_enabled(self._grad):
                k, v = self._merge(k, v)
        self.calls += 1
        if self.keep:
            self.present.append((k, v))
        return self._attend(q, k, v, how)

    def _check_recomputation(self, grad: bool) -> None:
        if grad is self._grad and not (grad and self._saving is not _checkpointing()):
            return
        if grad is self._grad or (self._grad and not torch.compiler.is_compiling() and _in_autograd_function()):
            raise ValueError(
                "The block checkpoints its own attention. The backward pass cannot recompute it, because the tokens "
                "that ran are no longer known. Switch checkpointing off inside the block and let the loop checkpoint "
                "whole iterations: RecurrentWrapper(..., checkpoint=True)."
            )

    def check_shapes(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Check that queries, keys and values are those of the block's input, one per token.

        Raises: `ValueError` if they are not.
        """
        rows, length = self._shape
        if not (
            (q.dim() == k.dim() == v.dim() == 4)
            and (q.size(0) == k.size(0) == v.size(0) == rows)
            and (q.size(2) == k.size(2) == v.size(2) == length)
        ):
            self._refuse(q, k, v)

    def close(self) -> None:
        """Check, after the block has run, that it called attention often enough."""
        if not self.bare and self.expected is not None and self.calls < self.expected:
            self._uneven(f"{self.calls} instead of")

    def _uneven(self, calls: str) -> NoReturn:
        raise ValueError(
            f"Iteration {self.step} made {calls} the {self.expected} attention calls {self.known}. A looped block must "
            "call attention equally often every time, because the order of the calls tells which layer each belongs to."
        )

    def _check_window(self, window: int) -> None:
        if isinstance(window, bool) or not isinstance(window, Integral) or window < 1 or not self.causal:
            raise ValueError(
                f"view.attend expected window, an int from 1, and a causal wrapper, got window={named(window)} and "
                f"RecurrentWrapper(causal={self.causal})."
            )

    def _refuse(self, *qkv: Tensor) -> NoReturn:
        rows, length = self._shape
        name, shape = next(
            (name, tuple(t.shape))
            for name, t in zip("qkv", qkv, strict=True)
            if t.dim() != 4 or t.shape[0] != rows or t.shape[2] != length
        )
        raise ValueError(
            f"Attention expected {name} of shape ({rows}, heads, {length}, head_dim), got {shape}: queries, keys and "
            "values must be those of the block's own input, one per token. If the block reads a memory, or a condition "
            "(batch, dim) for each row, wrap it: adadepth.RowPerToken(block). Other keys of another length cannot be "
            "looped. Batch and heads must be separate axes. If the block adds a tensor of the batch's shape to its "
            "input, pass it as block_kwargs, so that it is packed."
        )

    @abstractmethod
    def _merge(self, k: Tensor, v: Tensor) -> KV:
        """All tokens' keys and values in call number `self.calls`, given the new ones of the active tokens."""

    @abstractmethod
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """The attended values for the queries of the active tokens."""

    def _mask_of(self, key: Any, make: Callable[[], M]) -> M:
        """The mask, made once for all calls of the iteration that need the same one."""
        if key not in self.masks:
            self.masks[key] = make()
        mask: M = self.masks[key]
        return mask

    def _past(self) -> tuple[Tensor | None, Tensor | None]:
        """The keys and values of this call in the iteration before."""
        return (None, None) if self.past is None else self.past[self.calls]
