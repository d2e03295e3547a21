"""Result files are read as they were written; figures show what they should, where they should."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from typer.testing import CliRunner

from sinkbench.cli import app, spelled
from sinkbench.errors import UserError
from sinkbench.results import figures
from sinkbench.results.axes import DASHES
from sinkbench.results.columns import SEED_COLUMNS, known_columns
from sinkbench.results.looks import OWN
from sinkbench.results.reading import read_csv, read_runs

REFERENCE = Path(__file__).parents[1] / "fixtures" / "llama_2_7b"
HEADER = ",".join([*SEED_COLUMNS, "kv_cache_bytes"])


def run(n=400, mean=2.0, latency=0.05, vram=np.nan, kv=1024.0, overall=None):
    """A synthetic run: constant but for what a test asks for."""
    x = np.arange(1, n + 1, dtype=float)
    frame = {"input_length": x, "nll": mean, "ppl": np.exp(mean), "overall_ppl": np.exp(mean)}
    frame |= {"cuda_vram_allocated": vram, "latency": latency, "kv_cache_bytes": x * kv}
    if overall is not None:
        frame["overall_ppl"] = overall
    return pd.DataFrame(frame)


def rows_in(folder):
    return {name: run.frame for name, run in read_runs(folder).items()}


def curve(figure: Figure, label: str, axis=0):
    (line,) = [line for line in figure.axes[axis].lines if line.get_label() == label]
    return line


def legend_texts(figure: Figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


@pytest.fixture
def reference():
    return rows_in(REFERENCE)


@pytest.fixture
def write(tmp_path):
    def _write(text: str | bytes, name="windowed"):
        path = tmp_path / f"{name}.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write


# reading


def test_columns_that_are_not_known_are_ignored(write):
    frame = read_csv(write(f"{HEADER},note\n1,2,3,4,,,5,good\n"))
    assert list(frame) == list(known_columns())


def test_reference_results_are_read_in_the_fixed_order(reference):
    assert list(reference) == ["transformers", "windowed", "attention_sinks"]
    assert [len(frame) for frame in reference.values()] == [318, 93, 511]
    assert reference["windowed"]["cuda_vram_allocated"].notna().all()
    assert reference["windowed"]["kv_cache_bytes"].isna().all()


def test_other_experiments_come_last_alphabetically_and_hidden_files_not_at_all(write, tmp_path):
    for name in ("zeta", "recompute", "alpha", "attention_sinks", "._windowed"):
        write(f"{HEADER}\n1,2,3,4,,,5\n", name)
    assert list(read_runs(tmp_path)) == ["attention_sinks", "recompute", "alpha", "zeta"]


def test_own_results_with_empty_columns_are_read(write):
    frame = read_csv(write(f"{HEADER}\n1,2.5,12.18,12.18,,,46080\n2,2.5,12.18,12.18,,,92160\n"))
    assert frame["cuda_vram_allocated"].isna().all() and frame["latency"].isna().all()
    assert frame["kv_cache_bytes"].tolist() == [46080, 92160]
    assert set(frame.dtypes) == {np.dtype("float64")}


def test_inf_in_ppl_is_read(write):
    frame = read_csv(write(f"{HEADER[: HEADER.rindex(',')]}\n1,800.0,inf,inf,12.5,0.1\n2,1.0,2.7,inf,12.5,0.1\n"))
    assert frame["ppl"].tolist() == [np.inf, 2.7]


@pytest.mark.parametrize("rest", ["3,2.5,12.1", "3", "3,2.5,12.18,12.18,,,13", "3,2.5\n", "3,2.5,12.18,12.18,,,1382"])
def test_a_last_line_that_was_cut_is_not_read(write, rest):
    assert len(read_csv(write(f"{HEADER}\n1,2.5,12.18,12.18,,,46080\n2,2.5,12.18,12.18,,,92160\n{rest}"))) == 2


def test_windows_line_ends_and_byte_order_marks_are_read(write):
    assert len(read_csv(write(f"\ufeff{HEADER}\r\n1,2,3,4,,,5\r\n2,2,3,4,,,5\r\n3,2"))) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        (f"{HEADER}\n", "has no rows"),
        (f"{HEADER}\n1,2.5,12", "has no rows"),
        (HEADER[:9], "has no rows"),
        ("a,b\n1,2\n", "no column input_length, nll"),
        (f"{HEADER}\n1,2,3,4,,,5\n2,two,3,4,,,5\n3,2,3,4,,,5\n", "line 3, has 'two' as its nll"),
        (f"{HEADER}\n1,2,3,4,,,5\n,2,3,4,,,5\n", "line 3, has nothing as its input_length"),
        (f"{HEADER}\n1,2,3,4\n2,2,3,4,,,5\n", "line 2, has 4 values, not 7"),
        (f"{HEADER}\n1,2,3,4,,,5,6\n", "line 2, has 8 values, not 7"),
        (f"{HEADER}\n1,True,3,4,,,5\n", "has 'True' as its nll"),
        (f'{HEADER}\n"1,2,3,4,,,5\n', "line 2, has '\"1' as its input_length"),
        (f"{HEADER},nll\n1,2,3,4,,,5,6\n", "line 1, has the column nll twice"),
        (b"\xff\xfe\x00", "not a text file"),
    ],
)
def test_a_malformed_file_is_named_in_one_line(write, text, message):
    path = write(text)
    with pytest.raises(UserError, match=message) as error:
        read_csv(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_empty_folders_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no CSV in"):
        read_runs(tmp_path)


def test_a_folder_named_like_a_result_is_an_error(tmp_path):
    (tmp_path / "windowed.csv").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*windowed\.csv"):
        read_runs(tmp_path)


# what is drawn


def test_colour_tells_the_strategy_and_line_style_the_feature(reference):
    figure = figures.draw(reference, ["perplexity", "vram", "latency"], skip_first=5)
    labels = ("Log perplexity", "CUDA VRAM", "Time per token")
    for axis, (label, style) in enumerate(zip(labels, ("-", "--", ":"))):
        for name in reference:
            line = curve(figure, f"{name} {label}", axis)
            assert line.get_color() == OWN[name]
            assert line._unscaled_dash_pattern[1] == DASHES.get(style)
    assert len({OWN[name] for name in reference}) == len(reference)
    handles = figure.legends[0].legend_handles
    assert [handle.get_color() for handle in handles[1:4]] == [OWN[name] for name in reference]
    assert [handle._unscaled_dash_pattern[1] for handle in handles[5:]] == [None, DASHES["--"], DASHES[":"]]


def test_a_colour_does_not_depend_on_which_runs_are_there():
    alone = figures.draw({"windowed": run()}, ["perplexity"])
    assert curve(alone, "windowed Log perplexity").get_color() == OWN["windowed"]


def looks_in(figure, axis=0):
    """Colour and marker of each line that is a run's."""
    lines = [line for line in figure.axes[axis].lines if not line.get_label().startswith("_")]
    return [(line.get_color(), line.get_marker()) for line in lines]


