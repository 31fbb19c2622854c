"""The one bridge between a block's attention and the loop: `TokenView.attend`.

A view is made for each iteration. It knows which tokens the iteration runs and where they stand,
takes the keys and values of those, sees that the others' stay what they were, and answers the
queries. It knows nothing of gates and losses.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .._types import Attended, Keys, Queries, Values
from .context import Here, Together
from .how import How
from .linked import Ledger
from .operator import asked_in_graph
from .tokens import TokenSet, WholeTokens

KV = tuple[Tensor, Tensor]
M = TypeVar("M")  # a mask, as the view has it
ALIGNED = 16
LOOP = "adadepth.loop.blocks"  # the module whose frames run blocks


def seen(own: Tensor, slots: Tensor, window: int | None) -> Tensor:
    """Whether a query at `own` sees what stands at `slots`: not what comes later, nor what is beyond its window."""
    reach = slots <= own
    return reach if window is None else reach & (slots > own - window)


def bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What may be seen, as something added to the scores: a bool mask would be turned into it by every call."""
    width = allowed.shape[-1]
    # Elsewhere than on a CPU, kernels copy what does not begin each row at a multiple of 16.
    fill = 0 if allowed.device.type == "cpu" else -width % ALIGNED
    space = torch.zeros(*allowed.shape[:-1], width + fill, dtype=dtype, device=allowed.device)
    return space[..., :width].masked_fill_(~allowed, -torch.inf)


def _in_autograd_function() -> bool:
    """Whether an autograd function runs the block's attention: it may run it again in the backward pass."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals["__name__"] != LOOP:
        first = next(iter(frame.f_locals.values()), None)
        if frame.f_code.co_name == "forward" and isinstance(first, FunctionCtx):
            return True
        frame = frame.f_back
    return False


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
    `elsewhere` is True once a call was about keys that are of no token.
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
        self.ledger: Ledger | None = None  # of layers that are compiled by themselves

    @property
    def checkpointed(self) -> bool:
        """Whether the iteration is made again in the backward pass."""
        return self._saving is not None

    @property
    def links(self) -> bool:
        """Whether what compiled layers keep has gradients that are handed on around their graphs."""
        return self._grad and self._saving is None and not self.in_graph

    @property
    def iteration(self) -> Int[Tensor, "rows length"]:
        """The iteration each token of the input is in, int64, from 0."""
        return self.here.iteration

    @property
    def positions(self) -> Int[Tensor, "rows length"]:
        """The place of each token of the input among its row's real tokens, int64, from 0."""
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
        """Attention of the tokens that run over all tokens of their rows.

        Shapes: `q (rows, heads, length, head_dim)`, `k` and `v` with as many or, with `enable_gqa`,
        fewer heads; `rows` and `length` are those of the block's input. The result is shaped like
        `q`, with the head dimension of `v`. A token that left shows the keys and values of its last
        iteration; padding is not seen; whether later tokens are is the wrapper's `causal`. With
        `window`, a token sees itself and the `window - 1` before it in its row. `softcap` bounds the
        scores, `softcap · tanh(score / softcap)`; `sinks (heads,)` are scores of a key of each head that
        all see and whose value is 0. PyTorch's kernels know neither: with them the scores are held.

        Raises: `ValueError` if the shapes are not those of the block's input, if the block attends
        more often than in the iteration before, or for a window below 1 or without causality.
        Source: softcap: Gemma 2, arXiv 2408.00118, section 2; learned sinks: Xiao et al. 2023,
        arXiv 2309.17453, section 3.3, as gpt-oss has them.
        """
        how = How(dropout_p, scale, enable_gqa, window, softcap, sinks)
        if not self.in_graph and torch.compiler.is_compiling():
            return asked_in_graph(q, k, v, how._asdict())
        if window is not None:
            self._check_window(window)
        if not self.bare:
            self.check_shapes(q, k, v)
        return self.answer(q, k, v, how)

    def answer(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """The same of shapes that were checked."""
        if self.bare:
            return self._attend(q, k, v, how)
        grad = torch.is_grad_enabled()
        self._check_recomputation(grad)
        if self.calls == self.expected:
            self._uneven("more than")
        if grad is self._grad:
            k, v = self._merge(k, v)
        else:  # what this call keeps has no gradient, what earlier iterations kept has theirs
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
                "The block checkpoints its own attention. A recomputation in the backward pass would no longer know "
                "which tokens ran. Switch checkpointing off inside the block and let the loop checkpoint whole "
                "iterations: RecurrentWrapper(..., checkpoint=True)."
            )

    def check_shapes(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Whether queries, keys and values are those of the block's input, one per token.

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
        """The block is done."""
        if not self.bare and self.expected is not None and self.calls < self.expected:
            self._uneven(f"{self.calls} instead of")

    def _uneven(self, calls: str) -> NoReturn:
        raise ValueError(
            f"Iteration {self.step} made {calls} the {self.expected} attention calls {self.known}. A looped block must "
            "call attention equally often every time; which layer a call is, is told by their order."
        )

    def _check_window(self, window: int) -> None:
        if window < 1 or not self.causal:
            raise ValueError(
                f"view.attend expected window >= 1 and a causal wrapper, got window={window} and "
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
            "values must be those of the block's own input, one per token. Cross-attention and keys of another length "
            "cannot be looped (a memory can, behind adadepth.RowPerToken); batch and heads must be separate axes. A "
            "tensor of the batch's shape that the block adds to its input is passed as block_kwargs, which are packed."
        )

    @abstractmethod
    def _merge(self, k: Tensor, v: Tensor) -> KV:
        """All tokens' keys and values in call number `self.calls`, given those of the tokens that run."""

    @abstractmethod
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        """The answers to the queries of the tokens that run."""

    def _mask_of(self, key: Any, make: Callable[[], M]) -> M:
        """What may be seen, made once for all calls of the iteration that ask alike."""
        if key not in self.masks:
            self.masks[key] = make()
        mask: M = self.masks[key]
        return mask

    def _past(self) -> tuple[Tensor | None, Tensor | None]:
        """The keys and values of this call in the iteration before."""
        return (None, None) if self.past is None else self.past[self.calls]
