"""What was kept is drawn as it was: shares and survivals against counts of the tests' own, panels one by one."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sinkbench.errors import UserError
from sinkbench.results.columns import SEED_COLUMNS
from sinkbench.results.retention import SHARES, draw_retention, grid_of, shares_held, survival
from sinkbench.results.traces import ABSENT, HELD, Lifetimes, read_trace, tokens_in, write_trace


def kept(lifetime, strategy="any"):
    lifetime = np.array(lifetime, np.int32)
    layers = len(lifetime)
    return Lifetimes(strategy, np.arange(layers), np.full(layers, 4), lifetime)


@st.composite
def some(draw):
    """Lifetimes of a few layers and heads that end within the stream, or are of tokens held at its end."""
    n, layers, heads = draw(st.integers(1, 40)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    drawn = draw(st.lists(st.integers(0, 60), min_size=n * layers * heads, max_size=n * layers * heads))
    lifetime = np.array(drawn).reshape(layers, heads, n)
    lifetime[lifetime > n - np.arange(n)] = HELD
    if heads > 1:
        lifetime[0, 1:] = ABSENT
    return kept(lifetime)


def windowed(n=200, window=16):
    born = np.arange(n)
    return kept(np.where(born + window + 1 > n, HELD, window + 1)[None, None].repeat(2, 0), "windowed")


def lives(kept, n):
    """(token, steps that found it held or are still to come) of every head that there is; a list, by hand."""
    return [
        (token, n - token if life == HELD else life, life == HELD)
        for layer in kept.lifetime.tolist()
        for head in layer
        if head[0] != ABSENT
        for token, life in enumerate(head)
    ]


@given(some(), st.sampled_from([400, 7]))
def test_a_share_is_that_of_the_heads_that_hold_a_token_after_a_step(kept, bins):
    n, shares = kept.tokens, shares_held(kept, bins)
    size = min(n, bins)
    assert shares.shape == (size, size)
    ends = [(i + 1) * n // size for i in range(size)]
    for row, (begin, end) in enumerate(zip([0, *ends], ends)):
        for column, step in enumerate(end - 1 for end in ends):
            if column < row:
                assert np.isnan(shares[row, column])
                continue
            found = [step < token + life for token, life, _ in lives(kept, n) if begin <= token < end]
            assert shares[row, column] == pytest.approx(np.mean(found))


@given(some())
def test_the_share_of_tokens_that_live_so_long_allows_for_those_that_are_held_at_the_end(kept):
    all_lives = lives(kept, kept.tokens)
    steps, share = survival(kept)
    alive = 1.0
    for step, wanted in zip(steps, share):
        assert wanted == pytest.approx(alive)
        seen = [life for _, life, _ in all_lives if life >= step]
        went = sum(life == step and not held for _, life, held in all_lives)
        alive *= 1 - went / len(seen) if seen else 1
    assert share[0] == 1
    assert steps[-1] == max(life for _, life, _ in all_lives) + (share[-1] == 0)


def test_without_an_end_the_curve_of_dense_attention_stays_up_and_that_of_a_window_falls_at_its_size():
    dense = survival(kept(np.zeros((2, 3, 50))))
    assert (list(dense[0]), set(dense[1])) == (list(range(1, 51)), {1.0})
    steps, share = survival(windowed(window=16))
    assert dict(zip(steps, share))[17] == 1
    assert dict(zip(steps, share))[18] == 0


@pytest.mark.parametrize("panels", range(1, 21))
def test_every_panel_has_a_place_and_the_curves_have_what_is_left_of_the_last_row_if_that_is_enough(panels):
    columns, rows, (row, place) = grid_of(panels)
    assert 2 <= columns <= 4
    assert 0 <= columns * row + place.start - panels < columns
    assert place.start in (0, panels % columns)
    assert place.stop - place.start >= (1 if panels <= 5 else 2)
    assert row == rows - 1
    assert place.stop == columns > place.start


@pytest.mark.parametrize("runs", [1, 2, 5, 12])
def test_a_panel_a_run_in_one_scale_and_one_panel_of_curves(runs):
    names = ["windowed", "attention_sinks-window_256-positions_text", *(f"idea_{i}" for i in range(10))][:runs]
    figure = draw_retention({name: windowed(n=50 + 10 * i) for i, name in enumerate(names)}, {n: n for n in names})
    panels = figure.axes[:-1]
    assert ["".join(ax.get_legend().get_texts()[0].get_text().split()) for ax in panels] == names
    assert {(ax.images[0].norm.vmin, ax.images[0].norm.vmax, ax.images[0].cmap.name) for ax in panels} == {
        (0, 1, SHARES.name)
    }
    curves = figure.axes[-1]
    assert [line.get_label() for line in curves.lines] == names
    for ax, line in zip(panels, curves.lines):
        head = ax.get_legend().get_lines()[0]
        assert (head.get_color(), head.get_marker()) == (line.get_color(), line.get_marker() or "None")
    FigureCanvasAgg(figure).draw()
    inside = figure.bbox
    for ax in figure.axes:
        box = ax.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= inside.x1 and box.y1 <= inside.y1


def test_runs_that_keep_the_same_are_stripes_of_one_line():
    same = draw_retention({"windowed": windowed(), "mine": windowed()}, {"windowed": "windowed", "mine": "mine"})
    other = draw_retention({"windowed": windowed(), "mine": windowed(window=20)})
    assert [line.is_dashed() for line in same.axes[-1].lines] == [True, True]
    assert [line.is_dashed() for line in other.axes[-1].lines] == [False, False]


def test_where_runs_are_of_one_length_numbers_stand_at_the_edge_alone():
    alike = draw_retention({str(i): windowed() for i in range(5)})
    unlike = draw_retention({str(i): windowed(n=100 + i) for i in range(5)})
    for figure, wanted in ((alike, [True, False, False, True, False]), (unlike, [True] * 5)):
        FigureCanvasAgg(figure).draw()
        shown = [any(tick.label1.get_visible() for tick in ax.yaxis.get_major_ticks()) for ax in figure.axes[:5]]
        assert shown == wanted


# files


def test_a_trace_is_read_as_it_was_written_and_numpy_reads_it_alone(tmp_path):
    path, wanted = tmp_path / "h2o.trace.npz", kept([[[3, 0, 1], [2, 2, 0]]], "h2o")
    write_trace(path, wanted)
    found = read_trace(path)
    assert (found.strategy, found.tokens, tokens_in(path)) == ("h2o", 3, 3)
    assert np.array_equal(found.lifetime, wanted.lifetime)
    with np.load(path) as arrays:
        assert set(arrays) == {"lifetime", "layer", "window", "strategy", "tokens", "version"}
        assert arrays["lifetime"].dtype == np.int32
    assert [p.name for p in tmp_path.iterdir()] == ["h2o.trace.npz"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no archive",
        lambda data: data[: len(data) // 2],
        lambda data: data[:60] + bytes(40) + data[100:],
    ],
)
def test_a_damaged_trace_is_refused_in_one_line(damage, tmp_path):
    path = tmp_path / "h2o.trace.npz"
    write_trace(path, kept(np.arange(600).reshape(2, 3, 100) % 7))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="--trace again, or remove the file") as refused:
        read_trace(path)
    assert "\n" not in str(refused.value)


def test_a_trace_of_a_newer_version_or_of_other_shapes_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "h2o.trace.npz"
    monkeypatch.setattr("sinkbench.results.traces.VERSION", 2)
    write_trace(path, kept([[[3, 0, 1]]]))
    monkeypatch.undo()
    with pytest.raises(UserError, match="a newer sinkbench wrote it"):
        read_trace(path)
    write_trace(path, Lifetimes("h2o", np.arange(3), np.arange(3), np.zeros((2, 2, 5), np.int32)))
    with pytest.raises(UserError, match="do not fit"):
        read_trace(path)


# the command line


@pytest.fixture
def folder(tmp_path):
    """Rows of three runs, two of them with a trace."""
    for name in ("windowed", "h2o", "recompute"):
        rows = "".join(f"{i},2,7.4,7.4,,0.1\n" for i in range(1, 201))
        (tmp_path / f"{name}.csv").write_text(",".join(SEED_COLUMNS) + "\n" + rows)
        (tmp_path / f"{name}.json").write_text(json.dumps({"experiment": name}))
        if name != "recompute":
            write_trace(tmp_path / f"{name}.trace.npz", windowed())
    return tmp_path


def pictures(folder):
    return {path.name for path in folder.iterdir() if path.suffix in (".png", ".svg")}


def test_retention_is_a_figure_and_says_which_runs_it_lacks(folder, here):
    status, out, error = here("plot", "--output-dir", folder, "--features", "retention")
    assert status == 0
    assert pictures(folder) == {"retention.png"}
    assert out == f"saved {folder / 'retention.png'}\n"
    assert error == "note: recompute has no trace: it carries no cache\n"


def test_beside_other_features_it_is_a_figure_of_its_own(folder, here):
    assert here("plot", "--output-dir", folder, "--features", "perplexity", "retention")[0] == 0
    assert pictures(folder) == {"perplexity.png", "retention.png"}
    output = folder / "mine.svg"
    assert here("plot", "--output-dir", folder, "--features", "retention", "perplexity", "--output", output)[0] == 0
    assert pictures(folder) == {"perplexity.png", "retention.png", "mine.svg", "mine_retention.svg"}


def test_without_any_trace_one_line_says_how_to_get_one(folder, here):
    for path in folder.glob("*.npz"):
        path.unlink()
    status, _, error = here("plot", "--output-dir", folder, "--features", "retention")
    assert status == 2
    assert len(error.splitlines()) == 1
    assert "sinkbench run --trace" in error
    assert pictures(folder) == set()


def test_an_unknown_feature_is_told_of_retention_too(folder, here):
    status, _, error = here("plot", "--output-dir", folder, "--features", "retentoin")
    assert (status, "vram" in error, "retention" in error) == (2, True, True)
