"""Diagnostics and FLOPs of Hugging Face models."""

import hf_zoo
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

import adadepth as ad
from adadepth.diagnostics import forced, measure
from adadepth.flops import FORMULAS
from adadepth.hf import AdaptiveForCausalLM, adapt, scorer

pytestmark = pytest.mark.shapes


def model(span: slice | None = None) -> AdaptiveForCausalLM:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(hf_zoo.ZOO["llama"]())
    gate = ad.LinearGate(hf_zoo.DIM, bias=0.0)
    torch.nn.init.normal_(gate.proj.weight, std=3.0)
    return adapt(base, steps=3, layers=span, gate=gate, rule=ad.Threshold(0.5), update=ad.Interpolate())


def test_each_next_real_token_is_scored_once() -> None:
    adapted = model().train()
    loss, depth = scorer(adapted)({"input_ids": hf_zoo.IDS, "attention_mask": hf_zoo.MASK})
    adapted.eval()
    want, depths = [], []
    for ids, mask in zip(hf_zoo.IDS, hf_zoo.MASK, strict=True):
        real = ids[mask.bool()][None]
        out = adapted(real)
        log_p = out.logits.log_softmax(-1)
        want += [-log_p[0, t, real[0, t + 1]].item() for t in range(real.shape[1] - 1)]
        depths += out.trace.depth[0, :-1].tolist()
    torch.testing.assert_close(loss, torch.tensor(want))
    assert depth.tolist() == depths
    assert set(depths) != {3}


def test_texts_that_share_a_row_are_scored_apart() -> None:
    """As a collator packs them, with padding or without; the first token of a text is predicted by none."""
    adapted, texts = model(), [hf_zoo.IDS[:1, :4], hf_zoo.IDS[:1, 4:9], hf_zoo.IDS[1:2, 3:9]]
    want = [scorer(adapted)(text) for text in texts]
    ids, positions = torch.cat(texts, 1), torch.cat([torch.arange(text.shape[1]) for text in texts])
    bounds = torch.tensor([0, 4, 9, 15])
    whole: dict[str, torch.Tensor] = {"input_ids": ids, "position_ids": positions[None], "cu_seq_lens_q": bounds}
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 2).long(), ids], 1),
        "position_ids": torch.cat([torch.zeros(2).long(), positions])[None],
        "attention_mask": torch.cat([torch.zeros(1, 2), torch.ones(1, 15)], 1),
    }
    for batch in (whole, padded):
        loss, depth = scorer(adapted)(batch)
        torch.testing.assert_close(loss, torch.cat([loss[0] for loss, _ in want]))
        assert torch.equal(depth, torch.cat([depth[0] for _, depth in want]))
    with pytest.raises(ValueError, match=r"^An adapted model does not take cu_seq_lens_q[.] Pass position_ids"):
        scorer(adapted)({"input_ids": ids, "cu_seq_lens_q": bounds})


def test_rows_without_padding_stay_rows_and_arguments_reach_the_model() -> None:
    adapted, ids = model(), hf_zoo.IDS[:1].expand(2, -1)
    by_rule = measure(scorer(adapted), [ids], rule=ad.Threshold(1.1))
    assert by_rule.loss.shape == (2, 8)
    assert by_rule.mean_depth == 1
    curve = forced(scorer(adapted), [ids], 3)
    assert [each.mean_depth for each in curve] == [1, 2, 3]
    torch.testing.assert_close(curve[0].loss, by_rule.loss)
    assert adapted.training  # as before


@pytest.mark.parametrize("mean", [1.3, 2.0, 2.7])
@pytest.mark.parametrize("span", [None, slice(1, 3)], ids=["whole", "slice"])
def test_flops_of_a_model_are_the_counters(span: slice | None, mean: float) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    adapted = adapt(AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, **sizes)), steps=3, layers=span)
    parts = (adapted.prelude, adapted.coda, adapted.get_output_embeddings())
    cost = ad.TokenFlops.measure(adapted.loop, 128, once=[part for part in parts if part is not None])
    depth = ad.uniform_depths((3, 64), 3, mean, torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        out = adapted(torch.randint(300, (3, 64)), min_depth=depth, max_depth=depth)
    assert abs(counter.get_total_flops() / cost.count(out.trace.live).total - 1) < 0.01
