"""Rows become streams of their own; the source of Python's standard library is a text on every machine."""

import platform
import sysconfig
from pathlib import Path

import pandas as pd
import pytest

from sinkbench.config import Source
from sinkbench.data.stream import read_stream, read_streams
from sinkbench.errors import UserError
from sinkbench.models import embedded


class Letters:
    """A tokenizer that gives each character its code, with a first token of its own."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [1, *map(ord, text)]}


class Bare:
    """One that begins with nothing."""

    def __call__(self, text, verbose=True):
        return {"input_ids": list(map(ord, text))}


ROWS = ["In the beginning", "", "x", None, "was the word " * 400, "and so on"]


@pytest.fixture
def rows(tmp_path):
    pd.DataFrame({"text": ROWS}).to_parquet(tmp_path / "rows.parquet")
    return Source(str(tmp_path / "rows.parquet"), samples=None, documents=True)


def texts(streams):
    return ["".join(map(chr, tokens.tolist())) for tokens in streams.tokens]


def test_each_row_is_tokenised_by_itself_and_cut(rows):
    streams = read_streams(rows, 40, Bare)
    assert texts(streams) == ["In the beginning", ("was the word " * 4)[:40], "and so on"]
    assert (streams.skipped, streams.predictions) == (3, 15 + 39 + 8)
    assert all(tokens[0] == 1 for tokens in read_streams(rows, 40, Letters).tokens)


def test_samples_are_rows_those_that_are_left_out_among_them(rows):
    streams = read_streams(Source(rows.name, samples=3, documents=True), 40, Bare)
    assert (texts(streams), streams.skipped) == (["In the beginning"], 2)


def test_without_documents_rows_are_one_stream_as_ever(rows):
    streams = read_streams(Source(rows.name, samples=1), 10, Bare)
    assert texts(streams) == ["In the beg"]


def test_none_that_is_long_enough_is_said_in_one_line(rows):
    with pytest.raises(UserError, match=r"none of the 3 rows of .* has 2 tokens"):
        read_streams(Source(rows.name, samples=3, documents=True), 40, lambda: lambda text, verbose: {"input_ids": [7]})


def test_the_library_is_read_a_file_a_document_by_path_without_its_tests():
    streams = read_streams(Source("stdlib", samples=3, documents=True), 10**9, Bare)
    files = embedded.source_files()
    names = [name for name, _ in files]
    assert names == sorted(names)
    assert {"abc.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))
    assert texts(streams)[0] == next(text for _, text in files if len(text) > 1)
    assert Path(sysconfig.get_paths()["stdlib"], "abc.py").read_text() == dict(files)["abc.py"]


def test_which_library_it_is_is_part_of_what_is_known_of_it(monkeypatch):
    one = read_stream(Source("stdlib"), 2000, Bare)
    assert one.revision == embedded.revision_of(embedded.source_files())
    assert one.revision.startswith(f"Python {platform.python_version()} sha256:")
    changed = [("a.py", "x = 1\n")], [("a.py", "x = 2\n")], [("b.py", "x = 1\n")], [("a.py", ""), ("b.py", "x = 1\n")]
    assert len({embedded.revision_of(files) for files in changed}) == len(changed)


def test_as_one_stream_its_files_are_joined_whatever_the_number_of_samples():
    files = [text for _, text in embedded.source_files()]
    one = read_stream(Source("stdlib", samples=1), 100_000, Bare)
    assert "".join(map(chr, one.tokens.tolist())) == "\n".join(files[:60])[:100_000]


def test_paths_can_be_read_too():
    one = read_streams(Source("stdlib", column="path", samples=2, documents=True), 100, Bare)
    assert texts(one) == [name for name, _ in embedded.source_files()[:2]]


def test_a_python_without_its_source_says_so_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="none in"):
        read_stream(Source("stdlib"), 10, Bare)
