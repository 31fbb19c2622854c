# ruff: noqa: E402 (the whole file is skipped without transformers and peft)
"""Adapted models under peft: pieces read the modules that are in use, whatever peft has copied or wrapped."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import the
from torch import nn

import adadepth as ad

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from hf_zoo import DIM, IDS, STEPS, VOCAB, logits, near, original, same

from adadepth.hf import AdaptiveForCausalLM, Head, adapt

LAYERS = ["q_proj"]


def pondering() -> AdaptiveForCausalLM:
    """A model with the default update, which reads the weights of embedding and head."""
    model = adapt(original("llama", torch.float32), STEPS)
    nn.init.constant_(the(ad.ReZero, model.loop.update).alpha, 0.5)
    return model


def predicting() -> AdaptiveForCausalLM:
    """A model whose gate calls the norm and the head."""
    base = original("llama", torch.float32)
    criterion = ad.KLGate(nn.Sequential(base.model.norm, base.lm_head))
    return adapt(base, STEPS, criterion, ad.Threshold(0.5), ad.Replace(), layers=slice(1, 3))


def heading() -> AdaptiveForCausalLM:
    """The same by `Head`."""
    model = predicting()
    model.loop.gate = ad.KLGate(nn.Sequential(model.base.get_submodule("model.norm"), Head(model.base)))
    return model


def wrapped(model: Any, whole: list[str], targets: list[str] = LAYERS) -> Any:
    """LoRA on `targets`; `whole` are trained in full, and are other weights already."""
    trained = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=whole)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "modules_to_save" in name or ("lora_B" in name and "q_proj" not in name):
                weight.add_(torch.randn_like(weight), alpha=0.3)
    return trained


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize(
    ("make", "whole"),
    [
        (pondering, ["embed_tokens", "lm_head"]),
        (pondering, ["embed_tokens", "lm_head", "loop.update"]),
        (pondering, ["loop.update"]),
        (predicting, ["norm", "lm_head"]),
        (heading, ["norm", "lm_head"]),
    ],
)
def test_pieces_read_what_is_trained(
    make: Callable[[], AdaptiveForCausalLM], whole: list[str], used: bool, tmp_path: Path
) -> None:
    model, direct = make(), make()
    if used:
        model(IDS)
    before = logits(direct)
    trained = wrapped(model, whole)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "modules_to_save.default." in name:
                own = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
                direct.get_parameter(own).copy_(weight)
    expected = logits(direct)
    assert near(logits(trained), expected) and not near(expected, before)
    with trained.disable_adapter():
        assert near(logits(trained), before)
    merged = trained.merge_and_unload()
    assert near(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    assert same(AdaptiveForCausalLM.from_pretrained(tmp_path), merged)


def test_what_was_never_run_is_cast_and_saved(tmp_path: Path) -> None:
    trained = wrapped(pondering(), ["loop.update"])
    trained.merge_and_unload().to(torch.bfloat16).save_pretrained(tmp_path)
    loaded: Any = AdaptiveForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert logits(loaded).dtype is torch.bfloat16
    assert loaded.loop.update.update.head is loaded.get_output_embeddings()


def test_ponder_refuses_an_adapter_on_what_it_reads(tmp_path: Path) -> None:
    message = (
        "Ponder reads the weights of embedding and head, but peft has put an adapter on {0}, which they do not "
        "include. Take {0} out of target_modules and trainable_token_indices. To train it, name it in modules_to_save."
    )
    for name in ("embed_tokens", "lm_head"):
        before, trained = logits(pondering()), wrapped(pondering(), ["loop.update"], [*LAYERS, name])
        with pytest.raises(ValueError, match=f"^{re.escape(message.format(name))}$"):
            trained(IDS)
        with trained.disable_adapter():
            assert near(logits(trained), before)
        merged = trained.merge_and_unload()
        merged.save_pretrained(tmp_path / name)
        assert same(AdaptiveForCausalLM.from_pretrained(tmp_path / name), merged) and not near(logits(merged), before)


def test_gates_call_a_head_with_its_adapter() -> None:
    for make in (predicting, heading):
        before, trained = make()(IDS).trace.scores, wrapped(make(), [], [*LAYERS, "lm_head"])
        scores = trained(IDS).trace.scores
        assert near(trained.merge_and_unload()(IDS).trace.scores, scores) and not near(scores, before)


def test_a_head_that_is_replaced_or_wrapped_in_place_is_still_the_pieces() -> None:
    model: Any = pondering()
    direct: Any = pondering()
    head = nn.Linear(DIM, VOCAB, bias=False)
    direct.base.lm_head.load_state_dict(head.state_dict())
    model.base.lm_head = head
    assert near(logits(model), logits(direct))
    model.base.lm_head = torch.compile(head, backend="eager")
    assert near(logits(model), logits(direct))
