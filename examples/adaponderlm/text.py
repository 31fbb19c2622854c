"""Text to train on: documents, tokens, packed windows. The order is the same for any number of ranks, and resumable.

Documents, each followed by <|endoftext|>, make one long sequence of tokens. A row is `window + 1` tokens of it; the
next one begins with the last token of this one, so that every token but the first is predicted exactly once.
"""

import bz2
import glob
import gzip
import hashlib
import json
import lzma
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO, final

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..demo.text import CONTROL, TENTH, stdlib_files
from .config import BadInput, Data

END = "<|endoftext|>"
PIECE = 1 << 15  # characters that the tokenizer sees at once: no document is too long, and pieces run in parallel
BLOCK = 1 << 20  # characters that are read at once
OPEN: dict[str, Callable[..., TextIO]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
Piece = tuple[str, bool]  # of a document, and whether the document ends there


def tokenizer_of(data: Data) -> PreTrainedTokenizerFast:
    """The tokenizer of a run: that of bytes, or one from a folder or the hub.

    Raises: `BadInput` where there is none, and where it has no token that ends a text.
    """
    if data.tokenizer == "bytes":
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    except (OSError, ValueError, KeyError) as error:
        if Path(data.tokenizer).is_dir():
            raise BadInput(f"there is no tokenizer in the folder {data.tokenizer}") from error
        raise BadInput(f"{data.tokenizer} is no folder, and the hub gives no tokenizer of that name") from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise BadInput(f"expected a tokenizer of the tokenizers library with an end of text, {data.tokenizer} is none")
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """UTF-8: the ids 0 to 255 are bytes, 256 is <|endoftext|>."""
    shown = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    hidden = [byte for byte in range(256) if byte not in shown]
    shown |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}  # the letters of byte-level BPE, since GPT-2
    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in shown.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> None:
    """Raise: `BadInput` if there are more tokens than the model has embeddings."""
    if len(tokenizer) > vocabulary:
        raise BadInput(f"expected a tokenizer of at most the {vocabulary:,} ids of the model, got {len(tokenizer):,}")


class Windows(ABC):
    """Rows of tokens without end, in one order for all ranks, each of which takes its share."""

    @abstractmethod
    def batch(self, count: int) -> Tensor:
        """This rank's `count` of the next `world·count` rows, in the order of ranks: `(count, window + 1)` int64."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, the same on all ranks and for any number of them; can be written as JSON."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises: `BadInput` for what another text or the other kind of windows said."""


def windows(data: Data, tokenizer: PreTrainedTokenizerFast, seed: int, rank: int = 0, world: int = 1) -> Windows:
    """The training text in windows.

    Stored, it is tokenised once, into files that processes share, and drawn without replacement, epoch by epoch, in
    orders that `seed >= 0` and the epoch decide. Processes may call this at once: the first one works, the others wait.

    A stream is read in its own order, again and again; the seed has no say. Every rank reads and tokenises all of it.

    Raises: `BadInput` for text that cannot be read, has no such column or is too short; the part held out as well.
    """
    if data.stream:
        for source, what, least in zip(_sources(data), PARTS, _least(data.window), strict=True):
            _check_length(len(_first_tokens(source, tokenizer, least)), least, what, data.window)
        return Streamed(data, tokenizer, rank, world)
    tokens, _ = _stored_parts(data, tokenizer)
    return Stored(tokens, data.window, seed, rank, world)


