"""A measure is declared once: files, readers, figures, reports and comparisons follow."""

import json

import numpy as np
import pandas as pd
import pytest

from sinkbench.cli import main
from sinkbench.engines.step import Steps
from sinkbench.errors import UserError
from sinkbench.results import figures
from sinkbench.results.columns import (
    BASE_COLUMNS,
    MEASURES,
    SEED_COLUMNS,
    ComparedAs,
    Drawing,
    Measure,
    features,
    features_of,
    known_columns,
    measured_by,
    row_columns,
)
from sinkbench.results.reading import read_csv, read_run
from sinkbench.results.report.collect import collect
from sinkbench.results.report.sections import report
from sinkbench.runs.writer import RowWriter

KL = Measure(
    "distance",
    "Divergence",
    "Kullback-Leibler divergence from the reference",
    (("nats", 1.0), ("mnats", 1000.0)),
    "lower",
    reference=True,
    drawing=Drawing("divergence", "Divergence from the reference", "-.", missing="give --reference"),
    compared=ComparedAs.DISTRIBUTION,
)
SAME_TOP = Measure("agrees", "Same top token", "Of all tokens", better="higher", compared=ComparedAs.SHARE)


@pytest.fixture
def declared(monkeypatch):
    for measure in (KL, SAME_TOP):
        monkeypatch.setitem(MEASURES, measure.column, measure)


def test_the_columns_of_a_file_are_those_of_the_seed_and_then_our_own():
    assert SEED_COLUMNS == ("input_length", "nll", "ppl", "overall_ppl", "cuda_vram_allocated", "latency")
    assert row_columns() == (*SEED_COLUMNS, "kv_cache_bytes", "token")
    assert known_columns()[:8] == BASE_COLUMNS
    assert measured_by("generate") == ("fresh_nll", "repetition", "non_word")
    assert measured_by("run") == ()


def test_features_keep_their_names():
    assert features_of("run") == ["perplexity", "vram", "latency", "kv_cache", "kl"]
    assert features_of("generate") == ["fluency", "repetition", "non_word"]
    columns = {name: measure.column for name, measure in features().items()}
    assert columns["perplexity"] == "overall_ppl"
    assert columns["vram"] == "cuda_vram_allocated"
    assert columns["fluency"] == "fresh_nll"


def test_every_measure_says_what_it_is():
    for column, measure in MEASURES.items():
        assert measure.column == column
        assert measure.label and measure.sentence and not measure.sentence.endswith(".")
        assert measure.better in ("", "lower", "higher")
        if measure.drawing and measure.drawing.substitute:
            assert MEASURES[measure.drawing.substitute[0]].drawing


def test_a_column_that_no_measure_declares_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="no measure is declared for distance"):
        RowWriter(tmp_path / "a.csv", more=("distance",))
    assert list(tmp_path.iterdir()) == []


def test_further_columns_are_written_behind_the_others_in_the_declared_order_with_a_value_a_row(declared, tmp_path):
    path = tmp_path / "windowed.csv"
    steps = Steps(1, [1.0, 2.0, 3.0], None, None, [10, 20, 30])
    with RowWriter(path, more=("agrees", "distance")) as writer:
        writer.write(steps, [5, 6, 7], {"agrees": [True, False, 1], "distance": [0.25, None, np.float64(0.5)]})
        writer.write(steps, [5, 6, 7], {"distance": [1, 2, 3]})
        writer.write(Steps(7, [1.0], None, None, [40]), [8], (0.125, 1))
    header, *rows = path.read_text().splitlines()
    assert header == ",".join((*BASE_COLUMNS, "distance", "agrees"))
    assert [row.split(",")[-2:] for row in rows] == [
        *(["0.25", "1"], ["", "0"], ["0.5", "1"]),
        *(["1", ""], ["2", ""], ["3", ""]),
        ["0.125", "1"],
    ]
    frame = read_csv(path)
    assert frame["distance"].tolist()[3:] == [1.0, 2.0, 3.0, 0.125]
    assert frame["fresh_nll"].isna().all()


