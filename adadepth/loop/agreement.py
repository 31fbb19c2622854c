"""Compares packed and dense execution of a loop.

They differ if a block mixes tokens outside its attention calls, counts positions by the length of its input, or lets
packed rows share their noise; so do gates and updates that mix tokens. Both executions run on given tokens at given
depths. Afterwards the loop is as before.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from .._modes import evaluating, without_gradients
from ..attention.context import Window, active
from ..cache.kv_reuse import KVReuseCache
from ..updates import Replace
from .draws import Draw, drawn, in_this_thread, labelled, shared
from .trace import Output

# The greatest rounding error, relative to the largest state. In any dtype, many blocks have norms in float32.
EXACT = {torch.float64: 1e-6, torch.float32: 5e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# The share of tokens to compare in half precision, where rounding may send the others to another expert. A score may
# have a step, such as an argmax, which rounding crosses at any iteration.
_STATES, _SCORES = 0.95, 0.5
_EVERY = nn.Module().__dict__.keys()  # the attributes that every module has


@final
class Case(NamedTuple):
    """The input of a check: rows `x (batch, seq, dim)`, their `mask`, the `depth` of each token, and the further
    arguments of the loop. If the rows are a part of a larger batch, `window` says which.
    """

    x: Tensor
    mask: Tensor
    depth: Tensor
    more: Mapping[str, Any]
    window: Window | None = None

    def run(self, looped: nn.Module, cache: KVReuseCache | None = None, **changes: Any) -> Output:
        """Run the loop on this input, with some attributes changed; the given depths replace its own exits."""
        changes = {"rule": None, "checkpoint": False, "agree": bool, "self_check": False, **changes}
        before, active.window = active.window, self.window
        try:
            depth = self.depth.clamp_max(changes.get("steps", looped.steps))
            return altered(looped, **changes).forward(
                self.x, mask=self.mask, min_depth=depth, max_depth=depth, cache=cache, **self.more
            )
        finally:
            active.window = before


def altered(looped: nn.Module, **changes: Any) -> Any:
    """A copy of the loop with other attributes; the original is unchanged, because other threads may run it."""
    looped = copy.copy(looped)
    looped.__dict__.update(changes)  # found before pieces that are registered as modules
    return looped


def check(looped: Any, case: Case) -> bool:
    """Compare packed and dense execution. Returns False if no comparison was possible.

    That is the case if results are random, or if dense execution fails.
    Raises: `ValueError` if they differ, and what the loop raises for packed tokens.
    """
    try:
        dense, again = case.run(looped, skip=False), case.run(looped, skip=False)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception:  # a block that runs only on packed tokens cannot be compared
        return False
    random = draws_noise(looped, case)
    packed = case.run(looped, skip=True)
    if random or max(_apart(again, dense, case.mask, torch.float64)) > 0:
        return False
    dtype = coarsest(looped, case.x)
    if (far := max(_apart(packed, dense, case.mask, dtype))) > EXACT[dtype]:
        raise ValueError(_sentence(looped, case, far, dtype))
    return True


def check_some_mode(looped: Any, case: Case) -> None:
    """Compare in the wrapper's own mode or, if that is random, in evaluation mode.

    Raises: as `check`.
    """
    if not check(looped, case) and looped.training:
        with evaluating(looped):
            check(looped, case)


def coarsest(looped: nn.Module, x: Tensor) -> torch.dtype:
    """The least exact dtype in use."""
    kind = x.device.type
    used = {x.dtype, *(p.dtype for p in looped.parameters())}
    if used - EXACT.keys():
        used.add(torch.bfloat16)  # kernels for quantised weights may compute in it
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        used.add(torch.get_autocast_dtype(kind))
    if kind == "cuda" and torch.get_float32_matmul_precision() != "highest":
        used.add(torch.float16)  # TF32 has its mantissa
    return max(used & EXACT.keys(), key=EXACT.__getitem__)


def _apart(got: Output, expected: Output, mask: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The largest errors of states and of scores.

    Scores below 1 have an absolute error: a criterion subtracts states that are almost equal, so a small score is
    little more than rounding.
    """
    states = off(got.hidden, expected.hidden, mask, dtype)
    return states, off(got.trace.scores, expected.trace.scores, mask, dtype, share=_SCORES, least=1.0)


def off(
    got: Tensor,
    expected: Tensor,
    mask: Tensor,
    dtype: torch.dtype,
    *,
    share: float = _STATES,
    least: float = 1e-30,
) -> float:
    """The largest error of real tokens, relative to their largest value, or to `least` if that is greater.

    In half precision, it is that of a `share` of the tokens.
    """
    got, expected = got[mask].double(), expected[mask].double()
    if not expected.numel():
        return 0.0
    same = (got == expected) | ~(got.isfinite() | expected.isfinite())  # inf - inf is NaN in one order of sums only
    each_token = torch.where(same, 0, (got - expected).abs()).amax(-1)
    worst = each_token.quantile(share) if dtype in (torch.float16, torch.bfloat16) else each_token.max()
    scale = expected.abs().nan_to_num(0, 0, 0).max().clamp_min(least)
    return float((worst / scale).nan_to_num(torch.inf))


