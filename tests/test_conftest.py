"""What tests/conftest.py sets for all tests holds in each."""

import pytest
import torch
from torch import Tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_memory_that_is_not_written_holds_nan(dtype: torch.dtype) -> None:
    like = torch.ones(2, 3, dtype=dtype)
    made: list[Tensor] = [
        torch.empty(2, dtype=dtype),
        torch.empty_like(like.mT),
        like.new_empty(4),
        torch.empty_strided((2,), (1,), dtype=dtype),
        like.clone().resize_(3, 3)[2:],
    ]
    assert all(tensor.isnan().all() for tensor in made)
