"""`RecurrentWrapper`: the one loop that turns a block into an adaptive-depth block.

The halting state is one number per token, `remaining` in [0, 1]: how much of the token has not left
yet. A gate scores tokens, a rule says what stays of what remains, the loop clamps it, an update
makes the next input of the tokens that go on. `TokenSet` says which tokens run and how they sit in
the block's input; dense and packed execution differ in nothing else.
"""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._types import HiddenRows, MaskRows
from ..attention.catch import prepare
from ..attention.tokens import TokenSet, all_tokens
from ..attention.view import KV
from ..cache.kv_reuse import KVReuseCache
from ..gates import Gate
from ..rules import Rule
from ..updates import Replace, Update
from .blocks import run, takes_view, view_of
from .bounds import Bounds
from .checks import check_parts, check_piece, check_rows
from .recorder import Recorder
from .trace import Output


@final
class RecurrentWrapper(nn.Module):
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

    `gate`, `rule`, `update`, `skip` and `checkpoint` are plain attributes, to be reassigned between
    stages of training. So is `agree`, `bool` at first: given whether tokens are left to run here, it says
    whether to run the next iteration. Where none are, the block then runs on one token of zeros, and what
    it makes of it is dropped. Ranks that run one loop together need `adadepth.ranks.any_rank` there.

    Raises: `ValueError` if `steps < 1`, if a piece stands in another's place, or if the block holds
    an `nn.MultiheadAttention` that cannot be looped.
    """

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
        if steps < 1:
            raise ValueError(f"RecurrentWrapper needs steps >= 1, got steps={steps}.")
        check_parts(gate, rule, update)
        if not takes_view(block):
            prepare(block)
        self.block, self.steps = block, steps
        self.gate, self.rule, self.update = gate, rule, Replace() if update is None else update
        self.causal, self.skip, self.checkpoint = causal, skip, checkpoint
        self.agree: Callable[[bool], bool] = bool

    def extra_repr(self) -> str:
        """The settings that are not modules."""
        names = ("steps", "rule", "causal", "skip", "checkpoint")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def forward(
        self,
        x: HiddenRows,
        *,
        mask: MaskRows | None = None,
        start: HiddenRows | None = None,
        min_depth: int | Tensor | None = None,
        max_depth: int | Tensor | None = None,
        states: bool = False,
        cache: KVReuseCache | None = None,
    ) -> Output:
        """Run the loop.

        Arguments:
            x: `(batch, seq, dim)`, the first input; padding in it is not read.
            mask: `(batch, seq)` bool, True for real tokens, anywhere in the row; None: all are real.
            start: `(batch, seq, dim)`, what input injection reads; None: `x`.
            min_depth: an int in 1..steps, or an integer tensor that broadcasts to `(batch, seq)`:
                the token stays this long whatever the rule says.
            max_depth: the same from above; it wins over `min_depth`. An int shortens the loop, and
                with it every `steps` axis. Tensors are clamped to 1..steps, not checked.
            states: whether to return every iteration's state.
            cache: what the rows held before `x` stands in it, and `x` will: all other arguments are
                those of the new tokens. Tokens that left are then skipped, whatever `skip` says.

        Raises: `ValueError` for arguments of another shape or type, a depth outside 1..steps, a
            score, stay or state of another shape, a cache that does not fit, and, in eager
            evaluation, a score that is NaN.
        """
        check_rows(x, mask, start)
        bounds = Bounds.of(self.steps, min_depth, max_depth, (x.shape[0], x.shape[1]))
        if cache is None:
            return self._loop(x, all_tokens(x, mask, self.skip), start, bounds, states)
        with cache.open(x, mask, self.steps, self.causal) as tokens:
            out = self._loop(x, tokens, start, bounds, states)
            cache.commit(tokens, out.trace.depth)
        return out

    def _loop(self, x: Tensor, tokens: TokenSet, start: Tensor | None, bounds: Bounds, states: bool) -> Output:
        record = Recorder(x, tokens, bounds.steps, scored=self.gate is not None, states=states)
        remaining = tokens.live.to(record.dtype)
        x = tokens.take(x)
        start = x if start is None else tokens.take(start)
        previous, past = x, None
        # With gradients the first iteration runs even on nothing: parameters then get one, of zero.
        if not (torch.is_grad_enabled() or self.agree(not tokens.empty)):
            return record.output()
        for step in range(bounds.steps):
            exits = bounds.can_exit(step, self.rule is not None)
            h, past = self._iterate(x, tokens, step, past, keep=exits)
            h = tokens.settle(h, x)
            record.ran(tokens, h)
            if step == bounds.steps - 1:
                record.left(tokens, remaining, h)
                break
            if self.gate is not None:
                record.scored(self._score(h, previous, tokens, step))
            if exits:
                stays = self._stays(record.history, remaining, tokens, bounds, step)
                record.left(tokens, remaining - stays, h)
                remaining = stays
                tokens, select = tokens.narrow(stays > 0)
                x, h, start = select(x), select(h), select(start)
            if not self.agree(not tokens.empty):
                break
            x = tokens.settle(self._next(x, h, start, record, tokens, step), x)
            previous = x if self.gate is None else h
            del h  # only a gate reads it: without one its graph does not outlive the iteration
        return record.output()

    def _iterate(
        self, x: Tensor, tokens: TokenSet, step: int, past: list[KV] | None, keep: bool
    ) -> tuple[Tensor, list[KV] | None]:
        """The block's output, and all tokens' keys and values if the next iteration may need them."""
        args = (x, tokens, step, past, keep)
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(self._run, *args, use_reentrant=False)
        return self._run(*args)

    def _run(
        self, x: Tensor, tokens: TokenSet, step: int, past: list[KV] | None, keep: bool
    ) -> tuple[Tensor, list[KV] | None]:
        view = view_of(tokens, step, self.causal, past, keep)
        out = run(self.block, x, view)
        return out, view.present if keep else None

    def _score(self, h: Tensor, previous: Tensor, tokens: TokenSet, step: int) -> Tensor:
        score = self.gate(h, previous, step)  # type: ignore[misc]
        check_piece(self.gate, "one score per token", h.shape[:-1], score, step)
        rows = tokens.rows(score)
        if not self.training and not torch.compiler.is_compiling() and bool(rows.isnan().any()):
            raise ValueError(
                f"{type(self.gate).__name__} scored NaN at iteration {step}. Look for inf or NaN in the gate's "
                "parameters, or in the block's output: without a gate, looped(x, states=True).states holds every "
                "iteration's."
            )
        return rows

    def _stays(self, history: Tensor, remaining: Tensor, tokens: TokenSet, bounds: Bounds, step: int) -> Tensor:
        stays = remaining
        if self.rule is not None and not bounds.forced(step):
            stays = self.rule(history, remaining, tokens.positions)
            check_piece(self.rule, "what stays of each token", remaining.shape, stays, step)
        return bounds.clamp(stays, remaining, step)

    def _next(self, x: Tensor, h: Tensor, start: Tensor, record: Recorder, tokens: TokenSet, step: int) -> Tensor:
        if self.gate is None:
            scores = record.one.expand(*x.shape[:-1], step + 1)
        else:
            scores = tokens.take(record.history).to(x.dtype)
        new: Tensor = self.update(x, h, start, scores, step)
        check_piece(self.update, "the next input", x.shape, new, step)
        return new if new.dtype == x.dtype else new.to(x.dtype)
