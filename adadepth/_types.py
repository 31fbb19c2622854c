"""The shapes of the library, named once.

A name binds over all arguments of one call: where two arguments say `*tokens`, they have the same
leading axes. `rows` are `(batch, seq, ...)` as a user sees them; `tokens` are whatever a block is run on.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Hidden = Float[Tensor, "*tokens dim"]
Score = Float[Tensor, "*tokens"]
ScoreHistory = Float[Tensor, "*tokens seen"]

HiddenRows = Float[Tensor, "batch seq dim"]
StateRows = Float[Tensor, "batch seq steps dim"]
MaskRows = Bool[Tensor, "batch seq"]
WeightRows = Float[Tensor, "batch seq"]
PositionRows = Int[Tensor, "batch seq"]
ScoreHistoryRows = Float[Tensor, "batch seq seen"]

Queries = Float[Tensor, "rows heads length head_dim"]
Keys = Float[Tensor, "rows kv_heads length head_dim"]
Values = Float[Tensor, "rows kv_heads length value_dim"]
Attended = Float[Tensor, "rows heads length value_dim"]
