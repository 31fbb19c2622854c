"""What an engine has done so far, as numbers: for the log and the metrics of a server."""

from dataclasses import dataclass
from typing import final

from .drafts import Drafts


@final
@dataclass
class Counts:
    """What an engine has done since it was made.

    Attributes:
        calls: of the block.
        ran: tokens that these calls ran, one iteration each.
        tokens: new tokens chosen.
        exits: tokens that exited, those of prompts among them.
        depth: the sum of their depths.
        failed: requests that ended with an error.
        seconds: spent at work.
    """

    calls: int = 0
    ran: int = 0
    tokens: int = 0
    exits: int = 0
    depth: int = 0
    failed: int = 0
    seconds: float = 0.0

    def called(self, ran: int) -> None:
        """Count a call of the block for so many tokens; without tokens there is no call."""
        self.calls += ran > 0
        self.ran += ran

    def exited(self, depth: list[int]) -> None:
        """Count tokens that exited at these depths."""
        self.exits += len(depth)
        self.depth += sum(depth)


def metrics(counts: Counts, in_progress: int, waiting: int, drafts: Drafts | None) -> str:
    """The counts in the text format of Prometheus, with the means since the start."""
    right, wrong = (0, 0) if drafts is None else (drafts.right, drafts.wrong)
    c = counts
    each = [
        ("tokens_total", "counter", "new tokens chosen", c.tokens),
        ("calls_total", "counter", "calls of the block", c.calls),
        ("iterations_total", "counter", "iterations of single tokens that these calls ran", c.ran),
        ("exits_total", "counter", "tokens that exited the loop, those of prompts among them", c.exits),
        ("depth_total", "counter", "sum of the depths of these tokens", c.depth),
        (
            "drafts_total",
            "counter",
            "tokens that began as a guess, once right or wrong",
            right + wrong,
        ),
        ("drafts_right_total", "counter", "those that were right", right),
        ("failed_total", "counter", "requests that ended with an error", c.failed),
        ("busy_seconds_total", "counter", "seconds at work", c.seconds),
        ("requests_in_progress", "gauge", "requests that have a row", in_progress),
        ("requests_waiting", "gauge", "requests that wait for a row", waiting),
        ("mean_depth", "gauge", "mean depth of a token", c.depth / max(c.exits, 1)),
        ("tokens_per_call", "gauge", "mean number of tokens in a call", c.ran / max(c.calls, 1)),
        ("agreement", "gauge", "share of drafts that were right", right / max(right + wrong, 1)),
        ("tokens_per_second", "gauge", "new tokens for each second at work", c.tokens / max(c.seconds, 1e-9)),
    ]
    return "".join(
        f"# HELP adadepth_{name} {what}\n# TYPE adadepth_{name} {kind}\nadadepth_{name} {value}\n"
        for name, kind, what, value in each
    )
