"""`Request`: a text that is generated together with others, with the same result as from `generate` alone."""

import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from .._given import integer
from ..loop.bounds import Bounds
from ..loop.checks import check_any_row, check_part
from ..rules import Rule
from .depths import GivenDepth, of_columns
from .noise import Noise
from .processors import remembering

# Options of a request that are not those of a GenerationConfig.
OWN = ("min_depth", "max_depth", "rule", "seed")
# Options that change a text without a logits processor, so the engine would ignore them.
_UNSUPPORTED = ("stop_strings", "max_time", "token_healing")


def configured(config: GenerationConfig, options: dict[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return the configuration with the options of a request, and separately the options in `OWN`.

    Raises: `ValueError` for options that are unknown or that serving does not support.
    """
    answers = config.num_return_sequences or 1
    if options.get("num_return_sequences") not in (None, answers):
        raise ValueError(
            f"The manager has num_return_sequences={answers} for all its requests, got "
            f"{options['num_return_sequences']} for one of them. Pass it in the generation_config of the manager, or "
            "add the request several times."
        )
    config = copy.deepcopy(config)
    unknown = config.update(**options)
    own = {name: unknown.pop(name) for name in OWN if name in unknown}
    if unknown:
        raise ValueError(
            f"A request does not take {', '.join(unknown)}. It takes the options of a GenerationConfig, and "
            f"{', '.join(OWN)}."
        )
    mode = str(config.get_generation_mode().value)
    refused = [name for name in _UNSUPPORTED if getattr(config, name, None)]
    if getattr(config, "guidance_scale", None) not in (None, 1):
        refused.append("guidance_scale")
    if mode not in ("greedy_search", "sample") or refused:
        raise ValueError(
            f"Requests use greedy search or sampling, got {', '.join(refused) or mode}. Call model.generate for other "
            "modes."
        )
    return config, own


def most_new_tokens(config: GenerationConfig, prompt: int) -> int | None:
    """The most new tokens after a prompt of so many tokens; None: no limit. As in `generate`, `max_new_tokens` wins."""
    if config.max_new_tokens is not None or config.max_length is None:
        return config.max_new_tokens
    return config.max_length - prompt


def check_rule(rule: Rule, device: torch.device) -> None:
    """Check that a rule is one, and that it accepts the tokens of any request.

    Raises: `ValueError`.
    """
    check_any_row(check_part("rule", rule), "how much of each token continues, for any request", device)


Depths = tuple[Tensor, Tensor] | None


@final
@dataclass(eq=False)
class Tokens:
    """Tokens of a request that enter the loop together: those of its prompt, or a single token.

    Attributes:
        position: the position of the first token in the row.
        ids: their ids; a single token may be a guess.
        bounds: their least and greatest depths, `(n,)` each; None: no bounds.
        state: `(n, dim)`: the input of the loop, and later its newest output.
        depth: the number of iterations that each token has run.
        exited: whether all of them have exited.
        next: the next token after them, from the newest run of the head. It is a guess unless `final`.
        final: whether the head ran after they had exited, so that `next` needs no further run of the head.
        head_calls: how many further runs of the head their guesses took.
        wasted: the iterations of earlier guesses that a later guess replaced.
    """

    request: "Request"
    position: int
    ids: list[int]
    bounds: Depths = None
    state: Tensor | None = None
    depth: list[int] = field(default_factory=list)
    exited: bool = False
    next: "Choice | None" = None
    final: bool = False
    head_calls: int = 0
    wasted: int = 0

    @property
    def end(self) -> int:
        """The position of the next token after them."""
        return self.position + len(self.ids)


class Choice(NamedTuple):
    """A token, and the logarithm of its probability if the request asks for it."""

    token: int
    logprob: float | None


@final
@dataclass(eq=False)
class Request:
    """A request and its progress.

    Attributes:
        ids: the ids of the prompt and of the answer so far.
        longest: the most tokens that its row holds; the last token of an answer is not run. None: as many as fit.
        processors, sample, noise: how a token is chosen from logits. Sampling uses `noise`, drawn for each column.
        logprobs: whether to return the log probabilities of the tokens.
        number: its row in `noise`.
        padding: the ids of left padding, for processors and depth functions that read ids in columns.
        depth: the depth of each token that has run.
        row: its row in the caches; -1 while it waits.
        guessable: whether its tokens may be guessed. A processor that keeps a state may not read a guess.
        chain: its tokens whose next token is not chosen yet. The first entry is certain, the others are guesses.
    """

    ids: list[int]
    longest: int | None
    processors: LogitsProcessorList
    sample: bool
    noise: Noise
    logprobs: bool = False
    min_depth: GivenDepth = None
    max_depth: GivenDepth = None
    rule: Rule | None = None
    number: int = 0
    padding: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    row: int = -1
    chain: list[Tokens] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = len(self.ids)
        self.guessable = not remembering(self.processors)

    @classmethod
    def of(
        cls, model: Any, config: GenerationConfig, ids: list[int], new: int | None, logprobs: bool, options: Any
    ) -> "Request":
        """A request for at most `new` tokens after a prompt; None: no limit.

        Raises: `ValueError` for a prompt or options that serving does not support.
        """
        _check_prompt(ids, model.get_input_embeddings().weight.shape[0])
        if new is not None and new < 1:
            raise ValueError(
                f"A request expected room for 1 or more new tokens after its prompt of {len(ids)}, got {new}. Pass a "
                "larger max_new_tokens or max_length."
            )
        config, own = configured(config, options)
        config.max_length = None if new is None else len(ids) + new
        if new is None:
            config.forced_eos_token_id = None  # it is forced as the last token, and no token is the last
        config.pad_token_id = 0  # no row is padded; without it transformers would warn that no padding token is set
        model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=model.device)
        prompt = torch.tensor([ids], device=model.device)
        processors = model._get_logits_processor(
            config, input_ids_seq_length=len(ids), encoder_input_ids=prompt, device=model.device
        )
        seed = own.pop("seed", None)
        generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
        if own.get("rule") is not None:
            check_rule(own["rule"], model.device)
        longest = None if new is None else len(ids) + new - 1
        return cls([*ids], longest, processors, bool(config.do_sample), Noise(1, generator), logprobs, **own)

    def bounds(self, steps: int, tokens: Tokens, device: torch.device) -> Depths:
        """The least and the greatest depth of each of these tokens; None: no bounds.

        Raises: `ValueError` as `RecurrentWrapper` does, and whatever a function of the ids raises.
        """
        if self.min_depth is None and self.max_depth is None:
            return None
        ids = torch.tensor([self.ids_until(tokens)], device=device)
        columns = len(self.padding) + tokens.position, len(self.padding) + tokens.end
        given = {name: of_columns(name, getattr(self, name), ids, *columns) for name in ("min_depth", "max_depth")}
        shape = (1, len(tokens.ids))
        bounds = Bounds.of(steps, **given, shape=shape, device=device)
        least = bounds.least if bounds.least_each is None else bounds.least_each
        most = bounds.steps if bounds.most_each is None else bounds.most_each
        least, most = (torch.as_tensor(depth, device=device).expand(shape)[0] for depth in (least, most))
        return least, most

    def append(self, tokens: Tokens, token: int) -> None:
        """Append the token that was chosen after `tokens`, which leave the chain."""
        self.ids.append(token)
        self.noise.forget(self.number, len(self.ids) - self.prompt)
        self.chain.remove(tokens)

    @property
    def columns(self) -> list[int]:
        """The ids so far, with left padding."""
        return [*self.padding, *self.ids]

    def ids_until(self, tokens: Tokens) -> list[int]:
        """The ids up to the end of these tokens, with left padding and guesses."""
        guesses = [one.ids[0] for one in self.chain if one.position >= len(self.ids) and one.position < tokens.end]
        return [*self.padding, *self.ids[: tokens.end], *guesses]

    def choose(self, tokens: Tokens, logits: Tensor, likeliest: int) -> Choice:
        """Choose the next token after these from its logits `(1, vocabulary)`. `likeliest` is -1 for logits with NaN.

        Raises: `ValueError` for logits that are NaN, and whatever a logits processor raises.
        """
        if likeliest < 0:
            raise ValueError(
                "The model's logits of this request's next token are NaN. Look for weights that are not finite, or run "
                "it in a wider dtype."
            )
        if not (self.processors or self.sample or self.logprobs):
            return Choice(likeliest, None)
        scores = self.processors(torch.tensor([self.ids_until(tokens)], device=logits.device), logits)
        probabilities = scores.softmax(-1)
        if bool(probabilities.isnan().any()):  # sampling from NaN would return an arbitrary token
            raise ValueError(
                "The request's options turn the logits of its next token into NaN. Look for a temperature too close to "
                "0, or for options that forbid every token."
            )
        if self.sample:
            scores = probabilities / self.noise.of(self.number, tokens.end - self.prompt, probabilities)
        token = int(scores.argmax(-1))
        return Choice(token, float(probabilities[0, token].log()) if self.logprobs else None)


def ids_of(prompt: Any) -> list[Any]:
    """The ids of a prompt, integers of any kind as ints. A tensor or an array may have an axis for a batch of one."""
    ids = prompt.flatten().tolist() if hasattr(prompt, "flatten") else prompt
    return [word if (number := integer(word)) is None else number for word in ids]


def _check_prompt(ids: list[int], words: int) -> None:
    """Check that a prompt has ids, all of a vocabulary of `words` tokens."""
    if not ids or not all(isinstance(word, int) and 0 <= word < words for word in ids):
        wrong = [word for word in ids if not isinstance(word, int) or not 0 <= word < words]
        got = repr(wrong[0]) if wrong else "none"
        raise ValueError(f"A request expected the ids of a prompt, each from 0 to {words - 1}, got {got}.")