@pytest.mark.parametrize("count", [2, 5, 12, 60, 400])
def test_any_number_of_strategies_can_be_told_from_each_other(count):
    runs = {f"strategy{i}": run(150, mean=2 + i / count) for i in range(count)}
    figure = figures.draw(runs, ["perplexity"], log_perplexity_limit=0)
    assert len(set(looks_in(figure))) >= min(count, 72)  # filled and hollow shapes go by one name
    handles = figure.legends[0].legend_handles
    seen = {(h.get_color(), h.get_marker(), h.get_markerfacecolor()) for h in handles if h.get_linestyle() != "None"}
    assert len(seen) == count + 1  # one of them says which feature


def test_a_mark_is_on_every_line_of_its_run_and_on_different_points_than_others_are():
    names = [f"strategy{i}" for i in range(14)]
    figure = figures.draw({name: run(1000, latency=0.02) for name in names}, ["perplexity", "latency"])
    for axis in (0, 1):
        marked = [line for line in figure.axes[axis].lines if line.get_marker() not in ("", "None")]
        assert len(marked) == 6  # beyond eight colours
        places = [tuple(line.get_markevery()) for line in marked]
        assert len(set(places)) == len(places)
        assert all(5 <= len(every) <= 12 for every in places)
    assert legend_texts(figure)[0] == "Strategy (colour and mark)"


