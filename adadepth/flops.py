"""FLOPs of a pass, from its trace: the FLOPs of one token are measured once, and multiplied by how often it ran.

A FLOP is a multiplication or an addition in a matrix product; nothing else counts. All numbers are of the forward
pass; training costs about three times as much.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import _vocabulary as _vocabulary  # defines the operator whose formula stands below
from ._given import named
from ._modes import evaluating
from ._nested import each
from .loop.eager import in_eager
from .loop.wrapper import RecurrentWrapper

LENGTHS = (2, 4)  # two lengths, to separate the costs that grow with the length from those that grow with its square


@final
class Flops(NamedTuple):
    """The FLOPs of a pass.

    `block` is the block without its attention. `attention` is the products of queries with keys, and of weights with
    values. `once` is what runs once for every token. Two fields are for comparison, with the same tokens: `one_pass`
    is one iteration of the block and `once`; `fixed` is all iterations with their updates and `once`, without a gate.
    """

    block: float
    attention: float
    update: float
    gate: float
    once: float
    one_pass: float
    fixed: float

    @property
    def total(self) -> float:
        """The FLOPs of the whole pass."""
        return self.block + self.attention + self.update + self.gate + self.once

    @property
    def relative(self) -> float:
        """The cost in passes of the model before it was looped: "3.6×" in the papers. 0 without tokens."""
        return self.total / self.one_pass if self.one_pass else 0.0

    @property
    def bound(self) -> float:
        """How many times faster than fixed depth this can be: (F0 + K·F) / (F0 + mean depth·F). 1 without tokens."""
        return self.fixed / self.total if self.total else 1.0


@final
class Cost(NamedTuple):
    """FLOPs of one token: those that do not depend on the length, and those for each `key` that it attends to."""

    token: float
    key: float = 0.0


FREE = Cost(0.0)


@final
@dataclass(frozen=True)
class TokenFlops:
    """The FLOPs of one token: in the `block`, in `gate` and `update` after each iteration but the last, and `once`."""

    block: Cost
    gate: tuple[float, ...]
    update: tuple[float, ...]
    once: Cost = FREE

    @classmethod
    def measure(
        cls,
        looped: RecurrentWrapper,
        dim: int,
        once: Sequence[Callable[[Tensor], object]] = (),
        block_kwargs: Mapping[str, Any] | None = None,
    ) -> "TokenFlops":
        """Count the FLOPs of each piece on a few random tokens.

        This assumes that the block costs the same at every iteration. Operators that the counter cannot see, such as
        Triton kernels or compiled parts of the block, count as 0.

        Arguments: `looped`, the wrapper; `dim`, the width of its input; `once`, parts that run once for every token,
        such as a prelude, a coda or a head. They are called with `(1, n, dim)`; `block_kwargs`, the block's further
        arguments, with tensors `(1, 1, ...)` for a single token.
        Raises: `ValueError` if `looped` is no `RecurrentWrapper`.
        """
        if not isinstance(looped, RecurrentWrapper):
            raise ValueError(
                f"TokenFlops.measure expected looped, a RecurrentWrapper, got {named(looped)}. For a model, pass the "
                "wrapper that it holds, and pass as once= the modules around it."
            )
        modules = [looped, *(part for part in once if isinstance(part, nn.Module))]
        some = next((weight for module in modules for weight in module.parameters()), torch.empty(0))
        tokens = [torch.randn(1, n, dim, device=some.device, dtype=some.dtype) for n in LENGTHS]
        x, n, steps = tokens[0], LENGTHS[0], range(looped.steps - 1)
        gate, update = looped.gate, looped.update
        with evaluating(*modules):
            block = _per_token(lambda x: looped(x, max_depth=1, block_kwargs=_for_each(x, block_kwargs)), tokens)
            parts = [_per_token(part, tokens) for part in once]
            gates = [0.0 if gate is None else _count(gate, x, x, step) / n for step in steps]
            updates = [_count(update, x, x, x, x.new_ones(1, n, step + 1), step) / n for step in steps]
        return cls(block, tuple(gates), tuple(updates), Cost(sum(c.token for c in parts), sum(c.key for c in parts)))

    def count(self, live: Bool[Tensor, "batch seq steps"], keys: int | None = None) -> Flops:
        """The FLOPs of a pass in which the tokens of `live` ran and the others were skipped.

        Each query counts as many keys as the longest row has, as in the kernels; causal attention needs only half of
        them. Padding has no other cost. The few queries with which the packed execution pads the rows of one
        attention call are not counted. It reads the data, so on a GPU the host waits.

        Arguments: `live`, as `trace.live` or `depth_mask(depth, steps)`; `keys`, the number of keys of the longest row,
        if a cache holds more of them than there are tokens.
        Raises: `ValueError` if `live` has another shape or dtype, or more iterations than the loop that was measured.
        """
        self._check(live)
        rows = live.sum(1)  # (batch, steps)
        width = keys if keys is not None else int(rows.max()) if rows.numel() else 0
        ran = rows.sum(0).tolist()
        once = (self.once.token + self.once.key * width) * ran[0]
        one = (self.block.token + self.block.key * width) * ran[0]
        updates = self.update[: len(ran) - 1]
        return Flops(
            block=self.block.token * sum(ran),
            attention=self.block.key * width * sum(ran),
            update=sum(cost * n for cost, n in zip(updates, ran[1:], strict=True)),
            gate=sum(cost * n for cost, n in zip(self.gate, ran[:-1], strict=False)),
            once=once,
            one_pass=once + one,
            fixed=once + one * len(ran) + sum(updates) * ran[0],
        )

    def _check(self, live: Tensor) -> None:
        steps = len(self.update) + 1
        if not isinstance(live, Tensor) or live.dim() != 3 or live.dtype != torch.bool:
            raise ValueError(
                f"TokenFlops.count expected live of shape (batch, seq, steps), bool, got {named(live)}. Pass "
                "out.trace.live or, for given depths, adadepth.depth_mask(depth, steps)."
            )
        if not 1 <= live.shape[-1] <= steps:
            raise ValueError(
                f"TokenFlops.count expected live of 1 to {steps} iterations, those of the loop that was measured, got "
                f"shape {tuple(live.shape)}. Measure the loop that made the trace."
            )


def _per_token(part: Callable[[Tensor], object], tokens: Sequence[Tensor]) -> Cost:
    (n, more), (few, many) = LENGTHS, [_count(part, x) for x in tokens]
    pair = (many - few * more / n) / (more**2 - n * more)
    return Cost(few / n - pair * n, pair)


def _for_each(x: Tensor, given: Any) -> Any:
    """The block's further arguments, of a single token, for each token of `x (1, n, dim)`."""
    return each(given, lambda tensor: tensor.expand(1, x.shape[1], *tensor.shape[2:]))


def _count(run: Callable[..., object], *args: object) -> float:
    with in_eager(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        run(*args)
    return float(counter.get_total_flops())


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: object, **_: object) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _vocabulary_mix(
    h: Sequence[int], weight: Sequence[int], bias: object, table: Sequence[int], *args: object, **_: object
) -> int:
    return 2 * h[0] * weight[0] * (h[1] + table[1])


# Operators that torch's counter does not know.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.adadepth.expected_embedding: _vocabulary_mix,
}
