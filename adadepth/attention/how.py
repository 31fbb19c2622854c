"""The options of an attention call beside queries, keys and values, and the computation itself."""

from numbers import Real
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from .._given import named
from .context import active
from .dispatch import uncaught


@final
class answering:
    """A context in which the view itself computes attention: its calls are not caught."""

    def __enter__(self) -> None:
        active.attends = True
        self.guard = uncaught()
        self.guard.__enter__()

    def __exit__(self, *error: object) -> None:
        self.guard.__exit__(None, None, None)
        active.attends = False


class How(NamedTuple):
    """The options of one call of `view.attend`."""

    dropout_p: float
    scale: float | None
    enable_gqa: bool
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    def check_scores(self, heads: int) -> None:
        """Check the options that change the scores.

        Raises: `ValueError`.
        """
        if isinstance(self.softcap, Real) and not self.softcap > 0:
            raise ValueError(
                f"view.attend expected softcap, a bound of the scores, above 0, got {self.softcap}. Pass None to leave "
                "them unbounded."
            )
        if self.sinks is not None and (not isinstance(self.sinks, Tensor) or self.sinks.shape != (heads,)):
            raise ValueError(
                f"view.attend expected sinks of shape (heads,) = ({heads},), one score for each head of the queries, "
                f"got {named(self.sinks)}."
            )

    def ask(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
        """The attended values `(rows, heads, queries, head_dim)`; if `allowed` is given, it replaces `causal`.

        Calls PyTorch's attention, uncaught. For options that PyTorch does not have, it computes the softmax itself.
        """
        if torch.compiler.is_compiling():
            return self.answer(q, k, v, allowed, causal)
        with answering():
            return self.answer(q, k, v, allowed, causal)

    def answer(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
        """The same, where calls are not caught anyway, as in `answering`."""
        causal = causal and allowed is None
        if self.softcap is not None or self.sinks is not None:
            return self._written_out(q, k, v, _tril(q, k) if causal else allowed)
        more: Any = {"scale": self.scale, "enable_gqa": self.enable_gqa}
        if torch.compiler.is_compiling():  # a function mode catches the function below, but not this operator
            return torch.ops.aten.scaled_dot_product_attention(q, k, v, allowed, self.dropout_p, causal, **more)
        return F.scaled_dot_product_attention(q, k, v, allowed, self.dropout_p, causal, **more)

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        """Attention that holds all scores, `(rows, heads, queries, keys)`; the softmax is in float32 or wider."""
        dtype, kv_heads = torch.promote_types(q.dtype, torch.float32), k.shape[1]
        k, v = k.unsqueeze(2), v.unsqueeze(2)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = (q.unflatten(1, (kv_heads, -1)) @ k.mT * scale).to(dtype)
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh() * self.softcap
        if allowed is not None:
            allowed = allowed.unsqueeze(-3)  # the same for all heads
            scores = scores.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else scores + allowed
        if self.sinks is not None:
            sinks = self.sinks.to(dtype).view(kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, sinks), -1)
        weights = scores.softmax(-1)[..., : k.shape[-2]]
        return (F.dropout(weights.to(v.dtype), self.dropout_p) @ v).flatten(1, 2)


def _tril(q: Tensor, k: Tensor) -> Tensor:
    """`(1, 1, queries, keys)` bool: the j-th query reads the first j keys."""
    return torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
