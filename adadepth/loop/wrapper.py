"""`RecurrentWrapper`: the one loop that turns a block into an adaptive-depth block.

The loop keeps one number for each token: `remaining` in [0, 1], the weight that has not exited yet. A gate scores
the tokens. A rule decides how much of the remaining weight continues, and the loop clamps it. An update makes the
next input of the tokens that continue. A `TokenSet` holds which tokens run, and where they are in the block's input;
dense and packed execution differ in nothing else.
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
    """Applies a block up to `steps` times, to each token as often as gate and rule decide.

    Arguments:
        block: a module that maps `(rows, length, dim)` to the same shape and whose attention calls
            `F.scaled_dot_product_attention`; or a module with `takes_view = True`, called as
            `block(x, view)`; or `Pointwise(block)`.
        steps: the greatest number of iterations, at least 1.
        gate: scores each token after each iteration but the last. None: every score is 1.
        rule: decides from the scores how much of each token's remaining weight continues. None: no token exits early.
        update: makes the next input from the state. None: `Replace()`, the state itself.
        causal: whether a token attends only to itself and to earlier tokens of its row.
        skip: True runs only the active tokens, packed over the batch into one sequence.
            False computes every token and selects: static shapes, for `torch.compile`.
        checkpoint: whether to keep only each iteration's inputs for the backward pass, and compute the rest again.

    `block`, `steps`, `gate`, `rule`, `update`, `skip` and `checkpoint` are plain attributes: you may reassign them
    between stages of training. To load weights of the block alone, load them into `looped.block`: the wrapper refuses
    them.

    `agree` is an attribute too, `bool` by default. The loop calls it before each further iteration, with whether any
    token is active here, and runs the iteration if it returns True. If no token is active then, the block runs on one
    token of zeros, and the result is dropped. If several ranks run one loop together, set it to
    `adadepth.ranks.any_rank`.

    When the wrapper first skips tokens, it runs a few of them packed and dense, in its current mode, and compares.
    `self_check = False` turns this off.

    With `one_call = True`, each attention layer makes one call for all active tokens, however their rows differ: flex
    attention for packed tokens, attention over pages for tokens with a cache. A cache takes this setting in its first
    pass. It is for a GPU, where it is not measured yet.

    `torch.compile` compiles a wrapper with `skip=False`. One that skips, checkpoints or has a cache runs in eager,
    while the model around it is compiled.

    Raises: `ValueError` if `steps < 1`; if an argument, or what is assigned later, is not a piece of the right kind;
    or if the block contains an `nn.MultiheadAttention` that cannot be looped.
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
        self.steps: int = steps
        self.causal, self.skip, self.checkpoint = causal, skip, checkpoint
        self.agree: Callable[[bool], bool] = bool
        self._identity = Identity()
        warn_of(self.gate, self.rule, self.update, self.steps)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PARTS:
            value = check_part(name, value)
            self.__dict__["_checked"] = frozenset()
            if not isinstance(value, nn.Module | None):
                self._modules.pop(name, None)  # torch does not replace a module by anything else
        elif name == "steps":
            value = check_steps(value)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The settings that are not modules."""
        names = ("steps", "rule", "causal", "skip", "checkpoint")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        check_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

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
            x: `(batch, seq, dim)`, the first input. Its values at padding are not read.
            mask: `(batch, seq)` bool, True for real tokens. Padding may be anywhere in a row. None: all are real.
            start: `(batch, seq, dim)`, what updates such as `InputInjection` read as `start`. None: `x`.
            min_depth: the least number of iterations, whatever the rule decides: an int in 1..steps, or an integer
                tensor that broadcasts to `(batch, seq)`, such as `(batch, 1)`. It is moved to the device of `x`.
            max_depth: likewise the greatest number. If the two conflict, `max_depth` is used. An int shortens the
                loop, and with it every `steps` axis. Values of tensors are clamped to 1..steps without an error.
            block_kwargs: the block's further arguments, by name. Tensors `(batch, seq, ...)` hold one entry for each
                token, `(batch, 1, ...)` one for each row, `(1, seq, ...)` the same for all rows. They are packed like
                `x`, also inside tuples, lists and mappings. Other values are passed unchanged.
            states: whether to return every iteration's state.
            cache: holds the earlier tokens of the rows; the call adds those of `x`. All other arguments describe the
                new tokens. Exited tokens are then skipped, whatever `skip` is.

        Raises: `ValueError` for an argument of a wrong name, shape or type; a depth outside 1..steps; a score, a
            weight or a state of a wrong shape; a cache that does not fit; pieces that do not go together; and, in
            eager evaluation, a score that is NaN.
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
