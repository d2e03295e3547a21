"""What a report shows of losses: by recall distance and by budget, in tables and figures."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sinkbench.results.report.collect import collect
from sinkbench.results.report.sections import report
from sinkbench.results.report.writing import write_report

RESULTS = Path(__file__).parents[3] / "results"
TITLES = ("Loss by recall distance", "Loss and cache")


@pytest.fixture(scope="module")
def section():
    return report("r", collect([RESULTS / "smollm2_135m_cpu"])).sections[0]


def of(section, heading):
    return next(figure for figure in section.figures if figure.heading == heading)


def test_a_table_says_what_is_lost_within_and_beyond_the_window(section):
    table = next(table for title, table in section.measured if title == "Loss by recall distance (nats)")
    row = next(row for row in table.rows if row[0].text == "attention_sinks")
    cells = {column.heading: cell.text for column, cell in zip(table.columns, row, strict=True)}
    assert cells["Seen beyond the window"] == "+0.1444"
    assert cells["… % of loss"] == "47.6"
    assert "tokens 1,025 to 8,192" in table.notes[0]
    assert row[0].colour


def test_the_figure_by_distance_has_a_line_a_run_with_its_intervals_and_marks_the_window(section):
    figure = json.loads(of(section, TITLES[0]).json)
    named = [trace["name"] for trace in figure["data"] if trace.get("showlegend") is not False]
    assert named == ["windowed", "attention_sinks", "attention_sinks-text", "context_shift", "pyramid"]
    assert sum(trace.get("fill") == "toself" for trace in figure["data"]) == 5
    (shape,) = figure["layout"]["shapes"]
    assert shape["x0"] == shape["x1"] == 10  # 2^10 tokens
    line = next(trace for trace in figure["data"] if trace.get("name") == "attention_sinks")
    assert "1,024 to 2,047 tokens back" in line["text"]
    assert line["text"][-1] == "never seen before"


def test_the_figure_of_the_frontier_has_it_below_all_else(section):
    figure = json.loads(of(section, TITLES[1]).json)
    first, *others = figure["data"]
    assert first["name"] == "frontier"
    assert len(first["x"]) == 2
    assert [trace["name"] for trace in others][:2] == ["transformers", "windowed"]
    assert figure["layout"]["xaxis"]["type"] == "log"


def test_files_without_tokens_or_bytes_are_reported_as_far_as_they_go(tmp_path):
    for name in ("transformers", "windowed"):
        frame = pd.read_csv(RESULTS / "smollm2_135m_cpu" / f"{name}.csv")
        frame.drop(columns=["token", "kv_cache_bytes"]).to_csv(tmp_path / f"{name}.csv", index=False)
    write_report([tmp_path])
    text = (tmp_path / "report.md").read_text()
    assert "### Over the same tokens" in text
    assert not any(title in text for title in ("Loss by recall distance", "Cost and loss"))


def test_a_run_that_overflows_does_not_spoil_the_page(tmp_path):
    for name in ("transformers", "windowed"):
        frame = pd.read_csv(RESULTS / "smollm2_135m_cpu" / f"{name}.csv")
        if name == "windowed":
            frame.loc[2000:, ["nll", "ppl", "overall_ppl"]] = np.nan
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    write_report([tmp_path])
    assert "Loss by recall distance" in (tmp_path / "report.html").read_text()
