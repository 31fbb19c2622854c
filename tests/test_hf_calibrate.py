"""`adadepth.hf.calibrate`: a threshold for relative FLOPs, for language models and plain loops."""

import pytest

pytest.importorskip("transformers")

import torch
from narrow import the
from test_calibrate import DIM, STEPS, learned, make_loop, text
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import adadepth as ad
from adadepth.hf import OutOfReach, adapt, calibrate


@pytest.mark.parametrize(("layers", "once", "wanted"), [(None, 0, 2.3), (slice(1, 2), 2, 1.6)])
def test_a_language_model(layers: slice | None, once: int, wanted: float) -> None:
    config = GPTNeoXConfig(
        vocab_size=40,
        hidden_size=DIM,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.4,
    )
    model = adapt(GPTNeoXForCausalLM(config), STEPS, learned(), ad.Threshold(0.5), layers=layers)
    nn.init.constant_(the(ad.ReZero, model.loop.update).alpha, 0.5)
    mask = torch.arange(32) >= torch.randint(0, 12, (8, 1))
    data = [{"input_ids": torch.randint(40, (8, 32)), "attention_mask": mask, "labels": mask.long()} for _ in range(4)]
    found = calibrate(model, data, wanted)
    assert found.relative_flops == pytest.approx(wanted, rel=0.02)
    for batch, depth, cost in [
        (data[::2], found.depth, found.relative_flops),
        (data[1::2], found.unseen_depth, found.unseen_relative_flops),
    ]:
        depths = torch.cat([model.eval()(**inputs, rule=found.rule).trace.depth[mask] for inputs in batch])
        assert depth == pytest.approx(float(depths.double().mean()))
        assert cost == pytest.approx((once + (3 - once) * depth) / 3)
    ids = [batch["input_ids"] for batch in data]
    assert calibrate(model, ids, wanted).relative_flops == pytest.approx(wanted, rel=0.02)
    assert calibrate(model, ids, (once + (3 - once) * STEPS) / 3).depth == STEPS


def test_several_texts_in_a_row() -> None:
    config = GPTNeoXConfig(
        vocab_size=40, hidden_size=DIM, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.4
    )
    model = adapt(GPTNeoXForCausalLM(config), STEPS, learned(), ad.Threshold(0.5))
    nn.init.constant_(the(ad.ReZero, model.loop.update).alpha, 0.5)
    places = torch.arange(4).repeat(8)[None].expand(6, -1)
    data = [{"input_ids": torch.randint(40, (6, 32)), "position_ids": places} for _ in range(4)]
    found = calibrate(model, data, 2.3)
    for batches, depth in [(data[::2], found.depth), (data[1::2], found.unseen_depth)]:
        depths = [model.eval()(**batch, rule=found.rule).trace.depth for batch in batches]
        assert depth == pytest.approx(float(torch.cat(depths).double().mean()))
    assert calibrate(model, [{"input_ids": batch["input_ids"]} for batch in data], 2.3).tau != found.tau


def test_a_plain_loop_costs_its_depth() -> None:
    loop, data = make_loop(learned()), text()
    found, core = calibrate(loop, data, 2.5), ad.calibrate(loop, data, 2.5)
    assert found.relative_flops == found.depth == core.depth
    assert found.unseen_relative_flops == found.unseen_depth == core.unseen_depth
    assert found.tau == core.tau
    with pytest.raises(OutOfReach, match=r"^calibrate expected relative_flops from 1, .*, got 9[.]0[.]$"):
        calibrate(loop, data, 9.0)


@pytest.mark.plain  # the hook would raise first
def test_data_that_is_one_batch_of_ids() -> None:
    model = adapt(
        GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=40, hidden_size=DIM, num_hidden_layers=1, num_attention_heads=2)),
        STEPS,
        learned(),
        ad.Threshold(0.5),
    )
    with pytest.raises(ValueError, match="each a tensor or a mapping of the model's arguments, got a str"):
        calibrate(model, {"input_ids": torch.zeros(1, 3, dtype=torch.long)})  # type: ignore[dict-item]
