"""An OpenAI-compatible server for a saved adapted model: transformers' own, which then finds the model's class.

`python -m adadepth.hf.serve MODEL --rows 16 --width 8 --capacity 2048`, and any option of `transformers serve`. It
needs `pip install "transformers[serving]"`. All requests are sampled as the first one asks: so does transformers.
"""

import sys
from argparse import ArgumentParser
from functools import partial
from typing import Any, final

import transformers

from .model import AdaptiveForCausalLM

_OPTIONS = {
    "--rows": (16, "how many requests are in progress at once"),
    "--width": (8, "how many tokens of answers a call of the block runs"),
    "--capacity": (2048, "the most tokens of a request, prompt and answer"),
}


@final
class Sized:
    """In place of the model's class: loads a model whose managers have these sizes."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes

    def from_pretrained(self, *args: Any, **kwargs: Any) -> AdaptiveForCausalLM:
        """The model."""
        model = AdaptiveForCausalLM.from_pretrained(*args, **kwargs)
        model.__dict__["init_continuous_batching"] = partial(model.init_continuous_batching, **self.sizes)
        return model


def prepared(arguments: list[str]) -> list[str]:
    """Make transformers load adapted models of the sizes that arguments say; returns the other arguments."""
    parser = ArgumentParser(prog="python -m adadepth.hf.serve", add_help=False, allow_abbrev=False)
    for name, (default, what) in _OPTIONS.items():
        parser.add_argument(name, type=int, default=default, help=what)
    sizes, others = parser.parse_known_args(arguments)
    # Its loader looks a model's class up by name, in the package itself.
    transformers.AdaptiveForCausalLM = Sized(vars(sizes))
    return others if "--continuous-batching" in others else [*others, "--continuous-batching"]


def main() -> None:
    """Run the server."""
    others = prepared(sys.argv[1:])
    from transformers.cli.transformers import app

    if "--help" in others:
        print(*(f"  {name}: {what} ({default})" for name, (default, what) in _OPTIONS.items()), sep="\n")
    app(["serve", *others])


if __name__ == "__main__":
    main()
