"""Who leaves when: exits by token kind and frequency, and what the metrics of a run say of its gates."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adadepth import viz
from adadepth.diagnostics import Measured
from adadepth.diagnostics import by_exit as groups_by_exit

Row = dict[str, Any]
BYTES = 257  # ids of the tokenizer of bytes


def bytes_per_token(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> float:
    """Of the text that `ids (rows, seq)` stand for."""
    if len(tokenizer) <= BYTES:
        return 1.0
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(len(text.encode()) for text in texts) / ids.numel()


def by_exit(measured: Measured) -> list[Row]:
    """Share and mean loss of the tokens that leave at each depth."""
    return [{"depth": depth, "share": share, "loss": loss} for depth, share, loss in groups_by_exit(measured)]


def by_kind(tokenizer: PreTrainedTokenizerBase, ids: Tensor, measured: Measured) -> list[Row]:
    """How deep tokens of a kind go, and what the next token costs them: the token read, not the one predicted."""
    kinds = [_kind(tokenizer, i) for i in range(len(tokenizer))]
    names = sorted(set(kinds))
    of_id = torch.tensor([names.index(kind) for kind in kinds])
    return _grouped(of_id[ids], dict(enumerate(names)), measured)


def by_frequency(choice: Tensor, ids: Tensor, measured: Measured) -> list[Row]:
    """How deep rare and frequent tokens go. Decile 1 are the most frequent ids, a tenth of all text; counted on other
    text than is reported. An id is in one decile, so that some hold more than a tenth and some nothing."""
    size = int(max(choice.max(), ids.max())) + 1
    counts = choice.flatten().bincount(minlength=size).double()
    order = counts.argsort(descending=True, stable=True)
    middle = (counts[order].cumsum(0) - counts[order] / 2) / counts.sum()
    decile = torch.empty(size, dtype=torch.long).index_copy_(0, order, (middle * 10).long().clamp(0, 9) + 1)
    return _grouped(decile[ids], {i: f"decile {i}" for i in range(1, 11)}, measured)


def _grouped(which: Tensor, names: dict[int, str], measured: Measured) -> list[Row]:
    rows: list[Row] = []
    for i, name in names.items():
        here = which == i
        if not bool(here.any()):
            continue
        depth = measured.depth[here].long()
        exits = depth.bincount()[1:].double() / len(depth)
        share, loss = here.double().mean().item(), measured.loss[here].double().mean().item()
        rows.append(
            {"name": name, "share": share, "loss": loss, "depth": depth.double().mean().item(), "exits": exits.tolist()}
        )
    return rows


def _kind(tokenizer: PreTrainedTokenizerBase, i: int) -> str:
    """Of a byte what it is; of a longer token whether a word begins with it."""
    if i in tokenizer.all_special_ids:
        return "end of text"
    if len(tokenizer) <= BYTES:
        text = chr(i) if i < 128 else ""
        if not text:
            return "not ASCII"
    else:
        text = tokenizer.decode([i])
        if text.strip()[:1].isalpha():
            return "word begins" if text[0].isspace() else "word goes on"
        text = text.strip() or text
    if text[:1].isalpha():
        return "letter"
    if text[:1].isdigit():
        return "digit"
    return "end of line" if "\n" in text else "space" if text.isspace() else "punctuation"


def training(folder: Path) -> Row:
    """Columns of a run's metrics: what happened while it was trained."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    names = ("step", "stage", "loss", "depth", "relative_flops", "penalty", "scores", "seconds")
    columns: Row = {name: [line.get(name) for line in lines] for name in names}
    return columns | {"tokens": lines[-1]["tokens"] if lines else 0}


def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Tensor,
    min_depth: Any,
    max_depth: Any,
    length: int = 128,
) -> Row:
    """The likeliest next tokens after `prompt (seq,)`, and the depth at which each token was read.

    Arguments: `min_depth` and `max_depth`, as `generate` takes them, or None where the loop decides.
    """
    given = {} if max_depth is None else {"min_depth": min_depth, "max_depth": max_depth}
    ids = model.generate(
        prompt.unsqueeze(0), max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.eos_token_id, **given
    )
    with torch.no_grad():
        again = {name: value(ids) if callable(value) else value for name, value in given.items()}
        depths = model(ids, **again).trace.depth[0]
    return {"prompt": len(prompt), "tokens": viz.pieces(tokenizer.decode, ids[0]), "depth": depths.tolist()}
