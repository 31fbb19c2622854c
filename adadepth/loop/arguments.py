"""Checks of a looped block's arguments: names, shapes and types, with errors that say what to do."""

import functools
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Concatenate, ParamSpec, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .._given import name_of, shown
from .._nested import tensors
from ..cache.kv_reuse import KVReuseCache
from ..rules import Rule, TrainingOnly
from .bounds import Bounds, Depth
from .checks import READ_SCORES, inside
from .trace import Output

_alone: WeakValueDictionary[int, Any] = WeakValueDictionary()  # rules that were checked, by id

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")

NAMES = ("mask", "start", "min_depth", "max_depth", "block_kwargs", "states", "cache")
_KNOWN = frozenset(NAMES)
_MEANT = {
    "attention_mask": "Pass real tokens as mask=, (batch, seq) bool.",
    "padding_mask": "Pass real tokens as mask=, (batch, seq) bool.",
    "key_padding_mask": "Pass real tokens as mask=, (batch, seq) bool, True for real tokens.",
    "src_key_padding_mask": "Pass real tokens as mask=, (batch, seq) bool, True for real tokens.",
    "past_key_values": "Pass a cache as cache=adadepth.KVReuseCache().",
    "position_ids": "The loop counts positions, from real tokens: read adadepth.positions() inside the block.",
    "output_hidden_states": "For the state of every iteration, pass states=True.",
    "steps": "For a call with fewer iterations, pass max_depth=.",
}


def named(forward: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """`forward`, with an error for each unknown argument that suggests the right one, and one for `torch.vmap`."""

    @functools.wraps(forward)
    def call(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) != 1 or not kwargs.keys() <= _KNOWN:
            _refuse(args, kwargs)
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        try:
            return forward(self, *args, **kwargs)
        except RuntimeError as error:
            if "data pointer" in str(error) and torch._C._functorch.peek_interpreter_stack() is not None:
                raise ValueError(
                    "RecurrentWrapper reads the data, which torch.vmap does not allow. Make the mapped axis a part of "
                    "the batch, x.flatten(0, 1). If parameters are mapped, call one model after the other."
                ) from error
            raise

    return cast(Callable[Concatenate[S, P], R], call)


def _refuse(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if len(args) > 1:
        raise ValueError(
            f"RecurrentWrapper takes x alone by position, got {len(args)} arguments. Name the others: "
            f"{', '.join(f'{name}=' for name in NAMES)}."
        )
    for name in kwargs.keys() - {"x", *NAMES}:
        meant = _MEANT.get(
            name, f"If it is for the block, pass block_kwargs={{'{name}': ...}}: a tensor in it is packed as x is."
        )
        raise ValueError(f"RecurrentWrapper does not take {name}. {meant} It takes x, {', '.join(NAMES)}.")
    if not args and "x" not in kwargs:
        raise ValueError("RecurrentWrapper expected x of shape (batch, seq, dim), got no input.")


def check_rows(x: Tensor, mask: Tensor | None, start: Tensor | None) -> None:
    """Check the arguments of a looped block that are rows."""
    if isinstance(x, Output):
        raise ValueError(
            "RecurrentWrapper expected x of shape (batch, seq, dim), got the Output of another looped block. Pass its "
            "state: looped(x).hidden."
        )
    if not isinstance(x, Tensor) or x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"RecurrentWrapper expected x of shape (batch, seq, dim) in floating point, got {shown(x)}.")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == x.shape[:2] and mask.dtype == torch.bool):
        longer = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > x.shape[1]
        raise ValueError(
            f"mask expected shape (batch, seq) = {tuple(x.shape[:2])} and dtype torch.bool, True for real tokens, got "
            f"{shown(mask)}."
            + (f" With a cache, pass the mask of the new tokens only: mask[:, -{x.shape[1]}:]." if longer else "")
        )
    if start is not None and not (isinstance(start, Tensor) and start.shape == x.shape and start.dtype == x.dtype):
        raise ValueError(f"start expected the shape and dtype of x, {shown(x)}, got {shown(start)}.")


def looks(looped: Any, mask: Tensor | None, min_depth: Depth, max_depth: Depth) -> bool:
    """Whether a pass may skip tokens, and so reads the data; without exits and padding it does not."""
    if not looped.skip or mask is not None or isinstance(max_depth, Tensor):
        return bool(looped.skip)
    forced = isinstance(min_depth, int) and min_depth >= looped.steps
    return looped.rule is not None and not forced


def check_can_look(looped: Any, x: Tensor, mask: Tensor | None, bounds: Bounds) -> None:
    """Check that a pass whose shapes depend on the data can read the data.

    Raises: `ValueError` on the meta device.
    """
    if not (x.is_meta and looped.skip):
        return
    if mask is not None or any(bounds.can_exit(i, looped.rule is not None) for i in range(looped.steps)):
        raise ValueError(
            "RecurrentWrapper with skip=True reads the data to skip tokens, but x is on the meta device, which has "
            "none. Set skip=False if you only need shapes, or put x on a real device."
        )


