"""Each row a stream of its own (``--documents``), and every so many-th row written (``--every``)."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from resuming import cut

from sinkbench.config import RunConfig
from sinkbench.engines.stepwise import Stepwise
from sinkbench.errors import UserError
from sinkbench.runs import run as runs
from sinkbench.runs.key import fingerprint
from sinkbench.sweeps.launchers import transfer

LENGTHS = (40, 1, 61, 0, 9, 33, 2)
SHORT = 2  # of them are too short to predict anything of
KEPT = [n for n in LENGTHS if n > 1]
WINDOW = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and a dataset of token ids, a document a row."""
    folder = tmp_path_factory.mktemp("documents")
    tiny.build("llama", **tiny.GROUPED).save_pretrained(folder)
    rows = [json.dumps({"ids": tiny.tokens(n, seed).tolist()}) for seed, n in enumerate(LENGTHS)]
    (folder / "docs.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def documents(place, tmp_path, here):
    """The command line over the documents, into a folder; what it wrote and its record, or what it said."""

    def call(*options, out="out", status=0):
        data = ("--dataset-name", place / "docs.jsonl", "--data-column", "ids", "--documents")
        fixed = ("--model-name-or-path", place, "--dtype", "float32", "--window-size", WINDOW)
        got, _, error = here("run", *fixed, *data, "--output-dir", tmp_path / out, *options)
        assert got == status, error
        if status:
            return error
        (csv,) = (tmp_path / out).glob("*.csv")
        return csv, json.loads(csv.with_suffix(".json").read_text()), error

    return call


def expected():
    """The streams, and what each says alone."""
    model = tiny.build("llama", **tiny.GROUPED)
    plan = tiny.plan(model, "attention_sinks", WINDOW)
    streams = [tiny.tokens(n, seed) for seed, n in enumerate(LENGTHS) if n > 1]
    return streams, [list(Stepwise(model).run(plan, stream)) for stream in streams]


@pytest.mark.parametrize("engine", ["stepwise", "parallel"])
def test_each_row_is_a_stream_of_its_own(engine, documents):
    csv, record, error = documents("--engine", engine)
    streams, found = expected()
    wanted = [nll for stream in found for steps in stream for nll in steps.nll]
    frame = pd.read_csv(csv)
    assert list(frame.columns)[-2:] == ["token", "stream"]
    assert list(frame.stream) == [i for i, n in enumerate(KEPT) for _ in range(n - 1)]
    assert list(frame.input_length) == [t for n in KEPT for t in range(1, n)]
    assert list(frame.token) == [int(x) for stream in streams for x in stream[1:]]
    assert frame.nll.to_numpy() == pytest.approx(np.array(wanted), abs=2e-4)
    assert frame.overall_ppl.iloc[-1] == pytest.approx(math.exp(frame.nll.mean()))
    assert (record["exit_reason"], record["rows"]) == ("finished", len(frame))
    assert record["dataset"]["streams"] == len(KEPT)
    assert record["dataset"]["skipped"] == SHORT
    assert record["dataset"]["sha256"] == fingerprint(*streams)
    assert f"{SHORT} of the rows have fewer than 2 tokens" in error


def test_documents_are_cut_at_num_tokens_and_counted_by_num_samples(documents):
    csv, record, _ = documents("--num-tokens", 20, "--num-samples", 3, "--engine", "parallel")
    frame = pd.read_csv(csv)
    assert frame.groupby("stream").input_length.max().to_dict() == {0: 20, 1: 20}
    assert record["dataset"]["skipped"] == 1


def test_without_documents_one_row_is_read_as_before_and_the_file_has_no_more_columns(place, tmp_path, here):
    data = ("--dataset-name", place / "docs.jsonl", "--data-column", "ids", "--dtype", "float32")
    assert here("run", "--model-name-or-path", place, *data, "--window-size", 8, "--output-dir", tmp_path)[0] == 0
    frame = pd.read_csv(tmp_path / "attention_sinks.csv")
    assert (len(frame), "stream" in frame) == (LENGTHS[0] - 1, False)
    record = json.loads((tmp_path / "attention_sinks.json").read_text())
    assert not {"documents", "every"} & set(record["determined_by"])


@pytest.mark.parametrize("experiment", ["h2o", "recompute", "transformers"])
def test_engines_agree_on_documents(experiment, documents):
    how = ("--experiment", experiment, "--engine")
    ours, theirs = (pd.read_csv(documents(*how, engine, out=engine)[0]) for engine in ("stepwise", "parallel"))
    assert ours.nll.to_numpy() == pytest.approx(theirs.nll.to_numpy(), abs=2e-4)
    assert list(ours.stream) == list(theirs.stream)


@pytest.mark.parametrize(
    ("engine", "every", "rows"),
    [
        pytest.param(
            engine,
            every,
            rows,
            marks=() if (engine, rows) in (("stepwise", 39), ("parallel", 50)) else pytest.mark.heavy,
        )
        for engine in ("stepwise", "parallel")
        for every in (1, 7)
        for rows in (1, 38, 39, 40, 50, 99, 100, 107, 108, 139)
    ],
)
def test_what_was_cut_goes_on_behind_its_last_row(engine, every, rows, documents):
    options = ("--engine", engine, "--every", every)
    wanted, _, _ = documents(*options, out="whole")
    csv, _, _ = documents(*options)
    lines = len(pd.read_csv(csv))
    cut(csv, rows * lines // 140, "7,1.2")
    csv, record, _ = documents(*options, "--resume")
    ours, whole = pd.read_csv(csv), pd.read_csv(wanted)
    assert list(ours.columns) == list(whole.columns)
    for column in ("stream", "input_length", "token", "kv_cache_bytes"):
        assert list(ours[column]) == list(whole[column])
    for column in ("nll", "overall_ppl"):
        assert ours[column].to_numpy() == pytest.approx(whole[column].to_numpy(), rel=2e-4, abs=2e-4)
    assert (record["exit_reason"], record["rows"]) == ("finished", sum(n - 1 for n in KEPT))


def test_a_thinned_run_that_goes_on_has_the_sums_of_an_unbroken_one_to_the_bit(documents, monkeypatch):
    """With NLLs that do not depend on where a run begins."""
    _, found = expected()
    monkeypatch.setattr(runs, "run_many", lambda engine, plan, streams, first, start, trace: _from(found, first, start))
    whole, _, _ = documents("--every", 7, out="whole")
    csv, _, _ = documents("--every", 7)
    for lines in (1, 5, 8, 11):
        cut(csv, lines)
        documents("--every", 7, "--resume")
        ours, wanted = csv.read_text().splitlines(), whole.read_text().splitlines()
        assert [_without_latency(line) for line in ours] == [_without_latency(line) for line in wanted]


def _from(found, first, start):
    for index, steps in enumerate(found):
        for step in steps:
            if (index, step.first) > (first, start):
                yield index, step


def _without_latency(line):
    cells = line.split(",")
    return cells[:5] + cells[6:]


def test_a_finished_run_is_left_alone_and_goes_on_for_more_documents(documents):
    csv, _, _ = documents("--num-samples", 3)
    before = csv.read_bytes()
    documents("--num-samples", 3, "--resume")
    assert csv.read_bytes() == before
    wanted, _, _ = documents(out="whole")
    documents("--resume")
    assert csv.read_bytes().startswith(before)
    assert list(pd.read_csv(csv).stream) == list(pd.read_csv(wanted).stream)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--num-tokens", "10"), "num_tokens was 8192 and not 10"),
        (("--every", "3"), "every was 1 and not 3"),
    ],
)
def test_documents_that_are_read_otherwise_are_another_run(options, said, documents):
    documents()
    assert said in documents(*options, "--resume", status=2)


