"""The flagship's text: tokens, packing, order, resuming, what is held out, and what is refused."""

import gzip
import json
import lzma
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from examples.adaponderlm import text
from examples.adaponderlm.config import BadInput, Data

TOKENIZER = text.byte_tokenizer()
END = 256
DOCUMENTS = [f"{i}: " + f"α{i} β\n" * (i % 5) for i in range(40)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and blocks of a few letters, so that small texts have many; and no network."""
    monkeypatch.setattr(text, "PIECE", 16)
    monkeypatch.setattr(text, "BLOCK", 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def write(path: Path, documents: list[str]) -> str:
    """As files of text, or one file of rows; what `Data.source` says of them."""
    rows = [{"n": i, "text": document} for i, document in enumerate(documents)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    match path.suffixes:
        case [".txt", *_]:
            path.mkdir()
            openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
            opener = openers.get(path.suffix, open)
            for i, document in enumerate(documents):
                with opener(path / f"{i:03}{path.suffixes[0]}{''.join(path.suffixes[1:])}", "wb") as file:
                    file.write(document.encode())
            return f"{path}/*"
        case [".jsonl"]:
            path.write_bytes(lines)
        case [".jsonl", ".gz"]:
            path.write_bytes(gzip.compress(lines))
        case [".parquet"]:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
        case _:
            raise AssertionError(path)
    return str(path)


KINDS = ["a.txt", "a.txt.xz", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"]
# That all are read is seen of each; what is done with what was read, of text, rows and tables.
FEW = "a.txt.xz", "a.jsonl.gz", "a.parquet"
few = pytest.mark.parametrize(
    "data", [pytest.param(kind, marks=[] if kind in FEW else [pytest.mark.every]) for kind in KINDS], indirect=True
)


@pytest.fixture(params=KINDS)
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Data:
    source = write(tmp_path / request.param, DOCUMENTS)
    return Data(source, window=8, validation=write(tmp_path / "val.txt", ["xyz " * 20]), cache=str(tmp_path / "cache"))


def packed(documents: list[str]) -> list[int]:
    return [token for document in documents for token in [*document.encode(), END]]


def cut(tokens: list[int], window: int = 8) -> list[list[int]]:
    """The oracle: every row begins where the one before it ended."""
    return [tokens[at : at + window + 1] for at in range(0, len(tokens) - window, window)]


def batches(windows: text.Windows, count: int, size: int = 3) -> Tensor:
    return torch.cat([windows.batch(size) for _ in range(count)])


@pytest.mark.parametrize("stream", [False, True])
def test_an_epoch_has_every_row_of_the_packed_documents_once(data: Data, stream: bool) -> None:
    rows = cut(packed(DOCUMENTS))
    got = text.windows(replace(data, stream=stream), TOKENIZER, 0).batch(len(rows))
    assert got.dtype == torch.int64
    assert (got.tolist() == rows) if stream else (got.tolist() != rows and sorted(got.tolist()) == sorted(rows))
    predicted = sorted(token for row in got.tolist() for token in row[1:])
    assert predicted == sorted(packed(DOCUMENTS)[1 : 1 + 8 * len(rows)])  # each token but the first, once


@few
def test_epochs_differ_and_seeds_differ_and_are_repeatable(data: Data) -> None:
    rows = len(cut(packed(DOCUMENTS)))
    orders = []
    for seed in (0, 0, 1):
        windows = text.windows(data, TOKENIZER, seed)
        orders.append([windows.batch(rows).tolist() for _ in range(2)])
    assert orders[0] == orders[1] != orders[2]
    for epochs in orders:
        assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])


def test_a_stream_goes_on_from_its_end_to_its_beginning_without_losing_tokens(data: Data) -> None:
    rows = cut(packed(DOCUMENTS * 3))
    assert text.windows(replace(data, stream=True), TOKENIZER, 0).batch(len(rows)).tolist() == rows


@few
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_the_order_does_not_depend_on_the_number_of_ranks(data: Data, stream: bool, world: int) -> None:
    data = replace(data, stream=stream)
    expected = batches(text.windows(data, TOKENIZER, 0), 25, 6)  # more than an epoch
    ranks = [text.windows(data, TOKENIZER, 0, rank, world) for rank in range(world)]
    got = [torch.cat([rank.batch(6 // world) for rank in ranks]) for _ in range(25)]
    assert torch.equal(torch.cat(got), expected)
    assert all(rank.state_dict() == ranks[0].state_dict() for rank in ranks)


@few
@pytest.mark.parametrize("stream", [False, True])
def test_resuming_anywhere_is_exact_on_any_number_of_ranks(data: Data, stream: bool) -> None:
    data = replace(data, stream=stream)
    windows = text.windows(data, TOKENIZER, 0)
    rows, states = [], []
    for _ in range(140):  # more than an epoch
        states.append(json.dumps(windows.state_dict()))
        rows.append(windows.batch(1))
    assert len(rows) > len(cut(packed(DOCUMENTS))) + 10
    resumed = text.windows(data, TOKENIZER, 0), text.windows(data, TOKENIZER, 0, 1, 2)
    for i in range(0, len(rows) - 8, 3):  # several of each block
        for each in resumed:
            each.load_state_dict(json.loads(states[i]))
        assert torch.equal(batches(resumed[0], 8, 1), torch.cat(rows[i : i + 8]))
        assert torch.equal(batches(resumed[1], 2, 2), torch.cat([*rows[i + 2 : i + 4], *rows[i + 6 : i + 8]]))


@few
def test_a_resumed_state_is_the_state_of_who_was_never_ended(data: Data) -> None:
    windows = text.windows(replace(data, stream=True), TOKENIZER, 0)
    for _ in range(30):
        resumed = text.windows(replace(data, stream=True), TOKENIZER, 0)
        resumed.load_state_dict(windows.state_dict())
        assert torch.equal(resumed.batch(5), windows.batch(5))
        windows = resumed
    assert windows.batch(1).tolist() == cut(packed(DOCUMENTS * 9))[150:151]


def test_long_documents_are_cut_for_the_tokenizer_alone(tmp_path: Path) -> None:
    long = ["no_space" * 60, "one two\nthree  four " * 60]
    for kind in ("a.txt", "a.jsonl"):
        data = Data(write(tmp_path / kind, long), window=8, validation=write(tmp_path / f"{kind[2:]}-v.txt", long))
        data = replace(data, cache=str(tmp_path))
        rows = cut(packed(long))
        assert sorted(text.windows(data, TOKENIZER, 0).batch(len(rows)).tolist()) == sorted(rows)
        assert text.windows(replace(data, stream=True), TOKENIZER, 0).batch(len(rows)).tolist() == rows
    pieces = list(text._pieces(long[1]))
    assert "".join(pieces) == long[1] and max(map(len, pieces)) <= 16 and all(p[0] in " \n" for p in pieces[1:])


def test_without_validation_the_last_tenth_of_the_tokens_is_held_out(data: Data) -> None:
    data = replace(data, validation=None)
    tokens = packed(DOCUMENTS)
    at = len(tokens) - len(tokens) // 10
    rows = cut(tokens[:at])
    assert sorted(text.windows(data, TOKENIZER, 0).batch(len(rows)).tolist()) == sorted(rows)
    held = [text.held_out(data, TOKENIZER, 100, part).tolist() for part in ("choice", "test")]
    slots = [tokens[i : i + 9] for i in range(at, len(tokens) - 8, 9)]
    assert held == [slots[::2], slots[1::2]]


def test_of_a_stream_every_tenth_document_is_held_out(data: Data) -> None:
    data = replace(data, validation=None, stream=True)
    train = [document for i, document in enumerate(DOCUMENTS) if i % 10 != 9]
    rows = cut(packed(train * 2))
    windows = text.windows(data, TOKENIZER, 0)
    assert windows.batch(50).tolist() == rows[:50]
    resumed = text.windows(data, TOKENIZER, 0)
    resumed.load_state_dict(windows.state_dict())
    assert resumed.batch(len(rows) - 50).tolist() == rows[50:]
    tokens = packed(DOCUMENTS[9::10])
    slots = [tokens[i : i + 9] for i in range(0, len(tokens) - 8, 9)]
    assert text.held_out(data, TOKENIZER, 2, "choice").tolist() == slots[0:4:2]
    assert text.held_out(data, TOKENIZER, 2, "test").tolist() == slots[1:4:2]


@pytest.mark.parametrize("count", [1, 3, 4, 50])
def test_windows_held_out_are_spread_and_the_parts_share_no_token(tmp_path: Path, count: int) -> None:
    letters = "".join(chr(0x4E00 + i) for i in range(500))  # no three bytes twice
    data = Data(write(tmp_path / "a.txt", ["abc " * 20]), window=11, validation=write(tmp_path / "v.txt", [letters]))
    data = replace(data, cache=str(tmp_path))
    tokens = packed([letters])
    seen = {}
    for part in ("choice", "test"):
        rows = text.held_out(data, TOKENIZER, count, part).tolist()
        assert len(rows) == count
        seen[part] = [at for row in rows for at in range(len(tokens)) if tokens[at : at + 12] == row]
        assert len(seen[part]) == count
        gaps = {b - a for a, b in zip(seen[part], seen[part][1:], strict=False)}
        assert not gaps or (min(gaps) >= 24 and max(gaps) - min(gaps) <= 24)
    # rows of either part begin at multiples of 12, even or odd ones, whatever the count
    assert {at % 24 for at in seen["choice"]} == {0} and {at % 24 for at in seen["test"]} == {12}


def test_the_standard_library_holds_out_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, held = [tmp_path / "a.py", tmp_path / "b.py"], [tmp_path / "c.py"]
    for path in (*train, *held):
        path.write_text(f"{path.stem} = 1\n" * 20)
    monkeypatch.setattr(text, "stdlib_files", lambda: (train, held))
    for stream in (False, True):
        data = Data(window=8, cache=str(tmp_path / "cache"), stream=stream)
        rows = cut(packed([path.read_text() for path in train]))
        assert sorted(text.windows(data, TOKENIZER, 0).batch(len(rows)).tolist()) == sorted(rows)
        assert text.held_out(data, TOKENIZER, 1, "choice").tolist() == [packed([held[0].read_text()])[:9]]


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    data = replace(data, source=write(Path(data.cache or "").with_name("b.txt"), ["abc " * 20]))
    windows = text.windows(data, TOKENIZER, 0)
    first, state = windows.batch(4), windows.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(text, "_read_files", None)
        assert torch.equal(text.windows(data, TOKENIZER, 0).batch(4), first)
    Path(data.source.replace("*", "000.txt")).write_text("abcd " * 20)
    changed = text.windows(data, TOKENIZER, 0)
    assert not torch.equal(changed.batch(4), first)
    with pytest.raises(BadInput) as error:
        changed.load_state_dict(state)
    assert str(error.value) == "the text to train on has changed: it had 81 tokens, now it has 101"
    path = Path(data.source.replace("*", "000.txt"))
    path.write_text("edcba" * 20)  # of the same size
    os.utime(path, (0, 0))
    assert not set(text.windows(data, TOKENIZER, 0).batch(1)[0].tolist()) & {ord(" ")}


def test_a_folder_is_a_data_set_with_splits_and_its_tokens_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    for split, documents in (("train", DOCUMENTS), ("validation", ["held out " * 5])):
        write(tmp_path / "set" / f"{split}.parquet", documents)
    data = Data(str(tmp_path / "set"), validation="validation", window=8, cache=str(tmp_path / "cache"))
    rows = cut(packed(DOCUMENTS))
    got = text.windows(data, TOKENIZER, 0).batch(len(rows))
    assert sorted(got.tolist()) == sorted(rows)
    assert text.held_out(data, TOKENIZER, 1, "choice").tolist() == [packed(["held out "])[:9]]
    monkeypatch.setattr(text, "load_dataset", None)
    assert torch.equal(text.windows(data, TOKENIZER, 0).batch(len(rows)), got)


def prepare(data: Data, results: "multiprocessing.Queue[list[list[int]]]") -> None:
    results.put(text.windows(data, TOKENIZER, 0).batch(5).tolist())


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_processes_may_prepare_the_same_text_at_once(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", DOCUMENTS)
    data = Data(source, window=8, validation=source, cache=str(tmp_path / "cache"))
    context = multiprocessing.get_context("fork")  # they begin at once, with everything imported
    results = context.Queue()
    processes = [context.Process(target=prepare, args=(data, results)) for _ in range(2)]
    for process in processes:
        process.start()
    got = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert got[0] == got[1] == text.windows(data, TOKENIZER, 0).batch(5).tolist()


LETTERS = "".join(chr(i) for i in range(0x3000)) + "🙂\U0010ffff  a  'b\r\n\t <|endoftext|> <|endoftext|>"


def test_bytes_round_trip_and_are_their_own_ids(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    for tokenizer in (
        TOKENIZER,
        AutoTokenizer.from_pretrained(tmp_path),
        text.tokenizer_of(Data(tokenizer=str(tmp_path))),
    ):
        ids = tokenizer(LETTERS)["input_ids"]
        assert tokenizer.decode(ids) == LETTERS
        assert [*b"".join(bytes([i]) if i < END else b"<|endoftext|>" for i in ids)] == [*LETTERS.encode()]
        assert len(tokenizer) == 257 and tokenizer.eos_token_id == END and tokenizer.eos_token == "<|endoftext|>"
        assert tokenizer("aé", add_special_tokens=True)["input_ids"] == [97, 195, 169]


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(BadInput) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path, stream: bool) -> None:
    def says(source: str, **more: Any) -> str:
        data = Data(source, window=8, stream=stream, cache=str(tmp_path / "cache"), **more)
        return refused(lambda: text.windows(data, TOKENIZER, 0)).replace(str(tmp_path), "…")

    good = write(tmp_path / "good.jsonl", DOCUMENTS)
    files = {
        "empty.txt": b"",
        "latin.txt": "é".encode("latin-1") * 100,
        "binary.txt": b"\0\1\2" * 100,
        "not.txt.xz": b"no xz",
        "not.parquet": b"no parquet",
        "numbers.jsonl": b'{"text": 1}\n' * 99,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert says(f"{tmp_path}/none.txt") == "there is no file …/none.txt"
    assert says(f"{good},{tmp_path}/none.txt") == "there is no file …/none.txt"
    assert says(f"{tmp_path}/*.csv") == "there is no file …/*.csv"
    assert says(good, validation=f"{tmp_path}/none.txt") == "there is no file …/none.txt"
    assert says(f"{good},{tmp_path}/empty.txt") == (
        "expected files of one kind, got json and text: …/good.jsonl,…/empty.txt"
    )
    assert says(good, field="body", validation=good) == "…/good.jsonl has no column 'body', it has n, text"
    assert says(f"{tmp_path}/numbers.jsonl") == ("expected text in the column 'text' of …/numbers.jsonl, got int")
    assert says(f"{tmp_path}/latin.txt") == "…/latin.txt is not text: invalid continuation byte in its UTF-8"
    assert says(f"{tmp_path}/binary.txt") == "…/binary.txt is not text: 16 of 16 letters are control characters"
    assert says(f"{tmp_path}/not.txt.xz") == "cannot read …/not.txt.xz: Input format not supported by decoder"
    assert says(f"{tmp_path}/not.parquet").startswith("cannot read …/not.parquet: ")
    assert says("nobody/nothing") == (
        "nobody/nothing is no file, and the hub gives no data set of that name with split 'train': "
        "ConnectionError: Couldn't reach 'nobody/nothing' on the Hub (OfflineModeIsEnabled)"
    )
    assert says(f"{tmp_path}/empty.txt", validation=good) == (
        "the text to train on is too short: 0 tokens, expected at least 17 for two windows of 8 tokens"
        if stream
        else "there is no text in …/empty.txt"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_text_that_is_too_short_is_refused(tmp_path: Path, stream: bool) -> None:
    def says(train: int, held: int) -> str:
        sources = [write(tmp_path / f"{n}-{stream}-{i}.txt", ["a" * (n - 1)]) for i, n in enumerate((train, held))]
        data = Data(sources[0], validation=sources[1], window=8, stream=stream, cache=str(tmp_path / "cache"))
        return refused(lambda: text.windows(data, TOKENIZER, 0))

    expected = "the text {} is too short: {} tokens, expected at least {} for two windows of 8 tokens"
    assert says(16, 18) == expected.format("to train on", 16, 17)
    assert says(17, 17) == expected.format("held out", 17, 18)


def test_a_tenth_that_is_too_short_is_refused(tmp_path: Path) -> None:
    data = Data(write(tmp_path / "a.txt", ["a" * 178]), window=8, cache=str(tmp_path))
    assert refused(lambda: text.windows(data, TOKENIZER, 0)) == (
        "the text is too short: 179 tokens, expected at least 180, so that the tenth held out fills two windows of 8 "
        "tokens"
    )
    assert refused(lambda: text.windows(replace(data, stream=True), TOKENIZER, 0)) == (
        "the text held out is too short: 0 tokens, expected at least 18 for two windows of 8 tokens"
    )


def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    text.check_vocabulary(TOKENIZER, 257)
    assert refused(lambda: text.check_vocabulary(TOKENIZER, 256)) == (
        "expected a tokenizer of at most the 256 ids of the model, got 257"
    )
    assert refused(lambda: text.tokenizer_of(Data(tokenizer=str(tmp_path)))) == (
        f"there is no tokenizer in the folder {tmp_path}"
    )
    assert refused(lambda: text.tokenizer_of(Data(tokenizer="nobody/nothing"))) == (
        "nobody/nothing is no folder, and the hub gives no tokenizer of that name"
    )
    endless = text.byte_tokenizer()
    endless.eos_token = None
    endless.save_pretrained(tmp_path)
    assert refused(lambda: text.tokenizer_of(Data(tokenizer=str(tmp_path)))) == (
        f"expected a tokenizer of the tokenizers library with an end of text, {tmp_path} is none"
    )


@few
def test_a_state_of_the_other_kind_is_refused(data: Data) -> None:
    stored, stream = (text.windows(replace(data, stream=stream), TOKENIZER, 0) for stream in (False, True))
    assert refused(lambda: stored.load_state_dict(stream.state_dict())) == (
        "the checkpoint is of a run with the other data.stream: expected the same as there"
    )
    assert refused(lambda: stream.load_state_dict(stored.state_dict())) == (
        "the checkpoint is of a run with the other data.stream: expected the same as there"
    )
