"""A gate, a rule and an update of one's own: each checked by the library's suite, then used together.

`python -m examples.a_gate_of_your_own` runs the contract suites on the three, trains them for a few steps in a small
causal model, shows that each of their parameters has a gradient, and that decoding with a cache equals the whole.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadepth as ad


class TurnGate(ad.Gate):
    """Goes on while the last iteration still turned the state: `sigmoid(scale · (1 - cos(h, previous)) + bias)`.

    Shapes: `h (..., dim)` to `score (...)`.
    """

    def __init__(self, scale: float = 10.0, bias: float = -2.0) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(bias))

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Tensor:
        turned = 1 - F.cosine_similarity(h, previous, dim=-1)
        return torch.sigmoid(self.scale * turned + self.bias)


def patience(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    """A rule: a token leaves when two scores in a row were below 1/2, and so not after its first iteration."""
    if scores.shape[-1] < 2:
        return remaining
    return torch.where(scores[..., -2:].amax(-1) >= 0.5, remaining, 0)


class Anchored(ad.Update):
    """The state by its score, drawn back to where the loop began: `x + s·(h - x) + pull·(start - h)`."""

    scales = True  # it multiplies by a score

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pull = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int) -> Tensor:
        return torch.lerp(x, h, scores[..., -1:]) + self.pull * (start - h)


def check() -> None:
    """The contract suites raise AssertionError, with what was expected and what came."""
    ad.testing.check_gate(TurnGate(), dim=16)
    ad.testing.check_rule(patience)
    ad.testing.check_update(Anchored(16), dim=16)
    print("gate, rule and update keep their contracts")


class Model(nn.Module):
    """Predicts the next of `ids` letters; the final norm stands in the head, outside the loop."""

    def __init__(self, ids: int = 6, dim: int = 32, steps: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(ids, dim)
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.looped = ad.RecurrentWrapper(ad.CausalEncoder(layer), steps, TurnGate(), patience, Anchored(dim))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, ids))


def train(model: Model, steps: int) -> None:
    """On rows that repeat three letters; says what gradient the three pieces had in the last step."""
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        ids = torch.randint(6, (16, 3)).repeat(1, 4)
        out = model.looped(model.embed(ids[:, :-1]))
        loss = F.cross_entropy(model.head(out.hidden).flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step in (0, steps - 1):
            print(f"step {step + 1}: loss {loss.item():.2f}, mean depth {out.trace.depth.double().mean():.2f}")
    for name, parameter in model.looped.named_parameters():
        if not name.startswith("block.") and parameter.grad is not None:
            print(f"{name}: gradient {parameter.grad.norm():.4f}")


@torch.inference_mode()
def decode(model: Model) -> None:
    x = model.embed(torch.randint(6, (2, 3)).repeat(1, 4))
    whole, cache = model.looped(x), ad.KVReuseCache()
    hidden = torch.cat([model.looped(part, cache=cache).hidden for part in x.split([5] + [1] * 7, 1)], 1)
    same = torch.allclose(hidden, whole.hidden, atol=1e-5) and torch.equal(cache.depth, whole.trace.depth)
    print("decoded with a cache:", "the same" if same else "differs")
    print(whole.trace.depth)


def main() -> None:
    torch.manual_seed(0)
    check()
    model = Model()
    train(model, steps=20)
    decode(model.eval())


if __name__ == "__main__":
    main()