def test_one_stream_is_not_continued_as_documents(place, documents, tmp_path, here):
    data = ("--dataset-name", place / "docs.jsonl", "--data-column", "ids", "--dtype", "float32", "--num-samples", 9)
    fixed = ("--model-name-or-path", place, "--window-size", WINDOW, "--output-dir", tmp_path / "out")
    assert here("run", *fixed, *data)[0] == 0
    error = documents("--resume", status=2)
    assert "documents was False and not True" in error
    assert len(error.splitlines()) == 1


def test_a_trace_is_of_one_stream(documents):
    error = documents("--trace", status=2)
    assert "--documents and --trace exclude each other" in error


def test_rows_of_nothing_are_refused_in_one_line(place, tmp_path, here):
    (tmp_path / "short.jsonl").write_text('{"ids": [1]}\n{"ids": []}\n')
    data = ("--dataset-name", tmp_path / "short.jsonl", "--data-column", "ids", "--documents")
    status, _, error = here("run", "--model-name-or-path", place, *data, "--output-dir", tmp_path / "out")
    assert (status, len(error.splitlines())) == (2, 1)
    assert "none of the 2 rows" in error


def test_boundaries_are_part_of_the_fingerprint():
    one, other = torch.arange(6), torch.arange(6)
    assert fingerprint(one[:2], one[2:]) != fingerprint(other[:3], other[3:])


def test_every_writes_each_so_many_th_row_and_the_last_with_means_over_all(documents):
    thinned, record, _ = documents("--every", 7, out="thinned")
    whole, _, _ = documents(out="whole")
    ours, every = pd.read_csv(thinned), pd.read_csv(whole)
    last = every.groupby("stream").input_length.transform("max")
    wanted = every[(every.input_length % 7 == 0) | (every.input_length == last)].reset_index(drop=True)
    for column in ("stream", "input_length", "token", "nll", "kv_cache_bytes"):
        assert list(ours[column]) == list(wanted[column])
    assert ours.overall_ppl.to_numpy() == pytest.approx(wanted.overall_ppl.to_numpy(), rel=1e-12)
    assert (record["rows"], record["rows_written"]) == (len(every), len(ours))
    assert record["overall_ppl"] == ours.overall_ppl.iloc[-1]


