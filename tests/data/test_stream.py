"""Text of any origin becomes one stream of tokens."""

import json

import pandas as pd
import pytest

from sinkbench.config import Source
from sinkbench.data.stream import read_stream
from sinkbench.errors import UserError


class Letters:
    """A tokenizer that gives each character its code, with a first token of its own."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [1, *map(ord, text)]}


def text_of(stream):
    return "".join(map(chr, stream.tokens.tolist()[1:]))


ROWS = ["In the beginning", "was the word", "and so on"]


@pytest.fixture
def files(tmp_path):
    frame = pd.DataFrame({"text": ROWS, "other": ["x", "y", "z"]})
    frame.to_parquet(tmp_path / "rows.parquet")
    frame.to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    (tmp_path / "rows.txt").write_text("\n".join(ROWS))
    return tmp_path


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv", "rows.jsonl"])
def test_local_files_answer_to_any_split_and_rows_join_into_one_stream(files, name):
    one = read_stream(Source(str(files / name), split="validation"), None, Letters)
    assert text_of(one) == ROWS[0]
    two = read_stream(Source(str(files / name), samples=2), None, Letters)
    assert text_of(two) == ROWS[0] + "\n" + ROWS[1]
    assert two.exhausted


def test_a_text_file_is_one_text(files):
    assert text_of(read_stream(Source(str(files / "rows.txt")), None, Letters)) == "\n".join(ROWS)


def test_a_folder_answers_to_its_only_split_and_names_them_where_there_are_more(files, tmp_path):
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    (files / "rows.parquet").rename(folder / "data" / "train.parquet")
    assert text_of(read_stream(Source(str(folder)), None, Letters)) == ROWS[0]
    pd.DataFrame({"text": ["tested"]}).to_parquet(folder / "data" / "test.parquet")
    assert text_of(read_stream(Source(str(folder)), None, Letters)) == "tested"
    with pytest.raises(UserError, match="train"):
        read_stream(Source(str(folder), split="dev"), None, Letters)


def test_no_more_is_read_than_needed_and_what_is_read_does_not_depend_on_it(files):
    (files / "long.txt").write_text("abcdefghij" * 5000)
    short = read_stream(Source(str(files / "long.txt")), 50, Letters)
    whole = read_stream(Source(str(files / "long.txt")), None, Letters)
    assert len(short.tokens) == 50
    assert not short.exhausted
    assert short.tokens.tolist() == whole.tokens.tolist()[:50]
    assert len(whole.tokens) == 50_001


def test_lists_of_integers_need_no_tokenizer(files):
    (files / "ids.jsonl").write_text('{"ids": [3, 1, 4]}\n{"ids": [1, 5]}\n')

    def never():
        raise AssertionError("no tokenizer is needed")

    stream = read_stream(Source(str(files / "ids.jsonl"), column="ids", samples=2), 100, never)
    assert stream.tokens.tolist() == [3, 1, 4, 1, 5]
    assert stream.exhausted


def test_other_columns_are_refused_and_the_ones_there_are_named(files):
    with pytest.raises(UserError, match="other, text"):
        read_stream(Source(str(files / "rows.csv"), column="words"), 10, Letters)
    (files / "numbers.jsonl").write_text('{"n": 1.5}\n')
    with pytest.raises(UserError, match="lists of integers"):
        read_stream(Source(str(files / "numbers.jsonl"), column="n"), 10, Letters)
