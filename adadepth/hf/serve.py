"""An OpenAI-compatible server for a saved adapted model: that of transformers, with depths for each request.

`python -m adadepth.hf.serve MODEL --rows 16 --width 8 --capacity 2048`, or `--memory 2GiB` instead of `--rows`. It also
takes any option of `transformers serve`. It needs `pip install "adadepth[serving]"`. The body of a request may have
`min_depth`, `max_depth`, `threshold` and `seed`. `usage` in the answer has the depth of each token.
"""

import logging
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from functools import partial
from typing import Any, final

import transformers

from .._extras import need
from .model import AdaptiveForCausalLM

_ROWS, _CAPACITY = 16, 2048


def _count(text: str) -> int:
    """A number of an option.

    Raises: `ArgumentTypeError` for one below 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a number, 1 or more, got {text}")
    return int(text)


_OPTIONS: dict[str, tuple[Callable[[str], int | str], str]] = {
    "--rows": (_count, f"how many requests are in progress at once ({_ROWS}, or as many as fit into --memory)"),
    "--width": (_count, "how many tokens of answers a call of the block runs (half of the rows)"),
    "--capacity": (_count, f"the most tokens of a request, prompt and answer ({_CAPACITY}, or what fits with --rows)"),
    "--draft-depth": (
        _count,
        "iterations after which a token's successor begins as a guess, if that saves time (never)",
    ),
    "--memory": (str, "the most that the caches may take, 2GiB say"),
}


@final
class Sized:
    """In place of the model's class: loads a model whose managers have these sizes."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        self.sizes = sizes

    def from_pretrained(self, *args: Any, **kwargs: Any) -> AdaptiveForCausalLM:
        """The model."""
        model = AdaptiveForCausalLM.from_pretrained(*args, **kwargs)
        model.__dict__["init_continuous_batching"] = partial(model.init_continuous_batching, **self.sizes)
        return model


def prepared(arguments: list[str]) -> list[str]:
    """Make transformers load adapted models of the sizes that arguments say; returns the other arguments."""
    parser = ArgumentParser(prog="python -m adadepth.hf.serve", add_help=False, allow_abbrev=False)
    for name, (kind, what) in _OPTIONS.items():
        parser.add_argument(name, type=kind, help=what)
    sizes, others = parser.parse_known_args(arguments)
    if sizes.memory is None and sizes.rows is None:
        sizes.rows = _ROWS
    if sizes.capacity is None and (sizes.memory is None or sizes.rows is None):
        sizes.capacity = _CAPACITY
    # Its loader looks a model's class up by name, in the package itself.
    transformers.AdaptiveForCausalLM = Sized(vars(sizes))
    return others if "--continuous-batching" in others else [*others, "--continuous-batching"]


def main() -> None:
    """Run the server."""
    for package in ("fastapi", "uvicorn", "openai", "typer"):
        need(package, "serving")
    others = prepared(sys.argv[1:])
    from transformers.cli.transformers import app

    from .server import install

    install()
    if "--help" in others:
        print(*(f"  {name}: {what}" for name, (_, what) in _OPTIONS.items()), sep="\n")
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("adadepth").setLevel(logging.INFO)
    app(["serve", *others])


if __name__ == "__main__":
    main()