def test_what_is_broken_off_ends_with_its_last_row_which_goes_where_it_goes_on(place, documents, monkeypatch):
    whole, _, _ = documents("--every", 7, out="whole")
    original = runs.run_many

    def broken(*args):
        for count, found in enumerate(original(*args)):
            yield found
            if count == 59:
                raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(runs, "run_many", broken)
        csv, record, _ = documents("--every", 7, status=0)
    frame = pd.read_csv(csv)
    assert (record["exit_reason"], record["rows"]) == ("out of memory", 60)
    assert (frame.stream.iloc[-1], frame.input_length.iloc[-1]) == (1, 60 - 39)
    assert record["overall_ppl"] == frame.overall_ppl.iloc[-1]
    documents("--every", 7, "--resume")
    assert list(pd.read_csv(csv).input_length) == list(pd.read_csv(whole).input_length)


def test_a_sweep_knows_a_thinned_result(place, tmp_path, here):
    (tmp_path / "sweep.toml").write_text(
        f'model_name_or_path = "{place}"\ndataset_name = "{place / "docs.jsonl"}"\ndata_column = "ids"\n'
        'dtype = "float32"\nexperiment = ["windowed"]\nwindow_size = 8\ndocuments = true\nevery = 5\n'
    )
    status, _, error = here("sweep", tmp_path / "sweep.toml", "--output-dir", tmp_path / "out")
    assert status == 0, error
    (csv,) = (tmp_path / "out").glob("**/*.csv")
    before = csv.read_bytes()
    status, out, error = here("sweep", tmp_path / "sweep.toml", "--output-dir", tmp_path / "out")
    assert (status, csv.read_bytes()) == (0, before)
    assert "was there: finished" in out
    status, _, error = here("sweep", tmp_path / "sweep.toml", "--output-dir", tmp_path / "out", "--trace")
    assert (status, len(error.splitlines())) == (2, 1)
    assert "--documents and --trace exclude each other" in error


def test_defaults_say_what_they_mean():
    assert RunConfig().source.samples == 1
    assert RunConfig(documents=True).source.samples is None
    assert RunConfig(documents=True, num_samples=4).source.samples == 4
    with pytest.raises((UserError, ValueError)):
        RunConfig(every=0)


def test_documents_are_drawn_compared_and_reported(documents, tmp_path, here):
    for experiment in ("transformers", "windowed"):
        options = ("--experiment", experiment, "--engine", "parallel", "--every", 3)
        documents(*options, out=experiment)
    folder = tmp_path / "both"
    folder.mkdir()
    for experiment in ("transformers", "windowed"):
        for path in (tmp_path / experiment).iterdir():
            path.rename(folder / path.name)
    figure = tmp_path / "figure.png"
    drawn = ("--features", "perplexity", "kv_cache", "--skip-first", 5, "--log-perplexity-limit", 0)
    status, _, error = here("plot", "--output-dir", folder, *drawn, "--output", figure)
    assert status == 0, error
    assert figure.stat().st_size > 10_000
    status, out, _ = here("compare", folder)
    assert status == 0
    assert f"{sum(n - 1 for n in KEPT)} tokens of {len(KEPT)} documents" in " ".join(out.split())
    page = tmp_path / "page.html"
    assert here("report", folder, "--output", page)[0] == 0
    assert "intervals come from drawing documents" in page.read_text()
    assert "rows missing" not in page.read_text()


def test_what_a_worker_sends_is_known_to_be_whole(place, tmp_path):
    options = RunConfig(
        model_name_or_path=str(place),
        dataset_name=str(place / "docs.jsonl"),
        data_column="ids",
        documents=True,
        every=7,
        dtype="float32",
        window_size=WINDOW,
        output_dir=tmp_path / "here",
    )
    sent = transfer.work(options)
    transfer.place(sent, options)
    assert options.csv.read_bytes() == sent.rows
    lines = sent.rows.splitlines(keepends=True)
    fewer = b"".join(lines[:5] + lines[6:])
    harmed = replace(sent, rows=fewer, sha256=transfer.checksum(fewer, sent.record))
    with pytest.raises(UserError, match="not whole"):
        transfer.verified(harmed, options)


def test_rows_say_in_which_document_they_end():
    streams = [torch.arange(n) for n in (4, 2, 3)]
    places = [runs.place_of(streams, rows) for rows in range(7)]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2)]
