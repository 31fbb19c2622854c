"""The shapes of the library, named once.

In one call, a name means the same size in all arguments: two arguments with `*tokens` have the same leading axes.
Types named `...Rows` are `(batch, seq, ...)`, as a user passes them. `*tokens` are the axes of a block's input.
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
