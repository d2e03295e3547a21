"""Bytes become numbers, or the line of the first damage: wherever a file was cut, whoever reads it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbench.errors import UserError
from sinkbench.results.columns import BASE_COLUMNS, SEED_COLUMNS
from sinkbench.results.curves import thinned
from sinkbench.results.rows import Damage, complete_rows_in, header_of, parse, predictions_in
from sinkbench.runs.writer import complete_rows

HEADER = ",".join(BASE_COLUMNS)
ROW = "{i},2.5,12.18,12.18,,0.25,{i},7"


def text(rows, end="\n"):
    return "\n".join([HEADER, *(ROW.format(i=i) for i in range(1, rows + 1))]) + end


def test_rows_are_numbers_by_column_and_empty_cells_are_nan():
    rows = parse(text(3).encode(), BASE_COLUMNS)
    assert list(rows.frame) == list(BASE_COLUMNS)
    assert rows.frame["input_length"].tolist() == [1, 2, 3]
    assert rows.frame["cuda_vram_allocated"].isna().all()
    assert set(rows.frame.dtypes) == {np.dtype("float64")}


def test_numbers_are_those_that_were_written_to_the_last_bit():
    values = np.random.default_rng(0).normal(size=300) * 10.0 ** np.arange(-150, 150)
    data = "input_length,nll\n" + "".join(f"{i},{value!r}\n" for i, value in enumerate(values.tolist(), start=1))
    np.testing.assert_array_max_ulp(parse(data.encode(), ["nll"]).frame["nll"].to_numpy(), values, 1)


@given(st.integers(0, len(text(4))))
@settings(max_examples=200, deadline=None)
def test_wherever_a_file_is_cut_its_complete_rows_are_read_and_their_end_is_known(size):
    data = text(4).encode()[:size]
    complete = data.count(b"\n") - 1
    if complete < 0:
        assert header_of(data) == []
        return
    rows = parse(data, BASE_COLUMNS)
    assert len(rows) == complete
    assert rows.size == data.rfind(b"\n") + 1


@pytest.mark.parametrize("end", ["\n3,2.5\n", "\n\n\n", "\n \r\n", "\n3,2"])
def test_what_was_cut_and_ended_by_another_and_blank_lines_do_not_count(end, tmp_path):
    rows = parse(text(2, end).encode(), BASE_COLUMNS)
    assert len(rows) == 2
    assert rows.size == len(text(2))
    path = tmp_path / "a.csv"
    path.write_text(text(2, end))
    assert len(complete_rows(path, BASE_COLUMNS)) == 2


@pytest.mark.parametrize(
    ("damage", "line", "what"),
    [
        (lambda lines: [*lines[:2], "oops", *lines[3:]], 3, "has 1 value, not 8"),
        (lambda lines: [*lines[:2], "", *lines[3:]], 3, "has 1 value, not 8"),
        (lambda lines: [*lines[:4], lines[4] + ",9"], 5, "has 9 values, not 8"),
        (lambda lines: [*lines[:3], lines[3].replace("2.5", "2x"), *lines[4:]], 4, "has '2x' as its nll"),
        (lambda lines: [*lines[:3], lines[3].replace("2.5", "True"), *lines[4:]], 4, "has 'True' as its nll"),
        (lambda lines: [lines[0], *(line.replace("2.5", "True") for line in lines[1:])], 2, "has 'True' as its nll"),
        (lambda lines: [*lines[:2], lines[2][1:], *lines[3:]], 3, "has nothing as its input_length"),
        (lambda lines: [lines[0].replace("ppl", "nll", 1), *lines[1:]], 1, "has the column nll twice"),
    ],
)
def test_the_first_damage_is_named_with_its_line(damage, line, what, tmp_path):
    data = "\n".join([*damage(text(4).splitlines()), ""]).encode()
    with pytest.raises(Damage, match=what) as error:
        parse(data, BASE_COLUMNS)
    assert error.value.line == line
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"line \d is damaged|its columns are not") as shown:
        complete_rows(path, BASE_COLUMNS)
    assert "--overwrite" in str(shown.value) and "\n" not in str(shown.value)


def test_a_file_of_the_seeds_script_is_read_with_its_six_columns():
    data = ",".join(SEED_COLUMNS) + "\n1,800.0,inf,inf,12.5,0.1\n2,1.0,2.7,inf,12.5,0.1\n"
    rows = parse(data.encode(), BASE_COLUMNS)
    assert list(rows.frame) == list(SEED_COLUMNS)
    assert rows.frame["ppl"].tolist() == [np.inf, 2.7]


def test_complete_rows_are_counted_without_reading_them(tmp_path):
    path = tmp_path / "a.csv"
    assert complete_rows_in(path) == 0
    path.write_text(text(7, ""))
    assert complete_rows_in(path) == 6


@given(st.integers(0, 10**6), st.integers(1, 5000), st.sampled_from([10, 100, 4000]))
@settings(max_examples=50, deadline=None)
def test_a_thinned_curve_keeps_its_ends_and_extremes_and_no_more_points_than_asked(seed, n, points):
    x, y = np.arange(n), np.random.default_rng(seed).normal(size=n)
    kept, values = thinned(x, y, points)
    assert len(kept) <= max(n if n <= points else 0, points + 2)
    assert (kept[0], kept[-1]) == (0, n - 1)
    assert (np.diff(kept) > 0).all()
    assert (values.min(), values.max()) == (y.min(), y.max())
    assert (y[kept] == values).all()


def test_a_file_without_rows_predicts_nothing():
    assert predictions_in(parse(b"input_length,nll\n", ["input_length"]).frame) == 0