def test_values_that_do_not_fit_are_refused_and_nothing_is_written(declared, tmp_path):
    steps = Steps(1, [1.0, 2.0], None, None, [10, 20])
    with RowWriter(tmp_path / "a.csv", more=("distance",)) as writer:
        with pytest.raises(ValueError, match="no column agrees"):
            writer.write(steps, [5, 6], {"agrees": [1, 1]})
        with pytest.raises(ValueError, match=r"shorter|longer"):
            writer.write(steps, [5, 6], {"distance": [1.0]})
        assert writer.rows == 0


def run_with_measures(folder, name, divergence, agreement, n=600):
    rng = np.random.default_rng(len(name))
    frame = pd.DataFrame({"input_length": np.arange(1, n + 1), "nll": 2 + rng.normal(0, 0.1, n), "ppl": 7.0})
    frame["overall_ppl"] = np.exp(frame["nll"].expanding().mean())
    frame = frame.assign(cuda_vram_allocated=np.nan, latency=np.nan, kv_cache_bytes=1024, token=np.arange(n) % 7)
    frame.assign(
        distance=divergence * rng.uniform(0.5, 1.5, n), agrees=(rng.uniform(size=n) < agreement).astype(int)
    ).to_csv(folder / f"{name}.csv", index=False)


@pytest.fixture
def folder(tmp_path):
    run_with_measures(tmp_path, "transformers", 0.0, 1.0)
    run_with_measures(tmp_path, "windowed", 0.4, 0.5)
    return tmp_path


def test_readers_take_a_column_that_is_declared_and_leave_others(folder, monkeypatch):
    assert "distance" not in read_csv(folder / "windowed.csv")
    monkeypatch.setitem(MEASURES, "distance", KL)
    assert read_run(folder / "windowed.csv").frame["distance"].mean() == pytest.approx(0.4, abs=0.05)


def test_plot_draws_it_by_its_feature(declared, folder):
    main(["plot", "--features", "divergence", "--output-dir", str(folder), "--output", str(folder / "a.svg")])
    frame = read_csv(folder / "windowed.csv")
    (ax,) = figures.draw({"windowed": frame}, ["divergence"]).axes
    assert ax.get_ylabel() == "Divergence (mnats), lower is better"
    assert ax.lines[0].get_ydata().mean() == pytest.approx(400, abs=50)
    with pytest.raises(UserError, match="no run has Divergence: give --reference"):
        figures.draw({"windowed": frame.assign(distance=np.nan)}, ["divergence"])


def test_a_report_draws_it_and_gives_its_statistics(declared, folder):
    (section,) = report("title", collect([folder])).sections
    (figure,) = [figure for figure in section.figures if figure.heading == KL.drawing.heading]
    assert json.loads(figure.json)["layout"]["yaxis"]["title"]["text"] == "divergence (mnats)"
    assert figure.note == "Kullback-Leibler divergence from the reference; lower is better."
    titles = dict(section.measured)
    assert [column.heading for column in titles["Divergence (mnats)"].columns] == [
        *("Run", "Mean", "Median", "90 %", "99 %", "99.9 %", "Largest")
    ]
    dense, windowed = titles["Same top token (%)"].rows
    assert (dense[1].text, windowed[0].text) == ("100", "windowed")
    assert float(windowed[1].text) == pytest.approx(50, abs=7)


def test_compare_shows_it_as_it_says(declared, folder, here):
    status, out, _ = here("compare", folder)
    assert status == 0
    assert "Divergence (mnats), lower is better" in out
    assert all(name in out for name in ("median", "99.9 %", "largest"))
    assert "Same top token (%), higher is better" in out


def test_without_measures_to_compare_compare_shows_its_table_only(folder, here):
    assert "Divergence" not in here("compare", folder)[1]
