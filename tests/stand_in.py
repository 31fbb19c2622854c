"""A stand-in for a GPU: tensors that say they are on another device, and hold their numbers on the CPU.

The device is torch's `lazy`, for which torch has no kernels of its own here. Nothing is registered, so nothing of it
outlives `stand_in()`. As on CUDA, an operator that mixes its tensors with those of the CPU raises, CPU numbers of no
axis and CPU indices are taken, and copies go either way. There is no autocast and no compiler for it.

    with stand_in(), counting() as counts:
        looped.to(DEVICE)(x.to(DEVICE))
    counts.waits.total()
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import adadepth
from adadepth.attention import varlen
from adadepth.attention.how import How

DEVICE, CPU = torch.device("lazy", 0), torch.device("cpu")
_ROOT = f"{Path(adadepth.__file__).parent}/"
_NUMBERS = {"_local_scalar_dense", "equal", "is_nonzero"}  # tensors in, a number out
_SIZES = {  # what comes out has a size that depends on the data
    *("nonzero", "masked_select", "bincount", "repeat_interleave", "_unique", "_unique2"),
    *("unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_STRICT = {  # these do not take a CPU number beside tensors of a GPU
    *("cat", "stack", "index_select", "gather", "scatter", "index_copy", "index_copy_", "index_add", "index_add_"),
    *("mm", "bmm", "addmm", "embedding", "searchsorted", "equal"),
}


class MixedDevices(RuntimeError):
    """An operator got tensors of the stand-in device and of the CPU."""


@dataclass
class Counts:
    """What happened on the device: by place in adadepth, and for `operators` by their name.

    `waits`: the host waited for a result. `sent`: numbers of the host were copied to the device, which waits too, since
    their memory is not pinned. `operators`: kernels that were launched, so no views; attention in a loop is one
    forward, and backward as many as it is written out in.
    """

    waits: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)


_counting: list[Counts] = []


class Held(Tensor):
    """A tensor of the stand-in device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> "Held":
        size, strides, offset = held.size(), held.stride(), int(held.storage_offset())
        made: Held = Tensor._make_wrapper_subclass(cls, size, strides, offset, dtype=held.dtype, device=DEVICE)
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Held({self.held})"

    def __format__(self, spec: str) -> str:
        return self.cpu().__format__(spec)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_indices(index), value)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _indices(index: Any) -> Any:
    """Lists of numbers as tensors, which torch makes where no mode sees it."""
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    return torch.tensor(index, device=DEVICE) if isinstance(index, list) else index


class _Mode(TorchDispatchMode):
    """Sees every operator, also those that make a tensor from none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "adadepth":  # its own: what it is made of
            with self:
                return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator, on what the tensors hold."""
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    name, here = func._opname, any(isinstance(tensor, Held) for tensor in tensors)
    if here and name not in ("copy_", "_to_copy"):
        _check(name, args, tensors)
    to = here if kwargs.get("device") is None else torch.device(kwargs["device"]).type == DEVICE.type
    if name == "copy_":
        to, here = isinstance(args[0], Held), isinstance(args[1], Held)
    if _counting and (here or to):
        _count(func, name, args, kwargs, here, to)
    out = func(*_each(_bare, args), **{key: _each(_bare, value) for key, value in kwargs.items()})
    if "out" in kwargs or (name.endswith("_") and isinstance(args[0], Tensor)):
        return kwargs.get("out", args[0])
    return _each(_held, out) if to else out


def _tensors(parts: Iterable[Any]) -> Iterator[Tensor]:
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, tuple | list):
            yield from _tensors(part)


def _each(change: Callable[[Any], Any], part: Any) -> Any:
    return type(part)(_each(change, one) for one in part) if isinstance(part, tuple | list) else change(part)


def _held(part: Any) -> Any:
    return Held(part) if isinstance(part, Tensor) else part


def _bare(part: Any) -> Any:
    if isinstance(part, torch.device):
        return torch.device("cpu") if part.type == DEVICE.type else part
    return part.held if isinstance(part, Held) else part


def _check(name: str, args: Any, tensors: list[Tensor]) -> None:
    """Raises: `MixedDevices`."""
    others = [tensor for tensor in tensors if not isinstance(tensor, Held)]
    written = args[0] if name.endswith("_") else None
    bad = [t for t in others if t.dim() or name in _STRICT or t is written]
    if name in _INDEXED:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        bad = [t for t in bad if t is args[0] or all(t is not index for index in indices)]
        _note("sent", any(index.dim() and not isinstance(index, Held) for index in indices))
    if bad:
        shapes = [tuple(tensor.shape) for tensor in bad]
        raise MixedDevices(f"{name} in {_place()} got tensors of {DEVICE.type}, and of the CPU of shapes {shapes}.")


