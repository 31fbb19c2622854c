"""What the approximate layout costs in loss: a small trained model decodes held-out text from each cache.

`python -m benchmarks.single` trains the demonstration's byte model with survival gates on the standard library, and
then reads the second half of each held-out window byte by byte.
"""

import argparse

import torch
from torch import Tensor

import adadepth as ad
from adadepth.cache.kv_reuse import LayoutName
from examples.demo.exits import policy
from examples.demo.model import AdaptiveLM, Shape
from examples.demo.text import even_windows, stdlib_text
from examples.demo.train import Recipe, Training, nll

from ._measure import machine, write_section


@torch.no_grad()
def decoded(model: AdaptiveLM, windows: Tensor, layout: LayoutName, least: int) -> tuple[float, float]:
    """Nats per byte and mean depth over the second half of `windows (batch, length + 1)`, read byte by byte."""
    ids, prompt = windows[:, :-1].long(), windows.shape[1] // 2
    cache = ad.KVReuseCache(layout)
    pieces = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
    hidden = torch.cat([model.looped(model.embedding(x), min_depth=least, cache=cache).hidden for x in pieces], 1)
    losses = nll(model.head(model.norm(hidden)), windows[:, 1:].long())
    return losses[:, prompt:].mean().item(), cache.depth[:, prompt:].double().mean().item()


def trained(recipe: Recipe, data: Tensor) -> AdaptiveLM:
    """In both stages."""
    training, exits = Training(Shape(), recipe, seed=0), policy("survival")
    while training.step < recipe.first:
        training.fixed(data, training.model.shape.steps)
    training.begin(exits, data)
    while training.step < recipe.steps:
        training.adaptive(data, exits)
    return training.model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--windows", type=int, default=256)
    args = parser.parse_args()
    recipe = Recipe(args.steps)
    text = stdlib_text(recipe.window)
    windows = even_windows(text.held_out, args.windows, recipe.window)
    model = trained(recipe, text.train)
    lines = ["| exits | filled: nats, mean depth | compact | single |", "|" + "---|" * 4]
    for exits, least in (("learned", 2), ("none", model.shape.steps)):
        results = [decoded(model, windows, layout, least) for layout in ("filled", "compact", "single")]
        lines.append(" | ".join([f"| {exits}", *(f"{nats:.4f}, {depth:.2f}" for nats, depth in results)]) + " |")
    print(machine(), *lines, sep="\n")
    write_section(
        "single",
        f"Nats per byte and mean depth, decoded from each layout; compact is filled. {machine()}\n\n"
        + "\n".join(lines),
    )


if __name__ == "__main__":
    main()