def test_marks_are_where_a_line_can_be_seen():
    overall = np.exp(np.where(np.arange(1000) < 300, 3.0, 9.0))
    runs = {"windowed-window_4": run(1000), "windowed-window_8": run(1000, overall=overall)}
    line = curve(figures.draw(runs, ["perplexity"]), "windowed-window_8 Log perplexity")
    assert max(line.get_ydata()[line.get_markevery()]) < 5


def test_several_settings_of_a_strategy_share_its_colour_and_are_in_the_order_of_their_sizes(write, tmp_path):
    names = ["h2o-recent_512", "h2o-recent_64", "attention_sinks-window_1024", "attention_sinks-window_256", "windowed"]
    for name in names:
        write(HEADER + "\n" + "".join(f"{i},2,3,{4 + len(name)},,,5\n" for i in range(1, 9)), name)
    figure = figures.draw(rows_in(tmp_path), ["perplexity"], skip_first=0)
    assert [text for text in legend_texts(figure) if text in names] == [
        *("windowed", "attention_sinks-window_256", "attention_sinks-window_1024", "h2o-recent_64", "h2o-recent_512")
    ]
    looks = looks_in(figure)
    assert looks[1][0] == looks[2][0] == OWN["attention_sinks"]
    assert looks[3][0] == looks[4][0] not in OWN.values()
    assert len(set(looks)) == 5


def test_two_features_of_one_style_are_drawn_in_two():
    figure = figures.draw({"windowed": run().assign(fresh_nll=2.0)}, ["perplexity", "fluency"])
    styles = [ax.lines[0]._unscaled_dash_pattern[1] for ax in figure.axes]
    assert styles == [None, DASHES["--"]]


def test_lines_that_lie_on_each_other_are_stripes_of_one_line():
    names = ("windowed", "attention_sinks", "recompute")
    both = figures.draw({name: run() for name in names} | {"transformers": run(mean=3.0)}, ["perplexity"])
    patterns = [line._unscaled_dash_pattern for line in both.axes[0].lines]
    assert patterns[3][1] is None
    drawn, gap = patterns[0][1]
    assert gap == pytest.approx(2 * drawn)
    assert sorted(-offset % (drawn + gap) for offset, _ in patterns[:3]) == pytest.approx([0, drawn, 2 * drawn])


def test_the_first_feature_is_left_and_the_others_right_without_covering_each_other(reference):
    figure = figures.draw(reference, ["latency", "perplexity", "vram"], skip_first=5)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    left, right, outer = figure.axes
    assert left.get_ylabel() == "Time per token (ms), lower is better"
    assert right.get_ylabel() == "Log perplexity (nats), lower is better"
    assert outer.get_ylabel() == "CUDA VRAM (GiB), lower is better"
    boxes = [axis.yaxis.get_tightbbox(renderer) for axis in figure.axes]
    assert boxes[0].x1 <= left.bbox.x0 + 1
    assert left.bbox.x1 <= boxes[1].x0 + 5 and boxes[1].x1 < boxes[2].x0
    assert boxes[2].x1 <= figure.bbox.x1


@pytest.mark.parametrize("features", [["perplexity"], ["perplexity", "vram"], ["perplexity", "vram", "latency"]])
def test_nothing_covers_anything(reference, features):
    figure = figures.draw(reference, features, skip_first=5)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    axes = [ax.get_tightbbox() for ax in figure.axes]
    assert legend.get_window_extent().y1 <= min(box.y0 for box in axes)
    assert figure._suptitle.get_window_extent().y0 >= max(box.y1 for box in axes)
    assert legend.get_window_extent().y0 >= 0


