"""Rank correlation, with ties."""

import torch
from torch import Tensor


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two tensors of one shape; NaN where either is constant."""
    both = torch.stack([ranks(a.flatten()), ranks(b.flatten())])
    both = both - both.mean(1, keepdim=True)
    spread = both.square().sum(1)
    return (both.prod(0).sum() / spread.prod().sqrt()).item()


def ranks(values: Tensor) -> Tensor:
    """Each value's rank from 1, in float64; equal values share the mean of their ranks."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]
