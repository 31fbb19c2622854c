"""A request: a text that is being made beside others, as `generate` would make it alone."""

import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from ..loop.bounds import Bounds
from ..loop.checks import check_any_row
from ..rules import Rule
from .depths import GivenDepth, of_columns
from .noise import Noise

# What a request may ask for beside the options of a GenerationConfig.
OWN = ("min_depth", "max_depth", "rule", "seed")
# Options that change a text, but not through a logits processor.
_REFUSED = ("stop_strings", "max_time", "token_healing")


def configured(config: GenerationConfig, options: dict[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """A configuration with the options of a request, and those options that are adadepth's own.

    Raises: `ValueError` for options that are not known, or that serving cannot honour.
    """
    config = copy.deepcopy(config)
    unknown = config.update(**options)
    own = {name: unknown.pop(name) for name in OWN if name in unknown}
    if unknown:
        raise ValueError(
            f"A request does not take {', '.join(unknown)}. It takes the options of a GenerationConfig, and "
            f"{', '.join(OWN)}."
        )
    mode = str(config.get_generation_mode().value)
    refused = [name for name in _REFUSED if getattr(config, name, None)]
    if getattr(config, "guidance_scale", None) not in (None, 1):
        refused.append("guidance_scale")
    if mode not in ("greedy_search", "sample") or refused:
        raise ValueError(
            f"Requests use greedy search or sampling, got {', '.join(refused) or mode}. Call model.generate for other "
            "modes."
        )
    return config, own


def check_rule(rule: Rule, device: torch.device) -> None:
    """That a rule is one for any request.

    Raises: `ValueError`.
    """
    check_any_row(rule, "what stays of a request's token", device)


Depths = tuple[Tensor, Tensor] | None


@final
@dataclass(eq=False)
class Tokens:
    """Tokens of a request that begin together: those of its prompt, or a single one.

    Attributes:
        position: where the first stands in the row.
        ids: theirs; of a single one perhaps a guess.
        bounds: their least and most depths, `(n,)` each; None: any.
        state: `(n, dim)`, what the loop is given, and later what it gave last.
        depth: the iterations that each has run.
        left: whether all have left the loop.
        next: the token behind them, as the head last said; `read` when they had left, it is chosen.
        reads, lost: how often the head was asked for a guess, and the iterations that were lost by guessing anew.
    """

    request: "Request"
    position: int
    ids: list[int]
    bounds: Depths = None
    state: Tensor | None = None
    depth: list[int] = field(default_factory=list)
    left: bool = False
    next: "Choice | None" = None
    read: bool = False
    reads: int = 0
    lost: int = 0

    @property
    def end(self) -> int:
        """Where the token behind them stands."""
        return self.position + len(self.ids)


class Choice(NamedTuple):
    """A token, and the logarithm of its probability on request."""

    token: int
    logprob: float | None


@final
@dataclass(eq=False)
class Request:
    """What is to be made, and how far it is.

    Attributes:
        ids: of the prompt and, behind it, of the answer so far.
        longest: how many tokens its row holds at most; the last token of an answer is not run.
        processors, sample, noise: how a token is chosen from logits; of the noise it takes `column` by column.
        logprobs: whether to say how likely the tokens were.
        before: ids of padding in front, for those that read ids in columns.
        depth: iterations of each token that has run.
        row: the row of the caches that is its own, -1 as long as it waits.
        chain: its tokens that are not chosen through: the first are certain, those behind them are guesses.
    """

    ids: list[int]
    longest: int
    processors: LogitsProcessorList
    sample: bool
    noise: Noise
    logprobs: bool = False
    min_depth: GivenDepth = None
    max_depth: GivenDepth = None
    rule: Rule | None = None
    number: int = 0
    before: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    row: int = -1
    chain: list[Tokens] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = len(self.ids)

    @classmethod
    def of(
        cls, model: Any, config: GenerationConfig, ids: list[int], new: int | None, logprobs: bool, options: Any
    ) -> "Request":
        """A request for at most `new` tokens behind a prompt.

        Raises: `ValueError` for a prompt or options that cannot be served.
        """
        _check_prompt(ids, model.get_input_embeddings().weight.shape[0])
        config, own = configured(config, options)
        longest = len(ids) + max(new or 1, 1) - 1
        config.max_length = longest + 1
        config.pad_token_id = 0  # no row is padded: keeps transformers from warning that none is known
        model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=model.device)
        prompt = torch.tensor([ids], device=model.device)
        processors = model._get_logits_processor(
            config, input_ids_seq_length=len(ids), encoder_input_ids=prompt, device=model.device
        )
        seed = own.pop("seed", None)
        generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
        if own.get("rule") is not None:
            check_rule(own["rule"], model.device)
        return cls([*ids], longest, processors, bool(config.do_sample), Noise(1, generator), logprobs, **own)

    def bounds(self, steps: int, tokens: Tokens, device: torch.device) -> Depths:
        """The least and the most iterations of each of these tokens; None: any number.

        Raises: `ValueError` as `RecurrentWrapper` does, and whatever a function of the ids raises.
        """
        if self.min_depth is None and self.max_depth is None:
            return None
        ids = torch.tensor([self.until(tokens)], device=device)
        columns = len(self.before) + tokens.position, len(self.before) + tokens.end
        given = {name: of_columns(name, getattr(self, name), ids, *columns) for name in ("min_depth", "max_depth")}
        shape = (1, len(tokens.ids))
        bounds = Bounds.of(steps, **given, shape=shape, device=device)
        least = bounds.least if bounds.least_each is None else bounds.least_each
        most = bounds.steps if bounds.most_each is None else bounds.most_each
        least, most = (torch.as_tensor(depth, device=device).expand(shape)[0] for depth in (least, most))
        return least, most

    def chosen(self, tokens: Tokens, token: int) -> None:
        """The token behind its certain tokens is chosen: it is of the text."""
        self.ids.append(token)
        self.noise.forget(self.number, len(self.ids) - self.prompt)
        self.chain.remove(tokens)

    @property
    def columns(self) -> list[int]:
        """The ids so far, padding in front among them."""
        return [*self.before, *self.ids]

    def until(self, tokens: Tokens) -> list[int]:
        """The ids of the text up to these tokens, padding and guesses among them."""
        guesses = [one.ids[0] for one in self.chain if one.position >= len(self.ids) and one.position < tokens.end]
        return [*self.before, *self.ids[: tokens.end], *guesses]

    def choose(self, tokens: Tokens, logits: Tensor, likeliest: int) -> Choice:
        """The token behind these from its logits `(1, vocabulary)`.

        Raises: `ValueError` for logits that are NaN, and what a logits processor raises.
        """
        if likeliest < 0:
            raise ValueError(
                "The model's logits of this request's next token are NaN. Look for weights that are not finite, or run "
                "it in a wider dtype."
            )
        if not (self.processors or self.sample or self.logprobs):
            return Choice(likeliest, None)
        scores = self.processors(torch.tensor([self.until(tokens)], device=logits.device), logits)
        probabilities = scores.softmax(-1)
        if bool(probabilities.isnan().any()):  # drawing from them would choose at random
            raise ValueError(
                "The request's options turn the logits of its next token into NaN. Look for a temperature too close to "
                "0, or for options that forbid every token."
            )
        if self.sample:
            scores = probabilities / self.noise.of(self.number, tokens.end - self.prompt, probabilities)
        token = int(scores.argmax(-1))
        return Choice(token, float(probabilities[0, token].log()) if self.logprobs else None)


def _check_prompt(ids: list[int], words: int) -> None:
    if not ids or not all(isinstance(word, int) and 0 <= word < words for word in ids):
        wrong = [word for word in ids if not isinstance(word, int) or not 0 <= word < words]
        got = repr(wrong[0]) if wrong else "none"
        raise ValueError(f"A request expected the ids of a prompt, each from 0 to {words - 1}, got {got}.")
