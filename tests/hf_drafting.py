"""Drafts that are made wherever there is room, and guesses that are wrong on purpose."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from hf_zoo import PAD, VOCAB, spread
from torch import Tensor

from adadepth.hf import AdaptiveCache
from adadepth.hf.cache import CACHE
from adadepth.hf.drafts import Drafts
from adadepth.hf.requests import Choice, Request, Tokens

STEPS = 4
model_of = cache(lambda name, span: spread(name, None if span is None else slice(*span), steps=STEPS))
SPANS = [None, (1, 3)]


@dataclass
class Guesses:
    """What was guessed: `spoiled` is how many guesses were made wrong."""

    made: list[Drafts] = field(default_factory=list)
    spoiled: int = 0

    @property
    def right(self) -> int:
        return sum(drafts.right for drafts in self.made)

    @property
    def wrong(self) -> int:
        return sum(drafts.wrong for drafts in self.made)

    def assert_drafted(self) -> None:
        """Some guesses were right; and, if any was made wrong, some were wrong."""
        assert self.right > 0
        assert self.wrong > 0 or not self.spoiled


@contextmanager
def drafting(model: Any, share: float = 0.0, to: int | None = None) -> Iterator[Guesses]:
    """Guess wherever there is room; a share of the guesses become another token, or `to`."""
    guesses, chance, choose = Guesses(), random.Random(0), Request.choose

    def always(depth: int, revise: bool = False) -> Drafts:
        guesses.made.append(Drafts(depth, revise, always=True))
        return guesses.made[-1]

    def spoiled(request: Request, tokens: Tokens, logits: Tensor, likeliest: int) -> Choice:
        choice = choose(request, tokens, logits, likeliest)
        # Without a coda, what is read of a token that has left is kept: it is no guess.
        guess = not tokens.exited or (model.coda is not None and tokens is not request.chain[0])
        if not guess or chance.random() >= share:
            return choice
        guesses.spoiled += 1
        return choice._replace(token=(choice.token + 1) % VOCAB if to is None else to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adadepth.hf.generation.Drafts", always)
        patch.setattr("adadepth.hf.manager.Drafts", always)
        patch.setattr(Request, "choose", spoiled)
        yield guesses


def padded(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, with padding in front."""
    width = max(map(len, texts))
    ids = torch.tensor([[PAD] * (width - len(text)) + text for text in texts])
    return ids, torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])


def written(model: Any, texts: list[list[int]], layout: Any = "filled", seed: int = 0, **options: Any) -> Any:
    """What `generate` returns for texts, from a new cache."""
    ids, mask = padded(texts)
    torch.manual_seed(seed)
    given = {"pad_token_id": PAD, "max_new_tokens": 10, "return_dict_in_generate": True, CACHE: AdaptiveCache(layout)}
    return model.generate(ids, attention_mask=mask, **given | options)


def assert_same(model: Any, got: Any, want: Any) -> None:
    """The same texts, depths and columns; and the same texts in another turn from either cache."""
    for _ in range(2):
        assert got.sequences.tolist() == want.sequences.tolist()
        assert got[CACHE].mask.tolist() == want[CACHE].mask.tolist()
        assert got[CACHE].depth.tolist() == want[CACHE].depth.tolist()
        assert got[CACHE].get_seq_length() == want[CACHE].get_seq_length() == want.sequences.shape[1] - 1
        last = want.sequences[:, -1:]
        ids = torch.cat([want.sequences, torch.full_like(last, 5)], 1)
        mask = torch.cat([want[CACHE].mask, last != PAD, last >= 0], 1).long()
        more = {"attention_mask": mask, "max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
        got, want = (model.generate(ids, **{CACHE: one[CACHE]}, **more) for one in (got, want))
