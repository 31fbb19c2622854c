"""`Called`: a module whose call has the type of its `forward`, for type checkers and editors.

`nn.Module.__call__` is a `Callable[..., Any]` to them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

Given = ParamSpec("Given")
Made = TypeVar("Made", covariant=True)


class Forward(Protocol[Given, Made]):
    """What has a `forward`."""

    @property
    def forward(self) -> Callable[Given, Made]:
        """Any method."""
        ...


class Called:
    """To stand before `nn.Module` among the bases of a class; empty when it runs."""

    if TYPE_CHECKING:

        def __call__(self: Forward[Given, Made], *args: Given.args, **kwargs: Given.kwargs) -> Made: ...
