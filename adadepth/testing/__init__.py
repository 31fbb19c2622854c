"""The contract suites: checks of what every gate, rule, update and block must do, also of your own.

Each check runs on the device of the piece, in the dtype of its parameters, or in the default dtype if it has none.
Results must agree to 1e-10 in float64, and to 1e-5 otherwise. A failed check raises an `AssertionError` that says what
was expected and what came. If the argument is not a piece of the right kind, it raises `ValueError`. `check_block`
always raises `ValueError`, as a loop does. No test framework is needed.
"""

from .blocks import check_block as check_block
from .looped import check_looped as check_looped
from .pieces import check_gate as check_gate
from .pieces import check_update as check_update
from .rules import check_rule as check_rule
