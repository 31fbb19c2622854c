"""`AdaptiveLM`: EleutherAI's lm-eval runs an adapted model, and reports its depth beside the scores.

    python -m adadepth.hf.lm_eval --model adadepth --model_args pretrained=PATH,max_depth=2 --tasks arc_easy

This is lm-eval's own command line, with the same flags. Once lm-eval discovers installed models by itself (entry
points of the group `lm_eval.models`), `lm_eval --model adadepth` does the same.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from .._extras import need
from ..loop.trace import Output
from ..rules import Rule, SurvivalThreshold, Threshold
from . import flops

need("lm_eval", "lm-eval")

from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402


@register_model("adadepth")
@final
class AdaptiveLM(HFLM):
    """Lm-eval's Hugging Face model, for a model saved by `AdaptiveForCausalLM.save_pretrained`.

    Padding is not computed and changes no result. A row that has met its stop string is not computed any more. The
    results' `config` gets `mean_depth`, `relative_flops` and `depth_tokens`, over all real tokens that ran, in prompts
    and continuations.

    Arguments: `max_depth` and `min_depth`, ints for every token, or, from Python, functions of the ids `(batch, seq)`;
    `threshold`, which replaces the tau of the model's `Threshold` or `SurvivalThreshold`; `imports`, the modules that
    define pieces of your own, joined by `+`; the others are those of lm-eval's `hf`.
    Raises: `ValueError` if the model is not an adapted one, or if `threshold` is given for another rule.
    """

    def __init__(
        self,
        pretrained: Any,
        max_depth: int | Callable[[Tensor], int | Tensor] | None = None,
        min_depth: int | Callable[[Tensor], int | Tensor] | None = None,
        threshold: float | None = None,
        imports: str | None = None,
        **kwargs: Any,
    ) -> None:
        for module in imports.split("+") if imports else ():
            import_module(module)
        super().__init__(pretrained, **{"backend": "causal"} | kwargs)
        if self.config.model_type != "adadepth":
            raise ValueError(
                f"--model adadepth expected a model saved by AdaptiveForCausalLM.save_pretrained, got one of type "
                f"{self.config.model_type} from {pretrained}. For that use --model hf."
            )
        loop = self.model.loop
        rule = None if threshold is None else _with_threshold(loop.rule, float(threshold))
        depths = {"max_depth": max_depth, "min_depth": min_depth}
        self._depths = {name: depth for name, depth in depths.items() if depth is not None}
        self._rule = {} if rule is None else {"rule": rule}
        self._lengths: dict[tuple[int, ...], int] = {}
        self._ran = self._ran_everywhere = torch.zeros(2, dtype=torch.long)  # iterations, tokens
        loop.register_forward_hook(self._count)

    def get_model_info(self) -> dict[str, Any]:
        """The results' `config` of lm-eval, which calls this once, at the end."""
        iterations, tokens = self._ran_everywhere.tolist() if self.world_size > 1 else self._ran.tolist()
        if not tokens:
            return {**super().get_model_info(), "mean_depth": None, "relative_flops": None, "depth_tokens": 0}
        depth = iterations / tokens
        cost = flops.relative(self.model, depth)
        print(
            f"adadepth: mean depth {depth:.3f} of {self.model.loop.steps}, relative FLOPs {cost:.3f}, over {tokens:,} "
            "tokens"
        )
        return {**super().get_model_info(), "mean_depth": depth, "relative_flops": cost, "depth_tokens": tokens}

    def barrier(self) -> None:
        """lm-eval's barrier after each kind of request. Here all processes exchange their depths."""
        super().barrier()
        self._ran_everywhere = self.all_gather(self._ran[None].to(self.device)).sum(0).cpu()

    def _count(self, loop: nn.Module, args: Any, output: Output) -> None:
        depth = output.trace.depth
        self._ran = self._ran + torch.stack([depth.sum(), (depth > 0).sum()]).cpu()

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        before = self._ran
        size = super()._detect_batch_size(*args, **kwargs)
        self._ran = before  # the trial is no text
        return size

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """Note the length of each text: lm-eval pads with 0 at the right, and 0 may be the id of a token."""
        self._lengths = {}
        for _, context, continuation in requests:
            ids = (context + continuation)[-(self.max_length + 1) :][:-1]
            key = _without_zeros(ids)
            self._lengths[key] = max(len(ids), self._lengths.get(key, 0))
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _mask(self, ids: Tensor) -> Tensor:
        """True for text. Where two texts differ in zeros at the end only, the longer: none before sees the rest."""
        lengths = [self._lengths.get(_without_zeros(row), len(row)) for row in ids.tolist()]
        return torch.arange(ids.shape[1], device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        del attn_mask, labels  # lm-eval's for encoder-decoder models
        depths = {name: depth(inps) if callable(depth) else depth for name, depth in self._depths.items()}
        with torch.no_grad(), self._autocast():
            return self.model(inps, attention_mask=self._mask(inps).long(), **depths, **self._rule).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        if not kwargs.get("do_sample"):
            kwargs = {name: value for name, value in kwargs.items() if name != "temperature"} | {"do_sample": False}
        if self.model.generation_config.eos_token_id is None:
            kwargs.setdefault("eos_token_id", self.eot_token_id)
        with self._autocast():
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([_StopEachRow(self.tokenizer, stop, context.shape[1])]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **self._depths,
                **self._rule,
                **kwargs,
            )

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


class _StopEachRow(StoppingCriteria):
    """Ends each row at its own stop string; lm-eval's criterion ends all rows once the last has met one."""

    def __init__(self, tokenizer: Any, stop: list[str], start: int) -> None:
        self.tokenizer, self.stop, self.start = tokenizer, stop, start
        # One string has more than one way to be cut into tokens: look back two more than it takes.
        self.window = 2 + max(len(tokenizer.encode(text, add_special_tokens=False)) for text in stop)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -self.window :])
        return torch.tensor([any(end in text for end in self.stop) for text in texts], device=input_ids.device)


def _with_threshold(rule: Rule | None, tau: float) -> Rule:
    if rule is None:
        return Threshold(tau)
    if not isinstance(rule, Threshold | SurvivalThreshold):
        raise ValueError(
            f"threshold expected a model whose rule is Threshold or SurvivalThreshold, got {rule}. Save the model with "
            "one of them as its loop's rule, or omit threshold."
        )
    return type(rule)(tau)


def _without_zeros(ids: list[int]) -> tuple[int, ...]:
    """The ids up to the last that is not 0."""
    end = len(ids)
    while end and ids[end - 1] == 0:
        end -= 1
    return tuple(ids[:end])
