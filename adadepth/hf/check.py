"""An adapted model against the original, and against itself, on a few tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from .._given import text_of
from .._modes import evaluating
from ..loop.agreement import coarsest, untouched
from ..updates import Replace
from .anatomy import SLIDING, kinds_of, text_config
from .attention import NAME, windows
from .cache import AdaptiveCache

COLUMNS, PADDED, KNOWN_WORDS = 8, 3, 1000
# What rounding may come to, relative to the largest logit: of any token, in half precision of the median token, since
# rounding may send others to another expert. A model of 30 layers in bfloat16 came to 0.014 after 4 iterations, in
# float16 to 0.002; wrong ones to 0.1 and more.
LIMITS = {torch.float64: 1e-6, torch.float32: 5e-4, torch.float16: 8e-3, torch.bfloat16: 4e-2}
PASSES = (slice(0, PADDED + 1), slice(PADDED + 1, PADDED + 2), slice(PADDED + 2, COLUMNS))


def check(model: Any) -> None:
    """See that a model gives what it must; everything is left as it was.

    Raises: `ValueError` that says what differs, and by how much.
    """
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":
        raise ValueError(
            "The model's weights are on the meta device, so there is nothing to check. Pass check=False, and call "
            "model.check() once it has its weights."
        )
    with evaluating(model), untouched(model, device):
        for part in (model.prelude, model.loop, model.coda):
            if part is not None:
                part.self_check = False
        # An input that moves, and no gate: what is checked is the base. Attributes go before modules.
        model.loop.__dict__.update(gate=None, update=Replace())
        try:
            _Check.on(model, device).run()
        except (ValueError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _refusal(model, f"a pass of a few tokens raised {text_of(error).removesuffix('.')}") from error


@final
class _Check(NamedTuple):
    """A model, and a batch of two rows of which one is padded on the left, at mixed depths."""

    model: Any
    ids: Tensor
    mask: Tensor
    depth: Tensor
    dtype: torch.dtype

    @classmethod
    def on(cls, model: Any, device: torch.device) -> "_Check":
        words = min(model.get_input_embeddings().weight.shape[0], KNOWN_WORDS)
        ids = torch.arange(2 * COLUMNS, device=device).view(2, COLUMNS) * 7 % (words - 3) + 3
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, :PADDED] = False
        depth = 1 + torch.arange(ids.numel(), device=device).view_as(ids) % model.loop.steps
        return cls(model, ids, mask, depth, coarsest(model, torch.zeros((), dtype=model.dtype, device=device)))

    def run(self) -> None:
        """All comparisons, the plainest first."""
        expected = self._expected()
        with windows() as seen:
            once = self.model(self.ids, max_depth=1).logits
        self._same(once, expected, torch.ones_like(self.mask), "at depth 1 it does not give what the original gives")
        _check_windows(self.model, seen)
        whole = self._logits(slice(None), slice(None))
        for row in range(len(self.ids)):
            rows, first = slice(row, row + 1), 0 if row == 0 else PADDED
            alone, mask = self._logits(rows, slice(first, None)), self.mask[rows, first:]
            self._same(whole[rows, first:], alone, mask, "a row of a padded batch does not give what it gives alone")
        cache = AdaptiveCache()
        parts = [self._logits(slice(None), columns, cache) for columns in PASSES]
        self._same(torch.cat(parts, 1), whole, self.mask, "with a cache it does not give what it gives without")

    def _expected(self) -> Tensor:
        """The logits of the original.

        Raises: `ValueError` if it does not run.
        """
        try:
            with _original(self.model):
                logits: Tensor = self.model.base(input_ids=self.ids, use_cache=False).logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"adapt expected a model that runs, but {type(self.model.base).__name__} raised "
                f"{text_of(error).removesuffix('.')} in a pass of a few tokens without a loop. Make it run by itself, "
                "then adapt it."
            ) from error
        return logits

    def _logits(self, rows: slice, columns: slice, cache: AdaptiveCache | None = None) -> Tensor:
        depth = self.depth[rows, columns]
        logits: Tensor = self.model(
            self.ids[rows, columns],
            attention_mask=self.mask[rows, columns],
            past_key_values=cache,
            min_depth=depth,
            max_depth=depth,
            rule=_all_continue,
        ).logits
        return logits

    def _same(self, got: Tensor, expected: Tensor, seen: Tensor, what: str) -> None:
        expected, seen = expected.to(got.device), seen.to(got.device)
        if (far := _far(got[seen], expected[seen], self.dtype)) > LIMITS[self.dtype]:
            raise _refusal(self.model, f"{what}; they differ by {far:.1e} relative")


def _far(got: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """How far logits `(tokens, vocabulary)` are off, relative to the largest."""
    each = (got.double() - expected.double()).abs().amax(-1)
    worst = each.median() if dtype in (torch.float16, torch.bfloat16) else each.max()
    return float((worst / expected.double().abs().max()).nan_to_num(torch.inf))


def _all_continue(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    return remaining


def _refusal(model: Any, what: str) -> ValueError:
    return ValueError(
        f"{type(model.base).__name__} cannot be looped as it is: {what}. Its layers may mix tokens outside of "
        "attention, or count positions without position_ids. Loop its layers by hand: "
        "adadepth.RecurrentWrapper(layers, steps)."
    )


@contextmanager
def _original(model: Any) -> Iterator[None]:
    """The base attends as it did before it was adapted."""
    config = model.anatomy.of(model.base).config
    config._attn_implementation = model.attention
    try:
        yield
    finally:
        config._attn_implementation = NAME


def _check_windows(model: Any, seen: list[int | None]) -> None:
    """That layers which see a window say so to their attention: a few tokens do not reach beyond it.

    Raises: `ValueError`.
    """
    config = text_config(model.base.config)
    kinds, window = kinds_of(config), getattr(config, "sliding_window", None)
    narrow = sum(width is not None for width in seen)
    if narrow * len(kinds) != kinds.count(SLIDING) * len(seen):
        said = f"{kinds.count(SLIDING)} of its {len(kinds)} layers"
    elif not kinds and not narrow and window is not None and COLUMNS <= window < config.max_position_embeddings:
        said = "its layers"
    else:
        return
    raise _refusal(
        model,
        f"{said} see a window, but {narrow} of {len(seen)} attention calls name one: it is in a mask, and only the "
        "loop makes masks",
    )
