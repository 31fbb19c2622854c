"""Serve a looped language model of one's own: many requests at once, tokens of all iterations in one call.

`python -m examples.serve` serves a small random model, and shows that each text is what it is alone.
"""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor, nn

import adadepth as ad
from adadepth.serving import DepthBatch, Ran

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
    waiting, free = deque(range(len(prompts))), list(range(rows))
    request: dict[int, int] = {}  # of each row
    finished: deque[tuple[int, Tensor]] = deque()  # rows and the state of their newest token, to be read out
    ready: deque[tuple[int, int]] = deque()  # rows and their next token
    while waiting or request:
        while waiting and free:  # a prompt joins the next call
            row, i = free.pop(), waiting.popleft()
            request[row] = i
            batch.begin([row], model.embed(torch.tensor([prompts[i]])))
        if finished and len(ready) < batch.room:  # as late as possible: the head is cheapest for many
            some = [finished.popleft() for _ in range(min(width, len(finished)))]
            for (row, _), token in zip(some, newest(model, [state for _, state in some]), strict=True):
                texts[request[row]].append(token)
                if len(texts[request[row]]) < new:
                    ready.append((row, token))
                else:
                    del request[row]
                    batch.release(row)
                    free.append(row)
        if begun := sorted(ready.popleft() for _ in range(min(batch.room, len(ready)))):
            begin, tokens = zip(*begun, strict=True)
            batch.begin(begin, model.embed(torch.tensor(tokens).unsqueeze(1)))
        finished += [(ran.row, ran.hidden[-1]) for ran in batch.call() if isinstance(ran, Ran) and ran.left]
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
