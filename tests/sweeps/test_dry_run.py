"""What a sweep would do is said at once, however many cells it has."""

import resource

import pytest
from golden import GOLDEN

from sinkbench.cli import matrix

LLAMA = GOLDEN / "llama"


@pytest.fixture
def file(tmp_path):
    def write(windows, models=1):
        names = [str(LLAMA), str(GOLDEN / "falcon")][:models]
        path = tmp_path / "many.toml"
        path.write_text(
            f"model_name_or_path = {names}\ndataset_name = '{LLAMA / 'tokens.jsonl'}'\ndata_column = 'input_ids'\n"
            f"dtype = 'float32'\nnum_tokens = 200\nexperiment = ['attention_sinks', 'windowed']\n"
            f"window_size = {list(range(40, 40 + windows))}\nattention_sink_size = [0, 1, 2, 4]\n"
            f"output_dir = '{tmp_path / 'out'}'\n"
        )
        return path

    return write


def test_the_sizes_of_a_model_are_read_once_for_all_its_cells(here, file, monkeypatch):
    read, real = [], matrix.Experiments.shape
    monkeypatch.setattr(matrix.Experiments, "shape", lambda self, model: read.append(model.name) or real(self, model))
    status, out, _ = here("sweep", file(windows=12, models=2), "--dry-run")
    assert (status, out.count("GiB")) == (0, 2 * 12 * 5)
    assert read == [str(LLAMA), str(GOLDEN / "falcon")]


def test_a_table_that_is_too_long_to_be_laid_out_has_a_line_a_cell(here, file, tmp_path):
    status, out, _ = here("sweep", file(windows=110), "--dry-run")
    assert status == 0
    title, heads, *lines = out.splitlines()
    assert title.endswith("many.toml: 550 runs")
    assert heads.split() == ["run", "model", "dtype", "tokens", "memory", "time"]
    assert len({line.split()[0] for line in lines if "GiB" in line}) == 550
    assert lines[0].split()[:4] == ["attention_sinks-window_40-sinks_0", str(LLAMA), "float32", "200"]
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
def test_ten_thousand_cells_take_no_more_than_two_and_a_half_times_what_ten_take(sinkbench, file):
    """Of the processor, which others share and whose speed changes: ten cost what it takes to begin."""

    def cost(windows):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = sinkbench("sweep", file(windows), "--dry-run")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (shown.returncode, f"{5 * windows} runs" in shown.stdout) == (0, True)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    ten = min(cost(2) for _ in range(2))
    assert cost(2000) < 2.5 * ten