def check_given(given: Mapping[str, Any] | None, shape: tuple[int, int]) -> Mapping[str, Any]:
    """Check the block's further arguments: tensors must broadcast to the rows `shape (batch, seq)`."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(
            f"block_kwargs expected a mapping of the block's arguments by name, got {type(given).__name__}."
        )
    for name, value in given.items():
        for tensor in tensors(value):
            _check_broadcasts(name, tensor, shape)
    return given


def _check_broadcasts(name: str, value: Tensor, shape: tuple[int, int]) -> None:
    if not value.dim():
        return
    fits = value.dim() > 1 and all(size in (1, whole) for size, whole in zip(value.shape, shape, strict=False))
    if not fits:
        by_row = f" For one entry per row pass {name}.unsqueeze(1)." if value.shape[0] == shape[0] else ""
        raise ValueError(
            f"block_kwargs['{name}'] has shape {tuple(value.shape)}, which does not fit (batch, seq) = {shape}."
            f"{by_row} Expected are (batch, seq, ...), one entry per token; (batch, 1, ...), one per row; or (1, seq, "
            "...), the same for all rows. If the block itself expects (batch, dim), also use "
            "adadepth.RowPerToken(block). A tensor that belongs to no token or row should be an attribute of the block."
        )


def check_cache(cache: object, looped: nn.Module) -> None:
    """Check that `cache` is a cache, and that the wrapper can decode with it.

    Raises: `ValueError`. Warns of dropout in training mode: what the cache holds is then random.
    """
    if not isinstance(cache, KVReuseCache):
        got = f"the class {cache.__name__}" if isinstance(cache, type) else type(cache).__name__
        raise ValueError(
            f"cache expected an adadepth.KVReuseCache, got {got}. Begin with cache=adadepth.KVReuseCache()."
        )
    if looped.causal:  # otherwise the cache refuses the wrapper, and no rule would help
        check_decodes(looped.rule)
    if looped.training and any(isinstance(p, _DropoutNd) and p.p for p in looped.modules()):
        warnings.warn(
            "A cache is used in training mode, with dropout: what it holds is random. Call looped.eval() first.",
            stacklevel=4,
        )


def check_decodes(rule: object) -> None:
    """Check that a rule may decide about new tokens without the others of their rows.

    Raises: `ValueError`.
    """
    if isinstance(rule, TrainingOnly):
        raise ValueError(
            f"The rule {name_of(rule.rule)} is for training only: with a cache it gets the new tokens alone and "
            "would decide differently. Decode with a rule that treats each token on its own, such as "
            "adadepth.Threshold(tau)."
        )
    check_alone(rule)


def check_alone(rule: object) -> None:
    """Check, on fixed random scores, that a rule decides about tokens as it would without the others of their row.

    It runs once for each rule. Those of this library do not need it.
    Raises: `ValueError`.
    """
    rule = inside(rule)
    if rule is None or isinstance(rule, READ_SCORES) or _alone.get(id(rule)) is rule:
        return
    with torch.random.fork_rng(devices=[]):
        reads = _reads_row(cast(Rule, rule))
    if reads:
        raise ValueError(
            f"The rule {name_of(rule)} decides differently about tokens without the others of their row, and with a "
            "cache it gets the new tokens alone. If it is for training only, say so: adadepth.TrainingOnly(rule). To "
            "decode, it must treat each token on its own, and read positions instead of columns."
        )
    with suppress(TypeError):  # not every object can be referred to weakly
        _alone[id(rule)] = rule


def _reads_row(rule: Rule) -> bool:
    """Whether a rule gives another result for a part of a row; False if it is random, or made for other rows."""
    generator = torch.Generator().manual_seed(0)
    for draw in range(8):
        scores = torch.rand(1, 8, 1 + draw % 4, generator=generator, device="cpu")
        row = (scores, torch.ones(1, 8, device="cpu"), torch.arange(8, device="cpu").unsqueeze(0))

        def of(part: slice, row: tuple[Tensor, ...] = row) -> Tensor:
            scores, remaining, positions = (given[:, part].clone() for given in row)
            return rule(scores, remaining, positions)

        try:
            whole = of(slice(None))
            if not torch.equal(whole, of(slice(None))):
                return False
            for part in (slice(4), slice(4, None), slice(7, None)):
                alone, wanted = of(part).float(), whole[:, part].float()
                if alone.shape == wanted.shape and not torch.allclose(alone, wanted, atol=1e-4, equal_nan=True):
                    return True
        except Exception:  # such as thresholds for each token of another row, or on another device
            return False
    return False
