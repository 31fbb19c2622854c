"""A decode loop by hand over a block of one's own: two prompts of different lengths, each token to its own depth.

`python -m examples.decode_by_hand` generates with a cache, prints what each token took, and shows that one
pass over prompt and answer, without a cache, says the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad

WORDS = ["the", "cat", "dog", "saw", "a", "bird", "that", "ran", "and", "then", "slept", "."]


class Block(nn.Module):
    """A layer as one might have it; its positions come from the loop, since it sees only the tokens that run."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.places = heads, nn.Embedding(64, dim)
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x + self.places(ad.positions()))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(y).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


@torch.inference_mode()
def generate(
    embed: nn.Embedding, looped: ad.RecurrentWrapper, head: nn.Linear, ids: Tensor, mask: Tensor, new: int
) -> tuple[Tensor, ad.KVReuseCache]:
    """`ids (batch, seq)` and `new` more, the likeliest each time; `mask` is False at the padding on their left."""
    if not mask[:, -1].all():
        raise ValueError("generate expected padding on the left, got a row that ends in padding. Pad on the left.")
    cache = ad.KVReuseCache("compact")
    hidden = looped(embed(ids), mask=mask, cache=cache).hidden
    for _ in range(new):
        newest = head(hidden[:, -1:]).argmax(-1)
        ids = torch.cat([ids, newest], 1)
        hidden = looped(embed(newest), cache=cache).hidden
    return ids, cache


def main() -> None:
    torch.manual_seed(5)
    dim = 32
    embed, head = nn.Embedding(len(WORDS), dim), nn.Linear(dim, len(WORDS))
    gate = ad.SharedMLPGate(dim, hidden=16, bias=0.0)
    looped = ad.RecurrentWrapper(Block(dim, 4), 4, gate, ad.Threshold(0.5), ad.Interpolate()).eval()
    prompts = ["the cat saw a", "a dog"]
    rows = [[WORDS.index(word) for word in prompt.split()] for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
    ids, cache = generate(embed, looped, head, ids, mask, new=6)

    lengths = cache.lengths.tolist()
    for row, length, depth in zip(ids, lengths, cache.depth, strict=True):
        text = [WORDS[token] for token in row[-length:]]
        print(*(f"{word}:{n}" for word, n in zip(text, depth.tolist(), strict=False)))
    print(f"cache: {sum(lengths)} tokens, {int(cache.depth.sum())} entries, {cache.nbytes} bytes")

    mask = F.pad(mask, (0, ids.shape[1] - longest), value=True)
    with torch.inference_mode():
        whole = looped(embed(ids), mask=mask)
    same = all(torch.equal(whole.trace.depth[r][mask[r]], cache.depth[r, :n]) for r, n in enumerate(lengths))
    answer = head(whole.hidden[:, longest - 1 : -1]).argmax(-1)
    print("one pass without a cache:", "the same" if same and torch.equal(answer, ids[:, longest:]) else "differs")


if __name__ == "__main__":
    main()