def _count(func: Any, name: str, args: Any, kwargs: dict[str, Any], here: bool, to: bool) -> None:
    moves = name in ("copy_", "_to_copy") and here != to
    sized = name in _SIZES and kwargs.get("output_size") is None
    _note("waits", name in _NUMBERS or sized or (moves and here) or (name in _INDEXED and _by_mask(args)))
    _note("sent", moves and to)
    returns = func._schema.returns
    view = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
    if not (view or name in ("detach", "_unsafe_view") or _attention.within):
        for counts in _counting:
            counts.operators[name] += 1


def _by_mask(args: Any) -> bool:
    """Whether an index is a mask; to write one number there is no need to know how many."""
    masks = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
    return masks and (len(args) < 3 or args[2].numel() != 1)


def _note(what: str, happened: bool) -> None:
    for counts in _counting if happened else ():
        getattr(counts, what)[_place()] += 1


def _place() -> str:
    """The innermost function of adadepth that is running, but for a mode of its own."""
    frame: Any = sys._getframe(1)
    while frame is not None and (
        not frame.f_code.co_filename.startswith(_ROOT) or frame.f_code.co_name == "__torch_dispatch__"
    ):
        frame = frame.f_back
    if frame is None:
        return "outside"
    return f"{frame.f_code.co_filename.removeprefix(_ROOT)}:{frame.f_lineno} {frame.f_code.co_qualname}"


class _Attention:
    """Counts attention in a loop as one operator, as a GPU has it."""

    def __init__(self) -> None:
        self.within = False

    def of(self, answer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """An attention that is counted."""

        def counted(*args: Any) -> Tensor:
            for counts in _counting:
                counts.operators["attention"] += 1
            self.within = True
            try:
                return answer(*args)
            finally:
                self.within = False

        return counted


_attention = _Attention()


@contextmanager
def counting() -> Iterator[Counts]:
    """What the device does while it is entered, within `stand_in()`."""
    counts = Counts()
    _counting.append(counts)
    try:
        with (
            mock.patch.object(How, "answer", _attention.of(How.answer)),
            mock.patch.object(varlen, "attend", _attention.of(varlen.attend)),
        ):
            yield counts
    finally:
        _counting.remove(counts)


@contextmanager
def uncounted() -> Iterator[None]:
    """A part of what is counted that does not count."""
    with mock.patch.object(sys.modules[__name__], "_counting", []):
        yield


class _Generator(torch.Generator):
    """Of the device if it is asked for, or else an ordinary one."""

    device = DEVICE

    def __new__(cls, device: Any = "cpu") -> Any:
        ours = torch.device(device).type == DEVICE.type
        return super().__new__(cls) if ours else _torch.Generator(device)

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()


def _made(make: Callable[..., Any]) -> Callable[..., Any]:
    """Tensors made of Python's numbers, which torch makes where no mode sees it."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None or torch.device(device).type != DEVICE.type:
            return make(*args, **kwargs) if device is None else make(*args, device=device, **kwargs)
        return make(*args, **kwargs).to(device)

    return made


def _new_tensor(like: Tensor, data: Any, **kwargs: Any) -> Tensor:
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device} | kwargs
    return torch.tensor(data, **options)


def _autocast(kind: str, *args: Any, **kwargs: Any) -> Any:
    """Off is all that it may be here."""
    off = kind == DEVICE.type and kwargs.get("enabled") is False
    return nullcontext() if off else _torch.autocast(kind, *args, **kwargs)


def _module() -> SimpleNamespace:
    """What torch asks a device's module for: random states, which are the CPU's."""
    return SimpleNamespace(
        device_count=lambda: 1,
        is_available=lambda: True,
        current_device=lambda: 0,
        get_rng_state=lambda device=0: torch.get_rng_state(),
        set_rng_state=lambda state, device=0: None,
    )


def _within(thread: threading.Thread) -> None:
    with _Mode():  # type: ignore[no-untyped-call]  # a mode is of one thread
        _thread(thread)


# What is replaced, as it was.
_thread = threading.Thread.run
_torch = SimpleNamespace(Generator=torch.Generator, autocast=torch.autocast)


@contextmanager
def stand_in() -> Iterator[None]:
    """Within it the device `DEVICE` is there: `.to(DEVICE)` of tensors and modules, `device=DEVICE` of factories."""
    new: list[tuple[Any, str, Any]] = [
        (torch, DEVICE.type, _module()),
        (torch, "tensor", _made(torch.tensor)),
        (torch, "as_tensor", _made(torch.as_tensor)),
        (torch, "Generator", _Generator),
        (torch, "autocast", _autocast),
        (Tensor, "new_tensor", _new_tensor),
        (threading.Thread, "run", _within),
    ]
    swap = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter stays the same object, tied or not
        for owner, name, value in new:
            stack.enter_context(mock.patch.object(owner, name, value, create=owner is torch))
        stack.enter_context(_Mode())  # type: ignore[no-untyped-call]
        yield
