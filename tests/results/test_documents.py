"""Results of several documents: read, drawn, compared and judged by where in its document a row is."""

import numpy as np
import pandas as pd
import pytest

from sinkbench.errors import UserError
from sinkbench.results.columns import known_columns
from sinkbench.results.comparison import compare_runs
from sinkbench.results.curves import curve_of
from sinkbench.results.documents import by_length
from sinkbench.results.figures import draw, left_out
from sinkbench.results.frontier import budgets
from sinkbench.results.intervals import interval
from sinkbench.results.key_tokens import over_key_tokens
from sinkbench.results.recall import recall_by_distance
from sinkbench.results.report.collect import Group
from sinkbench.results.report.comparing import compare_group
from sinkbench.results.report.summary import summarise
from sinkbench.results.report.warnings import broken_rows, different_tokens, record_of_another, wrong_perplexity
from sinkbench.results.resampling import group_sums
from sinkbench.results.rows import is_whole, predictions_in
from sinkbench.results.run import Run
from sinkbench.results.transforms import log

LENGTHS = (300, 40, 500, 5)


def frame(nll, lengths=LENGTHS, every=1, seed=0):
    """Rows of documents whose NLLs are what ``nll`` says of document and input length."""
    rng, rows, total = np.random.default_rng(seed), [], 0.0
    for stream, length in enumerate(lengths):
        for t in range(1, length + 1):
            value = nll(stream, t) + 0.05 * rng.normal()
            total += value
            rows.append({"stream": stream, "input_length": t, "nll": value, "ppl": np.exp(value), "token": 7 * t % 50})
            rows[-1] |= {"overall_ppl": np.exp(total / len(rows)), "kv_cache_bytes": 8 * t}
    found = pd.DataFrame(rows).reindex(columns=known_columns())
    last = found.groupby("stream").input_length.transform("max")
    return found[(found.input_length % every == 0) | (found.input_length == last)].reset_index(drop=True)


def flat(stream, t):
    return 2.0


def test_what_documents_come_to_at_each_length():
    found = frame(lambda stream, t: 1.0 + stream)
    means = by_length(found)
    assert list(means.input_length) == list(range(1, 501))
    at_4 = found[found.input_length == 4]
    assert means.nll[3] == pytest.approx(at_4.nll.mean())
    upto = found[found.input_length <= 60]
    assert means.overall_ppl[59] == pytest.approx(np.exp(upto.nll.mean()))
    assert means.overall_ppl.iloc[-1] == pytest.approx(found.overall_ppl.iloc[-1])
    assert list(means.kv_cache_bytes[:3]) == [8, 16, 24]
    assert means.stream.isna().all()


def test_one_stream_stays_as_it_is():
    one = frame(flat, (50,)).assign(stream=np.nan)
    assert by_length(one) is one


def test_a_curve_is_that_over_documents():
    x, y = curve_of(frame(flat), "overall_ppl", log, 10**6)
    assert list(x) == list(range(1, 501))
    assert y == pytest.approx(np.full(500, 2.0), abs=0.1)


def test_they_are_drawn_from_the_length_on_that_is_asked_for():
    runs = {"windowed": frame(flat), "transformers": frame(flat, seed=1)}
    figure = draw(runs, ["perplexity"], skip_first=100)
    (ax,) = figure.axes
    lines = [line for line in ax.lines if len(line.get_xdata()) > 1]
    assert min(line.get_xdata().min() for line in lines) == 101
    assert left_out(runs, ["perplexity"], 100) == []


def test_runs_are_compared_row_by_row_of_the_same_document():
    dense = frame(flat)
    worse = frame(lambda stream, t: 2.0 + (0.3 if stream == 2 else 0.0))
    found = {run.name: run for run in compare_runs({"transformers": dense, "windowed": worse})}
    windowed = found["windowed"]
    assert (windowed.tokens, windowed.documents, windowed.longest, windowed.spacing) == (sum(LENGTHS), 4, 500, 1)
    assert windowed.loss.value == pytest.approx(0.3 * 500 / sum(LENGTHS))
    assert windowed.perplexity.value == pytest.approx(np.exp(worse.nll.mean()))


def test_a_loss_sets_in_at_a_length_of_documents():
    dense = frame(flat, (600, 700, 800, 650))
    worse = frame(lambda stream, t: 2.0 + (1.0 if t > 256 else 0.0), (600, 700, 800, 650))
    found = {run.name: run for run in compare_runs({"transformers": dense, "windowed": worse})}
    assert found["windowed"].diverges == found["windowed"].breaks == 257


def test_documents_that_only_one_has_read_and_rows_that_only_one_kept_are_left_out():
    dense, fewer = frame(flat), frame(flat, LENGTHS[:3], every=10)
    found = compare_runs({"transformers": dense, "windowed": fewer})
    assert {(run.tokens, run.documents, run.spacing) for run in found} == {(840, 3, 10)}
    assert found[0].perplexity.value == pytest.approx(np.exp(dense.nll[:840].mean()))


def test_intervals_come_from_documents():
    """Documents differ more than tokens within one: an interval from tokens would be far too narrow."""
    rng = np.random.default_rng(0)
    covered, widths = [], []
    for _ in range(60):
        lengths = rng.integers(20, 200, 40)
        streams = np.repeat(np.arange(40), lengths)
        values = rng.normal(size=40)[streams] + 0.1 * rng.normal(size=len(streams))
        found = interval(values, streams=streams)
        assert found.value == values.mean()
        covered.append(found.low <= 0 <= found.high)
        widths.append((found.high - found.low) / (lambda x: x.high - x.low)(interval(values)))
    assert 0.8 <= np.mean(covered) <= 1.0
    assert np.median(widths) > 1.2


