"""`Called`: a module whose call has the type of its `forward`, for type checkers and editors.

Without it, they take `nn.Module.__call__` for a `Callable[..., Any]`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

Given = ParamSpec("Given")
Made = TypeVar("Made", covariant=True)


class Forward(Protocol[Given, Made]):
    """An object with a `forward`."""

    @property
    def forward(self) -> Callable[Given, Made]:
        """Any method."""
        ...


class Called:
    """A base class to write before `nn.Module`; at run time it is empty."""

    if TYPE_CHECKING:

        def __call__(self: Forward[Given, Made], *args: Given.args, **kwargs: Given.kwargs) -> Made: ...