def test_the_legend_names_strategies_and_features_in_two_groups(reference):
    texts = legend_texts(figures.draw(reference, ["perplexity", "vram"], skip_first=5))
    assert texts == [
        *("Strategy (colour)", "transformers", "windowed", "attention_sinks"),
        *("Feature (line)", "Log perplexity, left axis", "CUDA VRAM, right axis", " "),
    ]


def test_odd_experiment_names_are_shown_as_they_are():
    figure = figures.draw({"_a": run(), "b$\\x$": run()}, ["perplexity"], "5 $ \\frac $")
    figure.draw_without_rendering()
    assert legend_texts(figure)[1:3] == ["_a", "b$\\x$"]


def test_perplexity_is_the_natural_logarithm_after_the_skipped_rows(reference):
    line = curve(figures.draw(reference, ["perplexity"], skip_first=5), "windowed Log perplexity")
    frame = reference["windowed"]
    assert line.get_xdata().tolist() == frame["input_length"][5:].tolist()
    np.testing.assert_allclose(line.get_ydata(), np.log(frame["overall_ppl"][5:]))


def test_a_curve_that_leaves_through_the_top_ends_in_an_arrow_there():
    overall = np.exp(np.linspace(2, 8, 400))
    figure = figures.draw({"windowed": run(overall=overall), "transformers": run()}, ["perplexity"], skip_first=0)
    assert figure.axes[0].get_ylim()[1] == 5.0
    arrow = curve(figure, "_windowed Log perplexity leaves")
    assert arrow.get_ydata() == [5.0] and not arrow.get_clip_on()
    assert arrow.get_xdata()[0] == pytest.approx(np.interp(5, np.linspace(2, 8, 400), np.arange(1, 401)))
    assert len(figure.axes[0].lines) == 3


def test_the_axis_ends_with_the_data_where_that_is_under_the_limit(reference):
    ax = figures.draw(reference, ["perplexity"], skip_first=5).axes[0]
    assert 4.4 < ax.get_ylim()[1] < 4.8 and len(ax.lines) == 3
    assert figures.draw(reference, ["perplexity"], skip_first=0, log_perplexity_limit=0).axes[0].get_ylim()[1] > 8


def test_infinite_perplexity_leaves_through_the_top_and_does_not_squeeze_the_rest():
    overall = np.where(np.arange(400) < 200, np.e**2, np.inf)
    figure = figures.draw({"windowed": run(overall=overall)}, ["perplexity"])
    bottom, top = figure.axes[0].get_ylim()
    assert top == 5.0 and 1.5 < bottom < 2.0
    assert curve(figure, "_windowed Log perplexity leaves").get_xdata()[0] == pytest.approx(200, abs=1)


def test_a_limit_under_everything_is_an_error():
    with pytest.raises(UserError, match="every log perplexity is above --log-perplexity-limit 1"):
        figures.draw({"windowed": run()}, ["perplexity"], log_perplexity_limit=1.0)


def test_vram_without_cuda_is_the_kv_cache_and_says_so():
    figure = figures.draw({"windowed": run(kv=2**20)}, ["perplexity", "vram"])
    assert figure.axes[1].get_ylabel() == "KV cache (MiB; no CUDA), lower is better"
    assert curve(figure, "windowed KV cache", 1).get_ydata().tolist() == list(range(101, 401))
    assert "KV cache, right axis" in legend_texts(figure)
    assert figure.get_suptitle() == "Log perplexity and KV cache as a function of input length"


def test_vram_is_never_mixed_with_the_kv_cache():
    mixed = {"windowed": run(), "transformers": run(vram=13.0)}
    figure = figures.draw(mixed, ["vram"])
    assert [line.get_label() for line in figure.axes[0].lines] == ["transformers CUDA VRAM"]
    assert "windowed" not in legend_texts(figure)
    assert figures.left_out(mixed, ["vram"], 100) == [
        "windowed has no line for CUDA VRAM: its rows have no cuda_vram_allocated"
    ]


