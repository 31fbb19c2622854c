"""What stands in a module's place where a model's own forward runs, but only a part of it is to do something.

Layers keep their places in the list: they know their number, their kind and their rotary table by it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final, no_type_check

from torch import Tensor, nn
from transformers.utils import ModelOutput


class StandIn:
    """In a layer's place; asked for anything but its output, it answers as the layer does."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)


@final
class Unread(StandIn):
    """Before the first layer that runs: what it gives is not read, and passes for a state and for a tuple of one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing is run."""
        return self

    def __getitem__(self, _: int) -> Any:
        return self


@final
class Instead(StandIn):
    """Does something else with the state that comes, `(batch, seq, dim)`; `tuples`: whether layers return tuples."""

    def __init__(self, layer: Any, call: Callable[[Tensor], Tensor], tuples: Callable[[], bool]) -> None:
        super().__init__(layer)
        self.call, self.tuples = call, tuples

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `call` says, as a layer returns it."""
        h = self.call(args[0] if args else kwargs["hidden_states"])
        return (h,) if self.tuples() else h


@final
class _First(StandIn):
    """The first layer that runs, on what it is given here."""

    def __init__(self, layer: Any, x: Tensor) -> None:
        super().__init__(layer)
        self.x = x

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("hidden_states", None)
        return self.layer(self.x, *args[1:], **kwargs)


@final
class _Seen(StandIn):
    """A layer that runs, whose output is seen."""

    def __init__(self, layer: Any, see: Callable[[Any], None]) -> None:
        super().__init__(layer)
        self.see = see

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.layer(*args, **kwargs)
        self.see(out)
        return out


@final
class Span:
    """A list of layers of which only those from `start` to `stop` run: entered with `x`.

    `states` are what they gave, one after the other; `tuples` says whether they returned tuples.
    """

    def __init__(self, layers: list[nn.Module], start: int, stop: int, x: Tensor) -> None:
        self.states: list[Tensor] = []
        self.tuples = False
        run: list[Any] = [_Seen(layer, self._see) for layer in layers[start:stop]]
        run[0] = _First(run[0], x)
        after = [Instead(layer, same, lambda: self.tuples) for layer in layers[stop:]]
        self.layers = [*(Unread(layer) for layer in layers[:start]), *run, *after]

    def _see(self, out: Any) -> None:
        self.tuples = isinstance(out, tuple | list)
        self.states.append(out[0] if self.tuples else out)


def same(h: Tensor) -> Tensor:
    """Let the state pass."""
    return h


@dataclass
@no_type_check  # as every output of transformers
class Answer(ModelOutput):
    """What a backbone is taken to have returned: its last state, what routers said, and None for all else."""

    last_hidden_state: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None

    def __getattr__(self, name: str) -> None:
        """Nothing was returned under this name."""
        if name.startswith("__"):
            raise AttributeError(name)


@final
class Answering(nn.Module):
    """In a backbone's place: gives an answer that is known, and is in all else what the backbone is."""

    def __init__(self, backbone: nn.Module, answer: Answer) -> None:
        super().__init__()
        self.__dict__.update(backbone=backbone, answer=answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["backbone"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Answer:
        """The answer."""
        return self.__dict__["answer"]


def with_part(module: Any, path: str, part: Any) -> Any:
    """A copy of a module that shares everything with it, but has `part` at `path`."""
    first, _, rest = path.partition(".")
    inner = with_part(getattr(module, first), rest, part) if rest else part
    copy: Any = object.__new__(type(module))
    copy.__dict__ = {**module.__dict__, first: inner}  # an attribute goes before a module
    return copy
