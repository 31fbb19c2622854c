"""That something gives on the stand-in for a GPU what it gives on the CPU, and that a mistake would be found."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from stand_in import CPU, DEVICE, Held, MixedDevices, stand_in
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Scenario = Callable[[torch.device], Any]


def finds(owner: Any, name: str, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """That `check` fails for it once the function `name` of `owner` gives tensors of the CPU."""
    function = getattr(owner, name)

    def mistaken(*args: Any, **kwargs: Any) -> Any:
        return tree_map(lambda part: part.cpu() if isinstance(part, Held) else part, function(*args, **kwargs))

    monkeypatch.setattr(owner, name, mistaken)
    with pytest.raises(Exception) as error:  # noqa: PT011
        check(scenario)
    assert any(_of_devices(each) for each in _chain(error.value)), "it fails for another reason"


def _of_devices(error: BaseException) -> bool:
    """Found here, or by torch itself."""
    return isinstance(error, MixedDevices | AssertionError) or "same device" in str(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def check(scenario: Scenario) -> None:
    """That a function of a device gives on the stand-in what it gives on the CPU, in tensors of the stand-in."""
    want = scenario(CPU)
    with stand_in():
        got = scenario(DEVICE)
    assert all(isinstance(part, Held) for part in tree_leaves(got) if isinstance(part, Tensor))
    want, got = (tree_leaves(tree_map(_known, result)) for result in (want, got))
    assert len(want) == len(got)
    for a, b in zip(want, got, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
        else:
            assert b == (pytest.approx(a, 1e-9) if isinstance(a, float) else a)


def _known(part: Any) -> Any:
    return part.detach().cpu() if isinstance(part, Tensor) else part