def test_vram_of_nothing_at_all_is_an_error():
    with pytest.raises(UserError, match="no run has CUDA VRAM: they were made without CUDA"):
        figures.draw({"windowed": run(kv=np.nan)}, ["vram"])


def test_latency_ignores_hiccups_keeps_steps_and_holds_at_the_ends():
    latency = np.where(np.arange(400) < 200, 0.05, 0.09)
    latency[[0, 50, 300, 399]] = 4.0
    figure = figures.draw({"windowed": run(latency=latency)}, ["latency"], skip_first=0)
    shown = curve(figure, "windowed Time per token").get_ydata()
    np.testing.assert_allclose(shown, np.where(np.arange(400) < 200, 50, 90))
    assert figure.axes[0].get_ylabel() == "Time per token (ms), lower is better"


def test_slow_steps_are_shown_in_seconds():
    figure = figures.draw({"windowed": run(latency=2.5), "recompute": run(latency=0.1)}, ["latency"])
    assert figure.axes[0].get_ylabel() == "Time per token (s), lower is better"
    assert curve(figure, "recompute Time per token").get_ydata()[0] == 0.1


def test_a_run_without_latency_has_no_line_and_none_at_all_is_an_error():
    some = {"windowed": run(), "recompute": run(latency=np.nan)}
    assert len(figures.draw(some, ["latency"]).axes[0].lines) == 1
    with pytest.raises(UserError, match="made with the parallel engine"):
        figures.draw({"recompute": run(latency=np.nan)}, ["perplexity", "latency"])


def test_a_short_run_is_left_out_and_only_short_runs_are_an_error():
    both = {"windowed": run(60), "recompute": run(200)}
    assert len(figures.draw(both, ["perplexity"]).axes[0].lines) == 1
    assert figures.left_out(both, ["perplexity"], 100) == [
        "windowed is not shown: its 60 rows are all within --skip-first 100"
    ]
    with pytest.raises(UserError, match=r"--skip-first 300 \(the longest has 200 rows\)"):
        figures.draw(both, ["perplexity"], skip_first=300)
    with pytest.raises(UserError, match="give 0 or more"):
        figures.draw(both, ["perplexity"], skip_first=-1)


def test_a_single_row_is_a_visible_point():
    line = curve(figures.draw({"windowed": run(1)}, ["perplexity"], skip_first=0), "windowed Log perplexity")
    assert line.get_marker() == "o"


def test_coinciding_dashes_start_at_different_places():
    names = ("windowed", "attention_sinks", "recompute")
    lines = figures.draw({name: run() for name in names}, ["vram"]).axes[0].lines
    assert len({line._dash_pattern[0] for line in lines}) == len(names)


def test_a_long_run_is_thinned_but_keeps_its_ends_and_extremes():
    overall = np.full(50_000, np.e**2)
    overall[[1234, 40_321]] = np.e, np.e**4
    line = curve(figures.draw({"windowed": run(50_000, overall=overall)}, ["perplexity"]), "windowed Log perplexity")
    x, y = line.get_xdata(), line.get_ydata()
    assert len(x) <= figures.POINTS + 2 and (x[0], x[-1]) == (101, 50_000) and (np.diff(x) > 0).all()
    assert x[y.argmin()] == 1235 and x[y.argmax()] == 40_322


def test_a_title_breaks_where_a_backslash_n_was_typed(reference):
    assert figures.draw(reference, ["perplexity"], "a\\nb", skip_first=5).get_suptitle() == "a\nb"


def test_the_usual_title_names_the_features(reference):
    figure = figures.draw(reference, ["perplexity", "vram", "latency"], skip_first=5)
    assert figure.get_suptitle() == "Log perplexity, CUDA VRAM and time per token as a function of input length"


def test_input_lengths_have_thousands_separators(reference):
    ax = figures.draw(reference, ["perplexity"], skip_first=5).axes[0]
    ax.figure.draw_without_rendering()
    assert "10,000" in [label.get_text() for label in ax.get_xticklabels()]


