"""`RecurrentWrapper`: the one loop that turns a block into an adaptive-depth block.

The halting state is one number per token, `remaining` in [0, 1]: how much of the token has not left
yet. A gate scores tokens, a rule says what stays of what remains, the loop clamps it, an update
makes the next input of the tokens that go on. `TokenSet` says which tokens run and how they sit in
the block's input; dense and packed execution differ in nothing else.
"""

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from .._called import Called
from .._types import HiddenRows, MaskRows
from ..attention.tokens import TokenSet, all_tokens
from ..cache.kv_reuse import KVReuseCache
from ..gates import Gate
from ..rules import Rule
from ..updates import Update
from .answers import answer
from .arguments import check_cache, check_can_look, check_given, check_rows, looks, named
from .bounds import Bounds, Depth
from .checks import (
    PARTS,
    Identity,
    check_part,
    check_state,
    check_steps,
    check_together,
    warn_of,
)
from .eager import uncompiled
from .iterations import AskBlock, answered, iterations
from .recorder import Recorder
from .selfcheck import check_itself, due
from .trace import Output


@final
class RecurrentWrapper(Called, nn.Module):
    """Applies a block up to `steps` times, to each token as often as its gate and rule say.

    Arguments:
        block: any module that maps `(rows, length, dim)` to the same shape and whose attention
            calls `F.scaled_dot_product_attention`; or one with `takes_view = True`, called as
            `block(x, view)`; or `Pointwise(block)`.
        steps: the most iterations, at least 1.
        gate: scores each token after each iteration but the last; None: every score is 1.
        rule: turns scores into what stays; None: nobody leaves early.
        update: makes the next input from the state; None: `Replace()`, the state itself.
        causal: whether a token sees only itself and what stands before it in its row.
        skip: True runs only the tokens that are live, packed over the batch into one sequence.
            False computes every token and selects: static shapes, for `torch.compile`.
        checkpoint: keeps, of each iteration, only its inputs for the backward pass.

    `block`, `gate`, `rule`, `update`, `skip` and `checkpoint` are plain attributes, to be reassigned between
    stages of training. So is `agree`, `bool` at first: given whether tokens are left to run here, it says
    whether to run the next iteration. Where none are, the block then runs on one token of zeros, and what
    it makes of it is dropped. Ranks that run one loop together need `adadepth.ranks.any_rank` there.

    The first time that tokens are skipped, the wrapper runs a few of them packed and in rows and compares, in the
    mode it is in; `self_check = False` leaves that out. With `one_call = True` the tokens that run ask in one call
    an attention layer, however their rows differ: packed ones by flex attention, those with a cache by attention over
    pages. A cache learns it in its first pass. It is for a GPU, where it is not measured yet. `torch.compile` takes a
    wrapper with `skip=False`; one that skips, checkpoints or has a cache runs in eager, and the model around it is
    compiled.

    Raises: `ValueError` if `steps < 1`, if a piece stands in another's place, there or when it is assigned, or if
    the block holds an `nn.MultiheadAttention` that cannot be looped.
    """

    self_check: bool = True
    one_call: bool = False

    def __init__(
        self,
        block: nn.Module,
        steps: int,
        gate: Gate | None = None,
        rule: Rule | None = None,
        update: Update | None = None,
        *,
        causal: bool = True,
        skip: bool = True,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.block, self.gate, self.rule = block, gate, rule
        self.update: Update = update  # type: ignore[assignment]  # None is made Replace()
        self.steps = check_steps(steps)
        self.causal, self.skip, self.checkpoint = causal, skip, checkpoint
        self.agree: Callable[[bool], bool] = bool
        self._identity = Identity()
        warn_of(self.gate, self.rule, self.update, self.steps)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PARTS:
            value = check_part(name, value)
            self.__dict__["_checked"] = frozenset()
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The settings that are not modules."""
        names = ("steps", "rule", "causal", "skip", "checkpoint")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module` does; the bare block's weights are refused by name."""
        check_state(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    @named
    def forward(
        self,
        x: HiddenRows,
        *,
        mask: MaskRows | None = None,
        start: HiddenRows | None = None,
        min_depth: Depth = None,
        max_depth: Depth = None,
        block_kwargs: Mapping[str, Any] | None = None,
        states: bool = False,
        cache: KVReuseCache | None = None,
    ) -> Output:
        """Run the loop.

        Arguments:
            x: `(batch, seq, dim)`, the first input; padding in it is not read.
            mask: `(batch, seq)` bool, True for real tokens, anywhere in the row; None: all are real.
            start: `(batch, seq, dim)`, what input injection reads; None: `x`.
            min_depth: an int in 1..steps, or an integer tensor that broadcasts to `(batch, seq)`:
                the token stays this long whatever the rule says. It is moved to the device of `x`.
            max_depth: the same from above; it wins over `min_depth`. An int shortens the loop, and
                with it every `steps` axis. Tensors are clamped to 1..steps, not checked. One per row is `(batch, 1)`.
            block_kwargs: what the block takes beside its input, by name. Tensors `(batch, seq, ...)` hold one entry
                per token, `(batch, 1, ...)` one per row, `(1, seq, ...)` the same for all rows; they are packed as x
                is, in tuples, lists and mappings too. What is no tensor is passed as it is.
            states: whether to return every iteration's state.
            cache: what the rows held before `x` stands in it, and `x` will: all other arguments are
                those of the new tokens. Tokens that left are then skipped, whatever `skip` says.

        Raises: `ValueError` for arguments of another name, shape or type, a depth outside 1..steps, a
            score, stay or state of another shape, a cache that does not fit, pieces that do not go together, and,
            in eager evaluation, a score that is NaN.
        """
        depths = {"min_depth": min_depth, "max_depth": max_depth}
        if torch.compiler.is_compiling() and (self.checkpoint or cache is not None or looks(self, mask, **depths)):
            return uncompiled(
                self, x, mask=mask, start=start, block_kwargs=block_kwargs, states=states, cache=cache, **depths
            )
        check_rows(x, mask, start)
        check_together(self.gate, self.update)
        shape = (x.shape[0], x.shape[1])
        given = check_given(block_kwargs, shape)
        bounds = Bounds.of(self.steps, min_depth, max_depth, shape, x.device)
        check_can_look(self, x, mask, bounds)
        if cache is None:
            return self._loop(x, all_tokens(x, mask, self.skip), start, given, bounds, states)
        check_cache(cache, self)
        with cache.open(x, mask, self.steps, self.causal, self._identity, self.one_call) as tokens:
            out = self._loop(x, tokens, start, given, bounds, states)
            cache.commit(tokens, out.trace.depth)
        return out

    def _loop(
        self,
        rows: Tensor,
        tokens: TokenSet,
        start: Tensor | None,
        given: Mapping[str, Any],
        bounds: Bounds,
        states: bool,
    ) -> Output:
        record = Recorder(rows, tokens, bounds.steps, scored=self.gate is not None, states=states)
        asks = iterations(self, record, rows, tokens, start, bounds)
        ask = answered(asks, None)
        while ask is not None:
            if isinstance(ask, AskBlock) and due(self, ask.tokens, rows):
                check_itself(self, rows, ask.tokens.mask, {"start": start, "block_kwargs": given})
            ask = answered(asks, answer(self, ask, given, record.reads))
        return record.output()
