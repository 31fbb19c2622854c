"""`check_block` finds mixing that no attention call shows, and leaves good blocks alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

DIM = 8
CURE = (
    "A looped block may mix tokens in attention only, and must read positions from adadepth.positions() or "
    "view.positions."
)


class Block(nn.Module):
    """Attends, behind a module that is given the sequence on its last axis, as a convolution wants it."""

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.before, self.qkv = before, nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


class Counts(nn.Module):
    """Positions by the length of the input, on the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[-1], device=x.device)


class Asks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + ad.positions().unsqueeze(1)


class Capacity(nn.Module):
    """Keeps half of whatever tokens come."""

    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm(dim=1, keepdim=True)
        return x * (norm >= norm.median(-1, keepdim=True).values)


GOOD = {
    "nothing": nn.Identity(),
    "asks for positions": Asks(),
    "dropout": nn.Dropout(0.5),
    "random but for each token alone": nn.RReLU(),
}
BAD = {
    "batch norm": (nn.BatchNorm1d(DIM), "training", "before (BatchNorm1d)"),
    "convolution": (nn.Conv1d(DIM, DIM, 3, padding=1), "evaluation", "before (Conv1d)"),
    "positions": (Counts(), "evaluation", "before (Counts)"),
    "capacity": (nn.Sequential(nn.Identity(), Capacity()), "evaluation", "before.1 (Capacity)"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_block_that_mixes_by_attention_alone_passes(name: str) -> None:
    ad.check_block(Block(GOOD[name]), DIM)


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers_pass_and_are_left_as_they_were(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(DIM, 2, 16, batch_first=True, norm_first=norm_first)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    ad.check_block(ad.CausalEncoder(layer), DIM)
    ad.check_block(layer, DIM, causal=False)
    assert layer.training
    assert layer.dropout.p == 0.1
    assert not layer.self_attn._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("name", BAD)
def test_other_mixing_is_found_and_named(name: str) -> None:
    before, mode, culprit = BAD[name]
    with pytest.raises(ValueError, match="mixes tokens outside its attention calls") as error:
        ad.check_block(Block(before), DIM)
    message = str(error.value)
    assert message.startswith(
        f"Block mixes tokens outside its attention calls: in {mode} mode packed and dense execution "
    )
    assert message.endswith(f"relative, first in {culprit}. {CURE}")


def test_what_the_loop_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="No attention call was seen in Linear"):
        ad.check_block(nn.Linear(DIM, DIM), DIM)
    ad.check_block(ad.Pointwise(nn.Linear(DIM, DIM)), DIM)