def test_a_feature_is_drawn_once_and_an_unknown_one_is_an_error(reference):
    assert len(figures.draw(reference, ["vram", "vram"], skip_first=5).axes) == 1
    for features in (["speed"], []):
        with pytest.raises(UserError, match="one or more of perplexity, vram, latency"):
            figures.draw(reference, features)


# files


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_figures_are_saved_by_suffix_and_reproducibly(reference, tmp_path, suffix, start):
    paths = [tmp_path / "new" / f"{name}.{suffix}" for name in "ab"]
    for path in paths:
        figures.save(figures.draw(reference, ["perplexity"], skip_first=5), path)
    assert paths[0].read_bytes().startswith(start)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_other_suffixes_and_unwritable_places_are_errors(tmp_path):
    figure = figures.draw({"windowed": run()}, ["perplexity"])
    with pytest.raises(UserError, match=r"must end in \.png, \.svg, \.pdf"):
        figures.save(figure, tmp_path / "figure.gif")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*give another --output"):
        figures.save(figure, tmp_path / "file" / "figure.png")


def test_a_svg_of_a_million_tokens_stays_small(tmp_path):
    noise = np.random.default_rng(0).uniform(2, 8, 1_000_000)
    figures.save(figures.draw({"windowed": run(1_000_000, overall=noise)}, ["perplexity"]), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size < 500_000


# the command


def plot(*arguments: str):
    return CliRunner().invoke(app, spelled(["plot", *arguments]))


def test_the_command_saves_beside_the_results_and_says_where(write, tmp_path):
    rows = "".join(f"{i},2.0,7.4,7.4,,,{i * 1024}\n" for i in range(1, 200))
    write(f"{HEADER}\n{rows}")
    write(f"{HEADER}\n1,2.0,7.4,7.4,,,1024\n", "recompute")
    done = plot("--output_dir", str(tmp_path), "--features", "perplexity", "vram")
    assert done.exit_code == 0
    assert f"saved {tmp_path / 'perplexity_vram.png'}" in done.output
    assert "note: recompute is not shown" in done.output
    assert (tmp_path / "perplexity_vram.png").is_file()


def test_the_command_takes_every_option(tmp_path):
    path = tmp_path / "figure.svg"
    sizes = ("--log-perplexity-limit", "3", "--skip-first", "5")
    done = plot("--output-dir", str(REFERENCE), "--features", "latency", "--title", "x", *sizes, "--output", str(path))
    assert done.exit_code == 0 and path.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "speed"], "unknown feature speed"),
        (["--output", "figure.gif"], "must end in"),
        (["--output-dir", "/nowhere"], "no folder /nowhere"),
        (["--output-dir", str(REFERENCE), "--output", "/proc/none/a.png", "--skip-first", "5"], "cannot write"),
    ],
)
def test_the_command_fails_with_one_line(arguments, message):
    error = plot(*arguments).exception
    assert isinstance(error, UserError) and message in str(error)


def test_show_without_a_display_is_an_error_after_saving(tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.pyplot.get_backend", lambda: "agg")
    path = tmp_path / "figure.png"
    done = plot("--output-dir", str(REFERENCE), "--skip-first", "5", "--output", str(path), "--show")
    assert isinstance(done.exception, UserError) and "--show found no display" in str(done.exception)
    assert path.is_file()


def test_show_opens_the_figure_that_was_saved(tmp_path, monkeypatch):
    from matplotlib import pyplot

    shown = []
    monkeypatch.setattr(pyplot, "get_backend", lambda: "tkagg")
    monkeypatch.setattr(pyplot, "show", lambda: shown.extend(pyplot.get_fignums()))
    path = tmp_path / "figure.png"
    try:
        done = plot("--output-dir", str(REFERENCE), "--skip-first", "5", "--output", str(path), "--show")
        assert done.exit_code == 0 and len(shown) == 1
        assert pyplot.figure(shown[0]).get_suptitle().startswith("Log perplexity")
    finally:
        pyplot.close("all")