def held_out(data: Data, tokenizer: PreTrainedTokenizerFast, count: int, part: Literal["choice", "test"]) -> Tensor:
    """At most `count` windows of text that is not trained on: `(n, window + 1)` int64.

    On "choice" thresholds, routers and all else is chosen, on "test" nothing ever is. The text held out is cut into
    rows that share no token, of which each part has every other one, whatever `count` is. Of a stream, the first
    `2·count` rows are taken; of stored text, rows spread evenly over all of it.

    Without `validation`, the text held out is the last tenth of all tokens, of a stream every tenth document.
    """
    size = data.window + 1
    if data.stream:
        _, source = _sources(data)
        tokens = Tokens([_first_tokens(source, tokenizer, 2 * count * size)])
    else:
        _, tokens = _stored_parts(data, tokenizer)
    there = range({"choice": 0, "test": 1}[part], len(tokens) // size, 2)
    chosen = min(count, len(there))
    rows = [tokens.read(there[i * len(there) // chosen] * size, size) for i in range(chosen)]
    return torch.from_numpy(np.stack(rows))


@final
class Stored(Windows):
    """Windows of tokens that are all there."""

    def __init__(self, tokens: "Tokens", window: int, seed: int, rank: int, world: int) -> None:
        self.tokens, self.window, self.seed, self.rank, self.world = tokens, window, seed, rank, world
        self.rows = (len(tokens) - 1) // window
        self.taken = 0
        self._drawn: tuple[int, np.ndarray] = -1, np.empty(0)

    def batch(self, count: int) -> Tensor:
        first = self.taken + self.rank * count
        self.taken += self.world * count
        rows = [self.tokens.read(self._place(i) * self.window, self.window + 1) for i in range(first, first + count)]
        return torch.from_numpy(np.stack(rows))

    def _place(self, i: int) -> int:
        epoch, i = divmod(i, self.rows)
        if self._drawn[0] != epoch:
            self._drawn = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return int(self._drawn[1][i])

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "tokens": len(self.tokens)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_kind(state, self.state_dict())
        if state["tokens"] != len(self.tokens):
            raise BadInput(
                f"the text to train on has changed: it had {state['tokens']:,} tokens, now it has {len(self.tokens):,}"
            )
        self.taken = state["taken"]


@final
class Streamed(Windows):
    """Windows of a stream. Its state is that before the newest block, so that the block can be read again."""

    _blocks: "_Blocks"
    _at: int

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerFast, rank: int, world: int) -> None:
        self.data, self.tokenizer, self.rank, self.world = data, tokenizer, rank, world
        self._go_to({"blocks": None, "rest": [], "at": 0})

    def batch(self, count: int) -> Tensor:
        rows = [self._row() for _ in range(self.world * count)]
        return torch.from_numpy(np.stack(rows[self.rank * count :][:count]).astype(np.int64))

    def _row(self) -> np.ndarray:
        while len(self._tokens) - self._at <= self.data.window:
            self._read(self._blocks.state_dict(), self._tokens[self._at :])
            self._at = 0
        row = self._tokens[self._at : self._at + self.data.window + 1]
        self._at += self.data.window
        return row

    def _read(self, before: dict[str, Any] | None, rest: np.ndarray) -> None:
        self._before = {"blocks": before, "rest": rest.tolist()}
        self._tokens = np.concatenate([rest, _encode(self.tokenizer, self._blocks.forever())])

    def _go_to(self, state: dict[str, Any]) -> None:
        source, _ = _sources(self.data)
        self._blocks = _Blocks(source, state["blocks"])
        self._read(state["blocks"], np.array(state["rest"], np.int32))
        self._at = state["at"]

    def state_dict(self) -> dict[str, Any]:
        return self._before | {"at": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_kind(state, self.state_dict())
        self._go_to(state)


@final
class Tokens:
    """Tokens on disk, or anywhere, as one sequence that no one copies: `part` is one of a range of it."""

    def __init__(self, chunks: list[np.ndarray], start: int = 0, stop: int | None = None) -> None:
        self.chunks, self.start = chunks, start
        self.ends = np.cumsum([len(chunk) for chunk in chunks])
        self.stop = int(self.ends[-1]) if stop is None else stop

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "Tokens":
        """Those from `start` to `stop`."""
        return Tokens(self.chunks, self.start + start, self.start + stop)

    def read(self, at: int, count: int) -> np.ndarray:
        """`count` tokens from `at` on, int64."""
        at += self.start
        row = np.empty(count, np.int64)
        done, chunk = 0, int(np.searchsorted(self.ends, at, side="right"))
        while done < count:
            begin = int(self.ends[chunk]) - len(self.chunks[chunk])
            some = self.chunks[chunk][at + done - begin :][: count - done]
            row[done : done + len(some)] = some
            done, chunk = done + len(some), chunk + 1
        return row


PARTS = "to train on", "held out"


class _Source(NamedTuple):
    """Where documents come from: `files`, or the hub. `takes` says of the number of a document whether it counts."""

    name: str
    files: tuple[str, ...]
    field: str
    split: str
    cache: str | None
    part: Literal["all", "to train on", "held out"] = "all"

    def takes(self, document: int) -> bool:
        return self.part == "all" or (document % TENTH == TENTH - 1) == (self.part == "held out")

    @property
    def loader(self) -> str:
        """What reads it: "text" is ours, "hub" any data set, the rest are those of `datasets`."""
        loaders = {LOADERS.get(_kind(file), "text") for file in self.files}
        if len(loaders) > 1:
            raise BadInput(f"expected files of one kind, got {' and '.join(sorted(loaders))}: {self.name}")
        return loaders.pop() if loaders else "hub"

    def open(self) -> IterableDataset:
        """The documents, or pieces of them, from the first one on."""
        files = list(self.files)
        if self.loader == "text":
            return IterableDataset.from_generator(_read_files, gen_kwargs={"paths": files, "field": self.field})
        path, _, name = self.name.partition(":")
        loads: dict[str, Any] = {"path": path, "name": name or None, "split": self.split}
        if files:
            loads = {"path": self.loader, "data_files": files, "split": "train"}
        try:
            return load_dataset(**loads, streaming=True, cache_dir=self.cache)
        except Exception as error:  # of a format, the network, a name, a split: each has its own
            says = (
                f"cannot read {self.name}"
                if files
                else f"{self.name} is no file, and the hub gives no data set of that name with split {self.split!r}"
            )
            raise BadInput(f"{says}: {_line(error)}") from error

    def key(self, tokenizer: PreTrainedTokenizerFast) -> str:
        """Changes with the text and with what its tokens are."""
        paths = self.files or sorted(map(str, Path(self.name).rglob("*")))  # of a folder; none of the hub
        stats = [(path, stat.st_size, stat.st_mtime_ns) for path in paths for stat in [Path(path).stat()]]
        model = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        known = [1, self.name, stats, self.field, self.split, model, tokenizer.eos_token_id, PIECE]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


def _sources(data: Data) -> tuple[_Source, _Source]:
    """What to train on and what is held out; the same twice if a part of it is to be cut off."""
    if data.source == "stdlib":
        both = [_Source("stdlib", tuple(map(str, paths)), data.field, "", data.cache) for paths in stdlib_files()]
        train, held = both
        if not train.files or not held.files:
            raise BadInput("this Python has no library sources to train on; give data.source a text of your own")
    else:
        train = held = _source(data, data.source, data.split)
        if data.stream and data.validation is None:
            train, held = train._replace(part="to train on"), train._replace(part="held out")
    if data.validation is not None:
        on_hub = not train.files and not _files(data.validation)
        held = _source(data, data.source if on_hub else data.validation, data.validation)
    return train, held


def _source(data: Data, text: str, split: str) -> _Source:
    files = _files(text)
    if not files and (_kind(text) in {".txt", *LOADERS} or not (HUB_NAME.fullmatch(text) or Path(text).is_dir())):
        raise BadInput(f"there is no file {text}")
    return _Source(text, files, data.field, "" if files else split, data.cache)


def _files(text: str) -> tuple[str, ...]:
    """The files that a list with commas, or patterns, stands for; none if it stands for no file."""
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        paths = [part] if Path(part).is_file() else sorted(filter(lambda p: Path(p).is_file(), glob.glob(part)))
        if not paths and "," in text:
            raise BadInput(f"there is no file {part}")
        found += paths
    return tuple(found)


def _kind(file: str) -> str:
    path = Path(file)
    return Path(path.stem).suffix if path.suffix in OPEN else path.suffix


def _read_files(paths: list[str], field: str) -> Iterator[dict[str, Any]]:
    """Text files, each a document, in pieces."""
    for path in paths:
        rest = ""
        try:
            with OPEN.get(Path(path).suffix, open)(path, "rt", encoding="utf-8", newline="") as file:
                while more := file.read(PIECE):
                    _check_text(path, more)
                    *pieces, rest = _pieces(rest + more)
                    yield from ({field: piece, "ends": False} for piece in pieces)
        except UnicodeDecodeError as error:
            raise BadInput(f"{path} is not text: {error.reason} in its UTF-8") from None
        except UNREADABLE as error:
            raise BadInput(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        yield {field: rest, "ends": True}


def _check_text(path: str, text: str) -> None:
    strange = len(text) - len(text.translate(dict.fromkeys(CONTROL)))
    if strange > len(text) // 1000:
        raise BadInput(f"{path} is not text: {strange:,} of {len(text):,} letters are control characters")


def _pieces(text: str) -> Iterator[str]:
    """Cut before white space where there is some, as tokenizers do; always at least one piece."""
    start = 0
    while len(text) - start > PIECE:
        stop = max(text.rfind(space, start + 1, start + PIECE) for space in " \n")
        stop = stop if stop > 0 else start + PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]


def _rows(source: _Source, dataset: IterableDataset) -> Iterator[Piece]:
    """What a data set says, in its order; empty documents are none."""
    rows = iter(dataset)
    while (row := _next(source, rows)) is not None:
        if source.field not in row:
            raise BadInput(f"{source.name} has no column {source.field!r}, it has {', '.join(sorted(row))}")
        text = row[source.field]
        if not isinstance(text, str | None):
            raise BadInput(f"expected text in the column {source.field!r} of {source.name}, got {type(text).__name__}")
        if text:
            yield text, row["ends"] if source.loader == "text" else True


def _next(source: _Source, rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return next(rows, None)
    except BadInput:
        raise
    except Exception as error:  # each format has its own
        raise BadInput(f"cannot read {source.name}: {_line(error)}") from error


@final
class _Blocks:
    """The documents of a source, some at a time, again and again. It can go on before any block."""

    def __init__(self, source: _Source, state: dict[str, Any] | None = None) -> None:
        self.source = source
        self._begin(state or {"documents": 0, "dataset": None})

    def _begin(self, state: dict[str, Any]) -> None:
        self._documents, self._dataset = state["documents"], self.source.open()
        if state["dataset"] is not None:
            self._dataset.load_state_dict(state["dataset"])
        self._rows = _rows(self.source, self._dataset)

    def state_dict(self) -> dict[str, Any]:
        return {"documents": self._documents, "dataset": self._dataset.state_dict()}

    def once(self) -> list[Piece]:
        """The next block, empty after the last one."""
        block: list[Piece] = []
        size = 0
        for text, ends in self._rows:
            if self.source.takes(self._documents):
                block.append((text, ends))
                size += len(text)
            self._documents += ends
            if size >= BLOCK:
                break
        return block

    def forever(self) -> list[Piece]:
        """The next block, the first one after the last."""
        if block := self.once():
            return block
        self._begin({"documents": 0, "dataset": None})
        return self.once()


def _encode(tokenizer: PreTrainedTokenizerFast, block: list[Piece]) -> np.ndarray:
    """The tokens of a block, int32: `(n,)`."""
    pieces: list[str] = []
    last: set[int] = set()
    for text, ends in block:
        pieces += _pieces(text)
        last |= {len(pieces) - 1} if ends else set()
    if not pieces:
        return np.empty(0, np.int32)
    ids = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    return np.concatenate([np.array(each + end * (i in last), np.int32) for i, each in enumerate(ids)])


def _first_tokens(source: _Source, tokenizer: PreTrainedTokenizerFast, count: int) -> np.ndarray:
    """The first `count` tokens of one pass, or all that there are."""
    blocks = _Blocks(source)
    tokens = np.empty(0, np.int32)
    while len(tokens) < count and (block := blocks.once()):
        tokens = np.concatenate([tokens, _encode(tokenizer, block)])
    return tokens[:count]


def _stored(source: _Source, tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """All tokens of a source, from the cache if they are there: a file that is written under a lock, whole or not."""

    def rows() -> Iterator[dict[str, np.ndarray]]:
        blocks = _Blocks(source)
        block = blocks.once()
        if not block:
            raise BadInput(f"there is no text in {source.name}")
        while block:
            ids = _encode(tokenizer, block)
            yield from ({"ids": ids[at : at + BLOCK]} for at in range(0, len(ids), BLOCK))
            block = blocks.once()

    features = Features({"ids": List(Value("uint16" if len(tokenizer) <= 1 << 16 else "int32"))})
    key = source.key(tokenizer)
    try:
        with _quiet():
            dataset = Dataset.from_generator(
                rows, features=features, cache_dir=source.cache, fingerprint=key, writer_batch_size=16
            )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, BadInput):
            raise error.__cause__ from None
        raise
    return Tokens([chunk.flatten().to_numpy() for chunk in dataset.data.column("ids").chunks])


def _stored_parts(data: Data, tokenizer: PreTrainedTokenizerFast) -> tuple[Tokens, Tokens]:
    """The tokens to train on and those held out."""
    train, held = _sources(data)
    if train != held:
        parts = _stored(train, tokenizer), _stored(held, tokenizer)
        for tokens, what, least in zip(parts, PARTS, _least(data.window), strict=True):
            _check_length(len(tokens), least, what, data.window)
        return parts
    whole = _stored(train, tokenizer)
    if len(whole) < (least := TENTH * 2 * (data.window + 1)):
        raise BadInput(
            f"the text is too short: {len(whole):,} tokens, expected at least {least:,}, so that the tenth held out "
            f"fills two windows of {data.window} tokens"
        )
    cut = len(whole) - len(whole) // TENTH
    return whole.part(0, cut), whole.part(cut, len(whole))


def _least(window: int) -> tuple[int, int]:
    return 2 * window + 1, 2 * (window + 1)  # rows held out share no token


def _check_length(length: int, least: int, what: str, window: int) -> None:
    if length < least:
        raise BadInput(
            f"the text {what} is too short: {length:,} tokens, expected at least {least:,} for two windows of {window} "
            "tokens"
        )


def _check_kind(state: dict[str, Any], own: dict[str, Any]) -> None:
    if state.keys() != own.keys():
        raise BadInput("the checkpoint is of a run with the other data.stream: expected the same as there")


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar, unless datasets' log is wanted as well."""
    shown = datasets.is_progress_bar_enabled() and datasets.logging.get_verbosity() > datasets.logging.INFO
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _line(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
