"""Whether an adapted model is exact: against its base, against itself alone, with a cache, in generation."""

from typing import Any

import torch
from hf_small import small
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import adadepth as ad
from adadepth.hf import AdaptiveCache, AdaptiveForCausalLM, adapt

STEPS, WORDS = 3, 37
MASK = torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [0] * 5 + [1] * 4])
IDS = torch.randint(3, WORDS, (3, 9), generator=torch.Generator().manual_seed(0)) * MASK
DEPTH = torch.randint(1, STEPS + 1, (3, 9), generator=torch.Generator().manual_seed(1))
SPANS = {"whole": None, "slice": slice(1, 3)}


class Exact(TorchFunctionMode):
    """Whoever asks for float32 gets float64: norms and softmaxes that round would hide what differs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def off(got: Tensor, expected: Tensor) -> float:
    """How far the farthest logit is off, relative to the largest."""
    return float((got - expected).abs().max() / expected.abs().max())


def adapted(kind: str, span: slice | None) -> AdaptiveForCausalLM:
    """Raises: `ValueError` where the model is refused."""
    base = small(kind)
    torch.manual_seed(1)
    width = getattr(base.config.get_text_config(), "hidden_size", 16)
    gate = ad.PerIterationMLPGate(width, STEPS, hidden=8, bias=0.0)
    return adapt(base, STEPS, gate, layers=span)


def faults(kind: str, model: AdaptiveForCausalLM) -> dict[str, float]:
    """What of an adapted model is wrong, by more than 1e-8, and by how much."""
    found: dict[str, float] = {}
    with Exact():
        original = small(kind)
        with torch.no_grad():
            expected = original(input_ids=IDS[:1], use_cache=False).logits
            found["a fresh model is not its base"] = off(model(IDS[:1]).logits, expected)
            found["depth 1 is not its base"] = off(model(IDS[:1], max_depth=1).logits, expected)
            nn.init.constant_(model.loop.update.alpha, 0.4)  # type: ignore[arg-type]
            batch = model(IDS, attention_mask=MASK, min_depth=DEPTH, max_depth=DEPTH).logits
            for row, real in enumerate(MASK.bool()):
                depth = DEPTH[row : row + 1, real]
                alone = model(IDS[row : row + 1, real], min_depth=depth, max_depth=depth).logits
                found[f"row {row} is not what it is alone"] = off(batch[row : row + 1, real], alone)
            found["a cache changes it"] = off(cached(model)[MASK.bool()], batch[MASK.bool()])
            if generates(original):
                found["the cache changes what is generated"] = generated(model)
        found |= without_gradient(model, original)
    return {what: far for what, far in found.items() if not far < 1e-8}


def cached(model: AdaptiveForCausalLM) -> Tensor:
    """The logits of a prompt, of one token after the other, and of several."""
    cache, parts = AdaptiveCache(), []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 9)):
        now, mask = slice(start, stop), MASK[:, :stop]
        depth = DEPTH[:, now]
        out = model(IDS[:, now], attention_mask=mask, past_key_values=cache, min_depth=depth, max_depth=depth)
        parts.append(out.logits)
    return torch.cat(parts, 1)


def generates(original: Any) -> bool:
    """Whether the base does: Whisper's decoder alone does not."""
    try:
        original.generate(IDS[:1], max_new_tokens=1, do_sample=False)
    except ValueError:
        return False
    return True


def generated(model: AdaptiveForCausalLM) -> float:
    """How many words of a text differ, with exits by the gate between two of its scores."""
    scores = model(IDS, attention_mask=MASK).trace.scores[MASK.bool()].flatten().sort().values
    half = len(scores) // 2
    rule, model.loop.rule = model.loop.rule, ad.Threshold(float((scores[half] + scores[half + 1]) / 2))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [model.generate(IDS, attention_mask=MASK, use_cache=cache, **options) for cache in (True, False)]
    model.loop.rule = rule
    return float((texts[0] != texts[1]).sum())


def without_gradient(model: AdaptiveForCausalLM, original: Any) -> dict[str, float]:
    """The weights that get a gradient in the base and none in the adapted model."""
    labels = torch.where(MASK.bool(), IDS, -100)
    reached = []
    for network in (original, model):
        network(input_ids=IDS, attention_mask=MASK, labels=labels).loss.backward()
        base = network.base if isinstance(network, AdaptiveForCausalLM) else network
        reached.append({name for name, weight in base.named_parameters() if weight.grad is not None})
    return {f"{name} has no gradient": 1.0 for name in reached[0] - reached[1]}
