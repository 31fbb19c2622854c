"""Tiny recursive models (HRM, Wang et al. 2025, arXiv 2506.21734; TRM, Jolicoeur-Martineau 2025, arXiv 2510.04871).

One small network refines a latent state and an answer. Each puzzle halts as a whole. Training runs one segment a call.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toy
from narrow import the
from torch import Tensor, nn

import adadepth as ad


class Segment(nn.Module):
    """The state is answer y and latent z, concatenated. Gradients pass through the last recursion only."""

    def __init__(self, net: nn.Module, recursions: int, updates: int) -> None:
        super().__init__()
        self.net, self.recursions, self.updates = net, recursions, updates

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        y, z = state.chunk(2, -1)
        for left in reversed(range(self.recursions)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and left == 0):
                for _ in range(self.updates):
                    z = self.net(x + y + z)
                y = self.net(y + z)
        return torch.cat([y, z], -1)


def first_token_decides(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    """A rule: the whole row continues while the score of its first token is at least 1/2."""
    first = scores[..., -1].masked_fill(positions > 0, 0).sum(1, keepdim=True)
    return torch.where(first >= 0.5, remaining, 0)


class TinyRecursiveModel(nn.Module):
    def __init__(self, segments: int) -> None:
        super().__init__()
        self.embed, self.head = toy.Embed(), toy.make_head()
        self.initial = nn.Buffer(torch.randn(2 * toy.DIM))
        net = nn.TransformerEncoderLayer(toy.DIM, 2, 4 * toy.DIM, 0.0, batch_first=True)
        gate = ad.LinearGate(2 * toy.DIM)
        self.looped = ad.RecurrentWrapper(Segment(net, 2, 2), segments, gate, first_token_decides, causal=False)

    def forward(self, ids: Tensor, state: Tensor, **call: Any) -> ad.Output:
        return self.looped(state, block_kwargs={"x": self.embed(ids)}, **call)

    def logits(self, out: ad.Output) -> Tensor:
        return self.head(out.hidden[..., : toy.DIM])


def segment_loss(logits: Tensor, out: ad.Output, labels: Tensor) -> Tensor:
    """The loss of the answers, plus that of the score: the probability that some answer of the row is wrong."""
    wrong = ((logits.argmax(-1) != labels) & (labels >= 0)).any(1).to(logits)
    return toy.losses(logits, labels).mean() + F.binary_cross_entropy(out.trace.scores[:, 0, 0], wrong)


def carried(model: TinyRecursiveModel, out: ad.Output, done: Tensor) -> Tensor:
    """The state for the next call. A row that is done restarts from the initial state."""
    return torch.where(done[:, None, None], model.initial, out.hidden.detach())


@pytest.fixture
def model() -> TinyRecursiveModel:
    """Some rows halt early, others do not."""
    model = TinyRecursiveModel(segments=4).double()
    toy.spread(the(ad.LinearGate, model.looped.gate))
    return model


def start(model: TinyRecursiveModel, ids: Tensor) -> Tensor:
    return model.initial.expand(*ids.shape, -1)


def one_segment(ids: Tensor) -> Tensor:
    """`max_depth` of one segment for each row. An int would shorten the loop, and the last iteration has no score."""
    return torch.ones(len(ids), 1, dtype=torch.long)


def solved_by_hand(model: TinyRecursiveModel, ids: Tensor, segments: int) -> tuple[Tensor, list[int]]:
    """The logits, and how many segments each puzzle ran; one puzzle after the other."""
    net, gate = the(Segment, model.looped.block).net, the(ad.LinearGate, model.looped.gate).proj
    hidden, ran = [], []
    for row in ids:
        x, count = model.embed(row[None]), 0
        y, z = (part.expand_as(x) for part in model.initial.split(toy.DIM))
        halted = False
        while not halted and count < segments:
            z1 = net(x + y + z)
            z2 = net(x + y + z1)
            y, z = net(y + z2).detach(), z2.detach()
            z = net(x + y + z)
            z = net(x + y + z)
            y = net(y + z)
            count += 1
            halted = bool((torch.cat([y, z], -1)[0, 0] * gate.weight[0]).sum() + gate.bias[0] < 0)
        hidden.append(y)
        ran.append(count)
    return model.head(torch.cat(hidden)), ran


@pytest.mark.parametrize("skip", [True, False])
def test_equals_a_loop_over_segments_written_by_hand(model: TinyRecursiveModel, skip: bool) -> None:
    ids, labels = toy.batch(0)
    model.looped.skip = skip
    out = model(ids, start(model, ids))
    logits, ran = solved_by_hand(model, ids, segments=4)
    assert out.trace.depth.tolist() == [[count] * toy.LENGTH for count in ran]
    assert {1, 4} < set(ran)
    toy.assert_close("logits", model.logits(out), logits)
    trained = nn.ModuleList([model.embed, model.head, model.looped.block])
    losses = (toy.losses(each, labels).mean() for each in (model.logits(out), logits))
    toy.assert_same_gradients(trained, *losses)


def test_the_rule_exits_whole_rows_and_the_loop_is_exact(model: TinyRecursiveModel) -> None:
    ad.testing.check_rule(first_token_decides, causal=False)
    ids = toy.batch(0)[0]
    mask = toy.ragged(ids)[0]
    x = {"x": model.embed(ids)}
    ad.check_looped(model.looped, start(model, ids), mask, block_kwargs=x)
    depth = model(ids, start(model, ids), mask=mask).trace.depth
    assert all(row[real].unique().numel() == 1 for row, real in zip(depth, mask, strict=True))


def test_a_loop_that_is_not_causal_refuses_a_cache(model: TinyRecursiveModel) -> None:
    ids = toy.batch(0)[0]
    with pytest.raises(ValueError, match="causal"):
        model(ids, start(model, ids), cache=ad.KVReuseCache())


def test_one_segment_per_call_equals_all_segments_in_one_call(model: TinyRecursiveModel) -> None:
    """Rows that are done start again from the initial state; the others continue from their own."""
    ids = toy.batch(0)[0]
    none, done = torch.zeros(len(ids)).bool(), torch.arange(len(ids)) % 2 == 0
    out = model(ids, start(model, ids), max_depth=one_segment(ids))
    out = model(ids, carried(model, out, none), max_depth=one_segment(ids))
    state = carried(model, out, done)
    assert not state.requires_grad
    third = model(ids, state, max_depth=one_segment(ids)).hidden
    first, whole = (model(ids, start(model, ids), min_depth=n, max_depth=n).hidden for n in (1, 3))
    toy.assert_close("rows that are done", third[done], first[done])
    toy.assert_close("rows that continue", third[~done], whole[~done])
    assert not torch.allclose(first, whole)


def test_gradients_pass_through_the_last_recursion_only(model: TinyRecursiveModel) -> None:
    ids, labels = toy.batch(0)
    state = start(model, ids).clone().requires_grad_()
    out = model(ids, state, max_depth=one_segment(ids))
    loss = segment_loss(model.logits(out), out, labels)
    assert torch.autograd.grad(loss, state, allow_unused=True)[0] is None


def test_the_score_learns_whether_all_answers_are_right() -> None:
    """Half of the rows have fixed labels, which are memorised. The labels of the others change at every step."""
    model, (ids, labels) = TinyRecursiveModel(segments=3), toy.batch(0, rows=8)
    optimizer, state = torch.optim.AdamW(model.parameters(), 2e-3), start(model, ids)
    for step in range(150):
        labels[4:] = toy.batch(step)[1][:4]
        out = model(ids, state, max_depth=one_segment(ids))
        optimizer.zero_grad()
        segment_loss(model.logits(out), out, labels).backward()
        optimizer.step()
        state = carried(model, out, (out.trace.scores[:, 0, 0] < 0.5) | (torch.rand(8) < 0.3))
    out = model.eval()(ids, start(model, ids))
    assert (model.logits(out).argmax(-1) == labels)[:4].all()
    assert out.trace.depth[:, 0].tolist() == [1] * 4 + [3] * 4


def test_packed_equals_dense(model: TinyRecursiveModel) -> None:
    ids, labels = toy.batch(0)
    mask, labels = toy.ragged(labels)
    mask[:, 0] = True

    def run() -> tuple[ad.Output, Tensor]:
        out = model(ids, start(model, ids), mask=mask, states=True)
        return out, segment_loss(model.logits(out), out, labels)

    toy.assert_packed_equals_dense(model, run)
