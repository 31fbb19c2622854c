"""Watches the random numbers that a loop's pieces draw: whether each token, or each row, gets its own."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..attention.context import active
from .eager import in_eager


@final
class Draw(NamedTuple):
    """How many numbers were drawn in the module `where` of a piece, "block", "gate" or "update"."""

    piece: str
    where: str
    numbers: int


@final
class Draws(TorchDispatchMode):
    """Records random numbers drawn while it is entered, with the innermost watched module that drew them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module, self.found, self._inside = module, list[Draw](), list[tuple[str, str]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and record what it drew."""
        out = func(*args, **(kwargs or {}))
        # The view computes attention itself, and may pad rows for it: its dropout is not recorded. Other calls of
        # attention have the tag too, whether they drop or not.
        draws = torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in func.name()
        if draws and not active.attends:
            drawn = out if isinstance(out, Tensor) else out[0]
            piece, where = (self._inside[0][0], self._inside[-1][1]) if self._inside else ("block", "its own forward")
            self.found.append(Draw(piece, where, drawn.numel()))
        return out

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context that records what is drawn, and in which module."""
        handles = []
        for name, part in self.module.named_modules():
            inside = name.partition(".")[0], labelled(name, part)
            enter = in_this_thread(lambda *_, inside=inside: self._inside.append(inside))
            handles.append(part.register_forward_pre_hook(enter))
            handles.append(part.register_forward_hook(in_this_thread(self._leave), always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, *_: Any) -> None:
        self._inside.pop()


def in_this_thread(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that does nothing in other threads, which may run the same modules."""
    thread = threading.get_ident()

    def run(*args: Any) -> None:
        if threading.get_ident() == thread:
            hook(*args)

    return run


def labelled(name: str, part: nn.Module) -> str:
    """The name in messages of a part of a loop, which begins with that of its piece."""
    piece, _, inner = name.partition(".")
    return f"{inner or f'the {piece} itself'} ({type(part).__name__})"


def shared(dense: Sequence[Draw], packed: Sequence[Draw], tokens: int, ran: int) -> Draw | None:
    """The first draw in which tokens of different rows share a number, but not all tokens do.

    The same loop drew `dense` for `tokens` tokens in rows, and `packed` for `ran` tokens in one sequence. If each
    token has its own numbers, their count is proportional to the tokens. If the whole call has one, both counts are
    equal.
    """
    for rows, sequence in zip(dense, packed, strict=False):
        if rows.numbers != sequence.numbers and rows.numbers * ran != sequence.numbers * tokens:
            return sequence
    return None


def drawn(module: nn.Module, run: Callable[[], object]) -> list[Draw]:
    """The random numbers that `run` draws in the parts of `module`."""
    draws = Draws(module)
    with in_eager(), draws.watching():
        run()
    return draws.found
