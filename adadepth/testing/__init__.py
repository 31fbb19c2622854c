"""The contract suites, for your own pieces too: what every gate, rule, update and block must keep.

Each check runs on the device of the piece, in the dtype of its parameters, or else the default dtype (1e-10 in float64,
1e-5 elsewhere), and raises `AssertionError` that says what was expected and what came, or `ValueError` if it is given
something that is no such piece; `check_block` raises `ValueError`, as a loop does. torch is all that they need.
"""

from .blocks import check_block as check_block
from .looped import check_looped as check_looped
from .pieces import check_gate as check_gate
from .pieces import check_update as check_update
from .rules import check_rule as check_rule