def test_one_document_has_the_interval_of_a_stream():
    values = np.random.default_rng(1).normal(size=500)
    assert interval(values, streams=np.zeros(500)) == interval(values)


def test_thousands_of_documents_are_resampled_in_little_memory():
    streams = np.repeat(np.arange(30_000), 3)
    found = interval(np.random.default_rng(1).normal(size=90_000), streams=streams)
    assert found.low < found.value < found.high


def test_other_tokens_are_named_by_document():
    other = frame(flat)
    other.loc[(other.stream == 1) & (other.input_length == 7), "token"] = 99
    with pytest.raises(UserError, match="differ from token 7 of document 1 on"):
        compare_runs({"transformers": frame(flat), "windowed": other})
    (warning,) = different_tokens([Run("a", "a", frame(flat)), Run("b", "b", other)])
    assert "from token 7 of document 1 on" in warning.message


def test_a_run_is_as_long_as_its_documents_together():
    run = Run("windowed", "windowed", frame(flat, every=7), {"rows": sum(LENGTHS)})
    assert (run.length, run.spacing) == (sum(LENGTHS), 7)
    assert summarise(run).tokens == sum(LENGTHS)
    assert [check(run) for check in (broken_rows, record_of_another, wrong_perplexity)] == [None, None, None]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: f.drop(index=20), "are followed by"),
        (lambda f: f.drop(index=300), "the first row is that of 2 tokens"),
        (lambda f: pd.concat([f[300:340], f[:300], f[340:]]), "goes on at 1"),
        (lambda f: pd.concat([f[:320], f[310:]]), "goes on at 11"),
    ],
)
def test_rows_that_are_missing_or_repeated_are_noticed(harm, said):
    warning = broken_rows(Run("x", "x", harm(frame(flat)).reset_index(drop=True)))
    assert warning is not None
    assert said in warning.message


def test_a_report_compares_documents():
    runs = [
        Run("transformers", "transformers", frame(flat)),
        Run("windowed", "windowed", frame(lambda s, t: 2.2, LENGTHS[:3])),
    ]
    shared = compare_group(Group("x", runs).runs)
    assert (shared.tokens, shared.compared[1].documents) == (840, 3)


@pytest.mark.parametrize("every", [1, 7, 1000])
def test_a_file_is_known_to_be_whole(every):
    found = frame(flat, every=every)
    assert is_whole(found, every)
    assert predictions_in(found) == sum(LENGTHS)
    for rows in range(1, len(found), 3):
        assert is_whole(found[:rows], every)
    if every == 7:
        assert not is_whole(found.drop(index=3), every)
        assert not is_whole(found.drop(index=43), every)
        assert not is_whole(found, 6)
    assert not is_whole(found[found.stream != 1], every)


def test_means_of_groups_have_intervals_from_documents():
    draw = np.random.default_rng(0)
    streams = np.repeat(np.arange(30), 100)
    values = draw.normal(size=30)[streams] + 0.01 * draw.normal(size=3000)  # documents differ, their tokens do not
    every = group_sums(values, np.zeros(3000, int), 1, streams=streams).mean([0])
    expected = interval(values, streams=streams)
    assert every.value == pytest.approx(expected.value)
    assert every.high - every.low == pytest.approx(expected.high - expected.low, rel=0.15)
    blocks = group_sums(values, np.zeros(3000, int), 1).mean([0])
    one = group_sums(values, np.zeros(3000, int), 1, streams=np.zeros(3000)).mean([0])
    assert one == blocks != every


@pytest.fixture
def of_documents():
    """Two runs over documents, of which some lose much and others nothing."""
    lengths = [60] * 40
    dense = Run("dense", "transformers", frame(flat, lengths))
    lossy = Run("lossy", "windowed", frame(lambda stream, t: 2.0 + stream % 4, lengths))
    return {"dense": dense, "lossy": lossy}


def test_losses_by_recall_distance_and_by_budget_are_as_uncertain_as_documents_differ(of_documents):
    dense, lossy = of_documents.values()
    expected = interval((lossy.frame.nll - dense.frame.nll).to_numpy(float), streams=lossy.frame.stream.to_numpy())
    (recalled,) = recall_by_distance(of_documents, dense)
    (budget,) = (one for one in budgets(of_documents, dense) if one.name == "lossy")
    assert budget.loss == expected
    assert recalled.whole.loss.high - recalled.whole.loss.low == pytest.approx(expected.high - expected.low, rel=0.15)
    assert (recalled.first, recalled.last) == (1, 60)


def test_key_tokens_are_as_uncertain_as_documents_differ(of_documents):
    found = {one.name: one for one in over_key_tokens(of_documents, "dense", "lossy")}
    other = np.log([found["lossy"].other_ppl.low, found["lossy"].other_ppl.high])
    assert other[1] - other[0] > 0.3


def test_recall_needs_a_run_that_leaves_no_token_out(of_documents):
    rows = of_documents["dense"].frame.assign(stream=np.nan).iloc[:60]
    holes = rows[rows.input_length % 8 != 0].reset_index(drop=True)
    windows = Run("windows", "transformers", holes, {"protocol": {"name": "windows"}})
    beside = Run("windowed", "windowed", holes)
    with pytest.raises(UserError, match="windows is of --protocol windows, which leave tokens out") as refused:
        recall_by_distance({"windows": windows, "windowed": beside}, windows)
    assert "\n" not in str(refused.value)
