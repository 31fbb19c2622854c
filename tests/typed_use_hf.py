"""As `typed_use`, with a Hugging Face model."""

from typing import assert_type

from torch import Tensor
from transformers import PreTrainedModel

import adadepth as ad
from adadepth.hf import AdaptiveForCausalLM, AdaptiveOutput, adapt


def use(base: PreTrainedModel, ids: Tensor) -> None:
    model = adapt(base, steps=4, gate=ad.LinearGate(8), rule=ad.Threshold(0.5))
    assert_type(model, AdaptiveForCausalLM)
    assert_type(model.loop, ad.RecurrentWrapper)
    out = model(ids, labels=ids, min_depth=2)
    assert_type(out, AdaptiveOutput)
    assert_type(out.trace, ad.Trace)
    assert_type(AdaptiveForCausalLM.from_pretrained("somewhere"), AdaptiveForCausalLM)
