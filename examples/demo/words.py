"""What the demo says of itself, the same in the terminal and in the report: what is trained, why, and who decides."""

from collections.abc import Iterator

from .exits import Gated
from .jobs import Setup
from .known import NAMES
from .model import AdaptiveLM
from .text import Text

DECIDES = {
    "router": (
        "Exits: router. A fixed table gives each byte its depth, by how many letters of its word have been read. The "
        "table is made once, after the first stage, from measured gains. It is not learned: no gradient reaches it, "
        "and it does not look at the state of the model."
    ),
    "survival": (
        "Exits: survival. Small gates, which are trained with the model, score each byte after each iteration. A byte "
        f"exits when the product of all its scores falls below {Gated.tau}."
    ),
    "paper": (
        "Exits: paper. The gates of AdaPonderLM, which are trained with the model, score each byte after each "
        f"iteration. A byte exits when its newest score falls below {Gated.tau}."
    ),
}
QUICK = "QUICK: few steps, only to see that everything runs. The numbers mean nothing."


def about(setup: Setup, text: Text, quick: bool) -> Iterator[str]:
    """Sentences, in the order in which they are read."""
    shape = setup.shape
    if quick:
        yield QUICK
    yield (
        f"A small language model applies the same layer 1 to {shape.steps} times to each byte of a text, and skips the "
        "bytes that have exited. Does it predict better than models that spend the same computation on every byte?"
    )
    yield (
        f"To see, {shape.steps + 1} models are trained from the same initial weights on the same batches: one with "
        f"exits, and one for each fixed depth from 1 to {shape.steps}."
    )
    yield DECIDES[setup.policy]
    yield f"Text: {text.source}: {len(text.train):,} bytes to train on, {len(text.held_out):,} held out."
    yield (
        "On text, learned exits have not been better than a fixed depth. Where tokens truly differ in the depth that "
        f"they need, learned gates find it: {len(NAMES)} more models are trained on short programs, where that depth "
        "is known."
    )
    size = sum(p.numel() for p in AdaptiveLM(shape).parameters())
    yield (
        f"Model: {size:,} parameters, {shape.layers} layer of width {shape.dim}; {setup.recipe.steps} steps, of which "
        f"the first {setup.recipe.first} are without exits; update {shape.update}, seed {setup.seed}."
    )