def draws_noise(looped: Any, case: Case) -> bool:
    """Whether the loop draws random numbers; two runs with them may be equal by chance.

    All tokens continue once, so that gate and update run. Numbers that attention draws do not count, so attention is
    computed in the default way: flex attention does not run where draws are recorded. Neither does every block; for
    one that fails there, nothing is recorded.
    Raises: `ValueError` if packed tokens would share random numbers.
    """
    steps = min(2, looped.steps)
    case = case._replace(depth=torch.full_like(case.depth, steps))

    def drawn_by(skip: bool) -> list[Draw]:
        return drawn(looped, lambda: case.run(looped, skip=skip, steps=steps, one_call=False))

    try:
        dense, packed = drawn_by(False), drawn_by(True)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
    if (draw := shared(dense, packed, case.mask.numel(), int(case.mask.sum()))) is not None:
        raise ValueError(
            f"{type(getattr(looped, draw.piece)).__name__} draws noise that is neither for each token nor for the "
            f"whole batch, in {draw.where}: packed tokens of different rows are in one sequence and would share it. "
            "Draw it for each token; or draw one for each row of the batch, and read noise[adadepth.rows()]."
        )
    return bool(dense)


def _sentence(looped: Any, case: Case, far: float, dtype: torch.dtype) -> str:
    mode, block = "training" if looped.training else "evaluation", type(looped.block).__name__

    def differ(**changes: Any) -> tuple[bool, bool]:
        """Whether states differ, and whether scores do."""
        dense, packed = (case.run(looped, skip=skip, update=Replace(), **changes) for skip in (False, True))
        states, scores = _apart(packed, dense, case.mask, dtype)
        return states > EXACT[dtype], scores > EXACT[dtype]

    if not differ(gate=None)[0]:
        piece = type(looped.gate if differ()[1] else looped.update).__name__
        return (
            f"{piece} gives packed tokens another result than tokens in rows: in {mode} mode packed and dense "
            f"execution differ by {far:.1e} relative. Gates and updates must treat each token on its own; "
            "adadepth.testing has suites for them."
        )
    return (
        f"{block} mixes tokens outside its attention calls: in {mode} mode packed and dense execution differ by "
        f"{far:.1e} relative, first in {_first_difference(looped, case, dtype)}. A looped block may mix tokens in "
        "attention only, and must read positions from adadepth.positions() or view.positions."
    )


def _first_difference(looped: Any, case: Case, dtype: torch.dtype) -> str:
    """The first module to finish whose outputs differ, compared token by token in a single iteration."""
    dense, packed = (_outputs(looped, case, skip) for skip in (False, True))
    for (where, rows), (_, sequence) in zip(dense, packed, strict=False):
        if not _alike(sequence, rows, case.mask, dtype):
            return where
    return "its own forward, at a later iteration"


def _outputs(looped: Any, case: Case, skip: bool) -> list[tuple[str, Any]]:
    """The output of each module of the block in one iteration, in the order in which they finish."""
    found: list[tuple[str, Any]] = []
    names = {part: labelled(name, part) for name, part in looped.block.named_modules(prefix="block")}
    note = in_this_thread(lambda part, _args, out: found.append((names[part], out)))
    handles = [part.register_forward_hook(note) for part in names]
    try:
        case.run(looped, skip=skip, steps=1)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _alike(packed: Any, dense: Any, mask: Tensor, dtype: torch.dtype) -> bool:
    """Whether two outputs of one module agree token by token, whichever axis holds the tokens."""
    if not (isinstance(packed, Tensor) and isinstance(dense, Tensor)):
        return True
    for axis in range(1, dense.dim()):
        in_rows = (dense.shape[0], dense.shape[axis]) == mask.shape
        if in_rows and (packed.shape[0], packed.shape[axis]) == (1, int(mask.sum())):
            rows = dense.movedim(axis, 1)
            back = torch.zeros_like(rows)
            back[mask] = packed.movedim(axis, 1)[0]
            return off(back.flatten(2), rows.flatten(2), mask, dtype) <= EXACT[dtype]
    return True  # no axis holds the tokens


@contextmanager
def untouched(looped: nn.Module, device: torch.device) -> Iterator[None]:
    """A context without gradients and dropout; at the end, all attributes, buffers and random states are as before.

    So are the contents of lists and dicts that are attributes, such as the losses that a router collects.
    """
    parts = [(part, dict(part.__dict__), dict(part._buffers)) for part in looped.modules()]
    contents = [_restoring(value) for part in looped.modules() for value in _own_attributes(part)]
    buffers = [(buffer, buffer.clone()) for buffer in looped.buffers()]
    devices = [] if device.type == "cpu" else [device]
    with without_gradients(), torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            for part in looped.modules():
                _still(part)
            yield
        finally:
            for part, attributes, own in parts:
                _put_back(part.__dict__, attributes)
                part._buffers.update(own)
            for restore in contents:
                restore()
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _own_attributes(part: nn.Module) -> Iterator[Any]:
    """The attributes of a module that are not those of every module."""
    return (value for name, value in part.__dict__.items() if name not in _EVERY)


def _restoring(value: Any) -> Callable[[], object]:
    """What gives an attribute the contents back that it has now."""
    if isinstance(value, dict):
        return partial(_put_back, value, dict(value))
    if isinstance(value, list):
        return partial(value.__setitem__, slice(None), list(value))
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    return lambda: None


def _put_back(mapping: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Give a mapping its contents from before, without an instant in which another thread would find none."""
    for name in mapping.keys() - before.keys():
        del mapping[name]
    mapping.update(before)


def _still(part: nn.Module) -> None:
    """Switch off dropout: its random numbers would hide all other differences."""
    if isinstance(part, nn.modules.dropout._DropoutNd):
        part.p = 0.0
    if isinstance(part, nn.MultiheadAttention):
        part.dropout = 0.0
