"""Serve a looped language model of one's own: many requests at once, tokens of all iterations in one call.

`python -m examples.serve` serves a small random model, and shows that each text is what it is alone.
"""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor, nn

import adadepth as ad
from adadepth.serving import DepthBatch, Failed

from .decode_by_hand import WORDS, Block


class Model(NamedTuple):
    """Embedding, loop and head."""

    embed: nn.Embedding
    looped: ad.RecurrentWrapper
    head: nn.Linear


@torch.inference_mode()
def serve(model: Model, prompts: list[list[int]], new: int, rows: int = 32, width: int = 16) -> list[list[int]]:
    """The `new` likeliest ids after each prompt; of `rows` requests at a time, about `width` tokens a call."""
    cache = ad.KVReuseCache(capacity=max(map(len, prompts)) + new)
    batch = DepthBatch(model.looped, cache, rows, width)
    texts: list[list[int]] = [[] for _ in prompts]
    waiting, free = deque(enumerate(prompts)), [*range(rows)]
    owner: dict[int, int] = {}  # the request of each row
    left: deque[tuple[int, Tensor]] = deque()  # rows, and a state to read
    ready: deque[tuple[int, int]] = deque()  # rows, and their next token
    while waiting or owner:
        while waiting and free:
            row = free.pop()
            owner[row], prompt = waiting.popleft()
            batch.begin([row], model.embed(torch.tensor([prompt])))
        # As late as possible: the head is cheapest for many.
        if left and len(ready) < batch.room:
            read = [left.popleft() for _ in range(min(width, len(left)))]
            tokens = newest(model, [state for _, state in read])
            for (row, _), token in zip(read, tokens, strict=True):
                text = texts[owner[row]]
                text.append(token)
                if len(text) < new:
                    ready.append((row, token))
                else:
                    batch.release(row)
                    free.append(row)
                    del owner[row]
        count = min(batch.room, len(ready))
        if count > 0:
            begun = sorted(ready.popleft() for _ in range(count))
            x = model.embed(torch.tensor([[token] for _, token in begun]))
            batch.begin([row for row, _ in begun], x)
        for ran in batch.call():
            if isinstance(ran, Failed):
                raise ran.error
            if ran.left:
                left.append((ran.row, ran.hidden[-1]))
    return texts


def newest(model: Model, states: list[Tensor]) -> list[int]:
    """The likeliest id after each state."""
    ids: list[int] = model.head(torch.stack(states)).argmax(-1).tolist()
    return ids


@torch.inference_mode()
def alone(model: Model, prompt: list[int], new: int) -> list[int]:
    """The same for one request."""
    cache, text, now = ad.KVReuseCache(), [], prompt
    for _ in range(new):
        hidden = model.looped(model.embed(torch.tensor([now])), cache=cache).hidden
        now = newest(model, [hidden[0, -1]])
        text += now
    return text


def main() -> None:
    torch.manual_seed(5)
    dim = 32
    gate = ad.SharedMLPGate(dim, hidden=16, bias=0.0)
    looped = ad.RecurrentWrapper(Block(dim, 4), 4, gate, ad.Threshold(0.5), ad.Interpolate()).eval()
    model = Model(nn.Embedding(len(WORDS), dim), looped, nn.Linear(dim, len(WORDS)))
    prompts = [[(3 * i + j) % len(WORDS) for j in range(1 + i % 4)] for i in range(40)]
    texts = serve(model, prompts, new=6, rows=8, width=4)
    for prompt, text in zip(prompts[:3], texts, strict=False):
        print(*(WORDS[token] for token in prompt), "|", *(WORDS[token] for token in text))
    same = sum(alone(model, prompt, 6) == text for prompt, text in zip(prompts, texts, strict=True))
    print(f"{same} of {len(texts)} texts are what they are alone")


if __name__ == "__main__":
    main()
