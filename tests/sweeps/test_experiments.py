"""Experiment files: what they may say, the runs they span, and the files that come with the package."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import GOLDEN, golden_options
from transformers import AutoConfig, AutoModelForCausalLM

from sinkbench.config import ModelSource, RunConfig, options_of
from sinkbench.errors import UserError
from sinkbench.models.loading import locate
from sinkbench.models.sizes import ModelSizes, read_sizes, sizes_of
from sinkbench.sweeps.experiment import AXES, Experiments, Listed, read_experiments, read_options, slugs

ROOT = Path(__file__).parents[2]
# whose results are in the repository
MADE = {"benchmark", "benchmark_cpu", "smollm2_135m_cpu", "smollm2_135m_eviction"}
FURTHER = {"smollm2_135m_h200"}  # neither that, nor the seed's settings for another model
EVERY = sorted((ROOT / "experiments").glob("*.toml"))
SHIPPED = [path for path in EVERY if path.stem not in MADE | FURTHER]
ALL = 'experiment = ["transformers", "windowed", "attention_sinks", "recompute"]\n'


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    """A file with this text."""

    def write(text: str) -> Path:
        path = tmp_path / "x.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def reading(written: Callable[[str], Path]) -> Callable[[str], Experiments]:
    return lambda text: read_experiments(written(text))


def names(cells: list[RunConfig]) -> list[str]:
    return [str(cell.csv.relative_to("results")) for cell in cells]


# What a file may say


def test_the_keys_are_the_options_of_run_with_the_same_defaults(reading) -> None:
    assert set(Listed.model_fields) == set(options_of(RunConfig))
    one = {key: value[0] if key in AXES else value for key, value in reading("").options.model_dump().items()}
    assert RunConfig(**one) == RunConfig()


def test_words_may_be_joined_by_hyphens(reading) -> None:
    assert reading("window-size = 16\nnum-tokens = 9\n").options.window_size == [16]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('window_size = "big"', 'window_size: must be an integer of at least 1 (got "big")'),
        ("window_size = [256, 0]", "window_size: must be an integer of at least 1 (got 0)"),
        ("window_size = true", "window_size: must be an integer of at least 1 (got true)"),
        ("window_size = 256.0", "window_size: must be an integer of at least 1 (got 256.0)"),
        ("window_size = []", "window_size: must name at least one value (got [])"),
        ("attention-sink-size = -1", "attention_sink_size: must be an integer of at least 0 (got -1)"),
        (
            'experiment = "window"',
            'experiment "window" is no strategy; did you mean windowed?',
        ),
        ('dtype = "fp16"', 'dtype: must be one of auto, float32, bfloat16, float16 (got "fp16")'),
        ('engine = "fast"', 'engine: must be one of stepwise, parallel (got "fast")'),
        ("overwrite = 1", "overwrite: must be true or false (got 1)"),
        ('split = ""', 'split: must be a text that is not empty (got "")'),
        ("num_tokens = 1979-05-27", 'num_tokens: must be an integer of at least 1 (got "1979-05-27")'),
        ("window = 16", "window: is not known; did you mean window_size?"),
        ("zzz = 16", "zzz: is not known; there are allow_pickle, attention_sink_size, chunk_size, "),
        ("[model]\nname = 1", "model: is not known"),
        ("window-size = 16\nwindow_size = 16", "window_size: is given twice, with - and with _"),
        ("num_tokens = 5\nwindow_size = \n", "is not TOML: Invalid value (at line 2, column 15)"),
        ("experiment = 3", "experiment: must be a name, or a table with a name (got 3)"),
        ('experiment = "dense"', "one of your own is path/to/file.py:ClassName"),
        ('experiment = { nam = "h2o" }', 'experiment: a table must have a name, as { name = "random", seed = 3 } (got'),
        ('experiment = { name = "h2o", recnt = 3 }', "h2o has no parameter 'recnt'; did you mean recent?"),
        ('experiment = { name = "h2o", recent = -3 }', "set.recent: must be an integer of at least 0 (got -3)"),
        ('experiment = { name = "h2o", positions = "up" }', 'positions: must be one of cache, text (got "up")'),
        ('experiment = { name = "h2o", sinks = 3 }\nattention_sink_size = 2', "exclude each other"),
        ('experiment = { name = "h2o", window_size = 0 }', "window_size: must be an integer of at least 1 (got 0)"),
        ('dataset_name = { nam = "kjv" }', 'dataset_name: a table must have a name, as { name = "stdlib", documents'),
        (
            'dataset_name = { name = "kjv", window_size = 3 }',
            "dataset_name: 'window_size' is no option about the dataset; there are context_length, data_column,",
        ),
        ('dataset_name = { name = "kjv", num_tokens = 0 }', "num_tokens: must be an integer of at least 1 (got 0)"),
        ('dataset_name = ["kjv", { name = "kjv", num_tokens = 3 }]', "dataset_name: kjv stands in several entries"),
        ("set = 3", "set: must be a table (got 3)"),
        ("[set]\nrecent = 3", "set.recent: is no parameter of any strategy of this file"),
        ('kv_format = "q9"', 'kv_format "q9" is not known; there are model, q8_0'),
        ("load_in_4bit = true\nload_in_8bit = true", "load_in_4bit and load_in_8bit exclude each other"),
        ('window_size = "big"\nnum_tokens = 0\nsplit = 1', '(got "big") (and 2 more)'),
        ("shape = 3", "shape: must be a table (got 3)"),
        ("[shape]\nlayers = 2", "shape.parameters: is missing (and 6 more)"),
        ('[shape]\nlayers = "two"', 'shape.layers: must be an integer of at least 1 (got "two")'),
        ("[shape]\nlayer = 2", "shape.layer: is not known; did you mean layers?"),
        ('model_name_or_path = ["a", "b"]\n[shape]\nlayers = 2', "shape: must be a table for each model, as [shape"),
        (
            'model_name_or_path = "abc"\n[shape.abd]\nlayers = 2',
            "shape: 'abd' is no model of this file; did you mean abc?",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_file_key_and_what_is_allowed(written, text: str, said: str) -> None:
    path = written(text)
    with pytest.raises(UserError) as error:
        read_experiments(path)
    line = str(error.value)
    assert line.startswith(f"{path}: ")
    assert said in line
    assert "\n" not in line


def test_only_axes_may_be_lists_and_the_message_says_which(reading) -> None:
    with pytest.raises(UserError, match=r"num_tokens: must be .* \(got \[1, 2\]\); only .*window_size.* may be lists"):
        reading("num_tokens = [1, 2]")


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml: cannot be read: No such file"):
        read_experiments(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'split = "\xe9"')
    with pytest.raises(UserError, match=r"latin\.toml: is not UTF-8.*byte 9"):
        read_experiments(tmp_path / "latin.toml")


def test_more_sinks_than_window_are_refused_where_the_strategy_has_sinks(reading) -> None:
    sizes = "window_size = [4, 256]\nattention_sink_size = 4\n"
    with pytest.raises(
        UserError,
        match=r"window of 4 must be larger than the 4 attention sinks: raise window_size or lower attention_sink_size",
    ):
        reading(sizes + 'experiment = ["windowed", "attention_sinks"]\n')
    assert len(reading(sizes + 'experiment = ["windowed", "transformers"]\n').cells()) == 3


# The runs


def test_without_lists_a_file_is_one_run_named_after_its_experiment(reading) -> None:
    (cell,) = reading('experiment = "windowed"\nload_in_4bit = true\nchunk_size = 64\nstreaming = false\n').cells()
    assert names([cell]) == ["windowed.csv"]
    assert (cell.experiment, cell.model.quantization, cell.chunk_size) == ("windowed", "4bit", 64)
    assert not cell.source.streaming


def test_a_strategy_runs_once_for_all_values_of_a_size_that_it_ignores(reading) -> None:
    cells = reading(ALL + "window_size = [256, 1024]\nattention_sink_size = [1, 4]\n").cells()
    assert names(cells) == [
        "transformers.csv",
        "windowed-window_256.csv",
        "windowed-window_1024.csv",
        "attention_sinks-window_256-sinks_1.csv",
        "attention_sinks-window_256-sinks_4.csv",
        "attention_sinks-window_1024-sinks_1.csv",
        "attention_sinks-window_1024-sinks_4.csv",
        "recompute-window_256.csv",
        "recompute-window_1024.csv",
    ]


def test_a_file_holds_several_settings_of_one_strategy(reading) -> None:
    cells = reading(
        'experiment = ["h2o", { name = "h2o", recent = 64, sinks = 4 }, { sinks = 4, recent = 64, name = "h2o" }, '
        '{ name = "h2o", sinks = 2, positions = "cache", kv-format = "q8_0" }, "windowed", "random"]\n'
        "[set]\nrecent = 32\n"
    ).cells()
    assert names(cells) == [
        "h2o-recent_32.csv",
        "h2o-sinks_4-recent_64.csv",  # once: in which order parameters are given makes no difference
        "h2o-sinks_2-recent_32-cache-q8_0.csv",
        "windowed.csv",
        "random-recent_32.csv",
    ]
    assert [cell.set for cell in cells[-2:]] == [{}, {"recent": 32}]


IDEA = '''from sinkbench.strategies import Eviction
class MyIdea(Eviction):
    """Mine."""
    beta: float = 0.5
    def score(self, held): ...
'''


def test_settings_that_differ_in_a_sign_have_files_of_their_own(reading, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(IDEA)
    entries = ", ".join(f'{{ name = "{tmp_path}/mine.py:MyIdea", beta = {beta} }}' for beta in (0.5, 0.25, -0.25))
    found = names(reading(f"experiment = [{entries}]\n").cells())
    assert found == ["my_idea.csv", "my_idea-beta_0.25.csv", "my_idea-beta_-0.25.csv"]


def test_two_runs_that_would_share_a_file_are_refused(reading, tmp_path: Path) -> None:
    for name in ("mine", "yours"):
        (tmp_path / f"{name}.py").write_text(IDEA + f"# {name}\n")
    both = [f"{tmp_path}/{name}.py:MyIdea" for name in ("mine", "yours")]
    with pytest.raises(UserError, match=r"mine.py:MyIdea and .*yours.py:MyIdea would both be written to my_idea.csv"):
        reading(f"experiment = {json.dumps(both)}\n")


def test_a_single_value_is_not_part_of_a_name(reading) -> None:
    cells = reading(ALL + "attention_sink_size = [0, 4]\n").cells()
    assert names(cells)[2:4] == ["attention_sinks-sinks_0.csv", "attention_sinks-sinks_4.csv"]
    assert names(cells)[:2] == ["transformers.csv", "windowed.csv"]


def test_values_given_twice_count_once(reading) -> None:
    assert len(reading('window_size = [256, 256]\ndtype = ["auto", "auto"]\n').cells()) == 1


def test_runs_of_one_model_stay_together_and_lie_in_a_folder_for_each_combination(reading) -> None:
    cells = reading(
        'model_name_or_path = ["org/A-1", "B"]\ndataset_name = ["kjv", "texts/kjv.txt"]\ndtype = "auto"\n'
        'experiment = ["windowed", "transformers"]\n'
    ).cells()
    assert [cell.model.name for cell in cells] == ["org/A-1"] * 4 + ["B"] * 4
    assert names(cells)[:4] == [
        "a_1/kjv/windowed.csv",
        "a_1/kjv/transformers.csv",
        "a_1/kjv.txt/windowed.csv",
        "a_1/kjv.txt/transformers.csv",
    ]


def test_an_entry_says_which_windows_are_its_own(reading) -> None:
    cells = reading(
        'experiment = ["windowed", { name = "recompute", window_size = [8, 9] }]\nwindow_size = [8, 16]'
    ).cells()
    assert names(cells) == [
        *("windowed-window_8.csv", "windowed-window_16.csv"),
        *("recompute-window_8.csv", "recompute-window_9.csv"),
    ]


def test_an_entry_about_a_text_has_options_of_its_own(reading) -> None:
    texts = 'dataset_name = ["kjv", { name = "stdlib", documents = true, num-samples = 3, num_tokens = 9 }]\n'
    stream, documents = reading(texts + 'num_tokens = 50\nexperiment = "windowed"\n').cells()
    assert names([stream, documents]) == ["kjv/windowed.csv", "stdlib/windowed.csv"]
    assert (stream.documents, stream.num_samples, stream.num_tokens) == (False, None, 50)
    assert (documents.documents, documents.num_samples, documents.num_tokens) == (True, 3, 9)
    assert documents.dataset_name == "stdlib"


def test_no_two_runs_share_a_file(reading) -> None:
    cells = reading(
        ALL + 'window_size = [64, 128]\nattention_sink_size = [0, 4]\ndtype = ["float32", "bfloat16"]\n'
        'model_name_or_path = ["a/x", "b/x", "b/X"]\ndataset_name = ["kjv", "d/kjv"]\n'
    ).cells()
    assert len(cells) == 3 * 2 * 2 * (1 + 2 + 4 + 2)
    assert len({str(cell.csv).lower() for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    "given", [["a/x", "b/x"], ["x", "X"], ["..", "../.."], ["/", "//"], ["a/b", "a_b"], ["é", "è"], ["1_a", "a", "A"]]
)
def test_folder_names_are_distinct_and_stay_in_their_folder(given: list[str]) -> None:
    found = slugs(given)
    assert list(found) == given
    assert len(set(found.values())) == len(given)
    assert all(slug and slug == slug.lower() and Path(slug).name == slug for slug in found.values())


def test_each_of_several_models_has_a_shape_of_its_own_or_that_of_its_configuration(reading) -> None:
    sizes = "layers = 2\nparameters = 9\nhidden_size = 8\nintermediate_size = 8\nheads = 1\nkv_heads = 1\n"
    sizes += "head_dim = 8\nvocab_size = 5\n"
    golden = GOLDEN / "llama"
    experiments = reading(f'model_name_or_path = ["org/a", "{golden}"]\n[shape."org/a"]\n{sizes}')
    shapes = [experiments.shape(cell.model) for cell in experiments.cells()]
    assert shapes[0].parameters == 9
    assert shapes[1] == read_sizes(locate(ModelSource(str(golden))))


# `run --config`


def test_run_takes_the_one_run_of_a_file_that_the_line_picks(here, written, tmp_path: Path) -> None:
    config = written(ALL + 'window_size = [16, 32]\nnum_tokens = 12\ndtype = "float32"\n[shape]\n')
    line = [*golden_options("llama")[:6], "--config", config, "--output-dir", tmp_path / "out"]
    status, _, error = here("run", *line, "--window-size", "16")
    assert status == 2
    assert f"{config}: experiment: has several values (transformers, windowed," in error
    assert "--experiment" in error
    assert "sinkbench sweep" in error
    assert here("run", *line, "--window-size", "16", "--experiment", "windowed")[0] == 0
    assert (tmp_path / "out" / "windowed.csv").read_text().count("\n") == 13


def option_of(path: Path, **given: Any) -> RunConfig:
    return RunConfig(**read_options(path, given))


def test_the_line_picks_a_strategy_and_has_what_the_file_sets_for_it(written) -> None:
    config = written(
        'experiment = ["windowed", { name = "h2o", sinks = 4, positions = "cache" }]\n'
        'positions = ["text", "cache"]\n[set]\nrecent = 8\n'
    )
    picked = option_of(config, experiment="h2o")
    assert (picked.set, picked.positions) == ({"recent": 8, "sinks": 4}, "cache")
    assert option_of(config, experiment="h2o", set={"recent": 9}).set == {"recent": 9, "sinks": 4}
    assert option_of(config, experiment="windowed", positions="text").set == {}
    assert option_of(config, experiment="random", positions="text").set == {"recent": 8}
    with pytest.raises(UserError, match=r"positions: has several values \(text, cache\): give one with --positions"):
        option_of(config, experiment="windowed")
    with pytest.raises(UserError, match="several settings of h2o"):
        option_of(written('experiment = ["h2o", { name = "h2o", sinks = 4 }]\n'), experiment="h2o")


def test_a_run_takes_the_options_that_the_file_has_for_its_text_and_strategy(written) -> None:
    config = written(
        'dataset_name = { name = "stdlib", num_tokens = 9, documents = true }\n'
        'experiment = ["windowed", { name = "recompute", window_size = 5 }]\nnum_tokens = 50\n'
    )
    found = option_of(config, experiment="recompute")
    assert (found.dataset_name, found.num_tokens, found.documents, found.window_size) == ("stdlib", 9, True, 5)
    assert option_of(config, experiment="recompute", window_size=6, num_tokens=8).num_tokens == 8
    elsewhere = option_of(config, experiment="windowed", dataset_name="kjv")
    assert (elsewhere.dataset_name, elsewhere.num_tokens, elsewhere.documents) == ("kjv", 50, False)


def test_what_a_file_gives_is_named_where_it_is_wrong_for_the_line(here, written) -> None:
    config = written("window_size = 16\nattention_sink_size = 4\n")
    status, _, error = here("run", "--config", config, "--window-size", "4")
    assert (status, len(error.splitlines())) == (2, 1)
    assert "larger than the 4 attention sinks" in error
    assert f"with the options of {config}" in error


def test_run_refuses_what_a_sweep_refuses(here, written) -> None:
    status, _, error = here("run", "--config", written("window_sise = 16\n"))
    assert status == 2
    assert "window_sise: is not known; did you mean window_size?" in error


# The files that come with the package

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {  # model type, and what decides a count beside the sizes
    "llama_2_7b": ("llama", {}),
    "falcon_7b": ("falcon", {"multi_query": True, "parallel_attn": True, "bias": False}),
    "mpt_7b": ("mpt", {"attn_config": {"alibi": True}}),
    "pythia_6_9b": ("gpt_neox", {"rotary_pct": 0.25}),
    "mistral_7b": ("mistral", {"sliding_window": 4096}),
    "gptj_6b": ("gptj", {"rotary_dim": 64}),
    "qwen_7b": ("qwen2", {}),
    "stablelm_3b": ("stablelm", {"use_qkv_bias": False}),
    "yi_6b": ("llama", {}),
    "llama_3_1_8b": ("llama", {}),
    "qwen3_8b": ("qwen3", {}),
    "gemma_3_4b": ("gemma3", {"sliding_window": 1024}),
    "gpt_oss_20b": ("gpt_oss", {"num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128}),
    "olmo_2_7b": ("olmo2", {}),
    "smollm2_135m": ("llama", {"tie_word_embeddings": True, "dtype": "float32"}),
}
NAMES = {  # where a configuration calls a size otherwise
    "mpt": {"num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "hidden_size": "d_model"},
    "gptj": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd"},
}
VISION = {  # of Gemma 3 4B: SigLIP
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}


def instance(model_type: str, shape: ModelSizes, more: dict[str, Any]) -> Any:
    """The model of these sizes without weights."""
    sizes = {
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context_length,
    }
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if shape.head_dim * shape.heads != shape.hidden_size:
        sizes["head_dim"] = shape.head_dim
    values = {NAMES.get(model_type, {}).get(key, key): value for key, value in (sizes | more).items()}
    if model_type == "gemma3":
        values = {"text_config": values, "vision_config": VISION}
    config = AutoConfig.for_model(model_type, **values)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files_are_valid_and_have_the_shape_of_each_model(path: Path) -> None:
    experiments = read_experiments(path)
    assert set(experiments.shapes) == set(experiments.options.model_name_or_path)
    assert {cell.experiment for cell in experiments.cells()} == {"transformers", "windowed", "attention_sinks"}
    assert str(experiments.options.output_dir) == f"results/{path.stem}"
    assert path.read_text().startswith("# ")


def test_there_is_a_file_for_every_model_promised() -> None:
    assert {path.stem for path in SHIPPED} == {*CONFIGS, "btlm_3b"}


@pytest.mark.parametrize("stem", sorted(MADE))
def test_results_in_the_repository_are_those_of_their_file(stem: str) -> None:
    cells = read_experiments(next(path for path in EVERY if path.stem == stem)).cells()
    assert {cell.csv for cell in cells} == {path.relative_to(ROOT) for path in (ROOT / "results" / stem).rglob("*.csv")}
    records = [json.loads((ROOT / cell.csv).with_suffix(".json").read_text()) for cell in cells]
    assert {tuple(record["command"]) for record in records} == {("sinkbench", "sweep", f"experiments/{stem}.toml")}
    assert len({json.dumps(record["versions"]) for record in records}) == 1
    assert {record["exit_reason"] for record in records} <= {"finished", "end of text"}
    for cell, record in zip(cells, records, strict=True):
        asked = cell.model_dump(mode="json")
        # what was no option then is as it was; all records without documents are of one row, said by its number
        said = {**RunConfig().model_dump(mode="json"), **record["options"]}
        if not cell.documents:
            assert (record["options"]["num_samples"] or 1) == cell.source.samples
            said["num_samples"] = asked["num_samples"]
        # a run that was made again by itself has no folder of its axes
        deciding = [name for name in asked if name not in ("resume", "trace", "output_dir")]
        assert {name: said[name] for name in deciding} == {name: asked[name] for name in deciding}


@pytest.mark.parametrize("stem", CONFIGS)
def test_the_shapes_are_those_of_the_architectures(stem: str) -> None:
    (shape,) = read_experiments(next(path for path in SHIPPED if path.stem == stem)).shapes.values()
    assert sizes_of(instance(CONFIGS[stem][0], shape, CONFIGS[stem][1])) == shape


def test_btlm_has_the_parameters_of_its_sizes() -> None:
    # transformers has no class for it: GPT-2's blocks with SwiGLU, ALiBi and a tied head
    (shape,) = read_experiments(next(path for path in SHIPPED if path.stem == "btlm_3b")).shapes.values()
    width, inner = shape.hidden_size, shape.intermediate_size
    attention = width * 3 * width + 3 * width + width * width + width
    feed_forward = 2 * (width * inner + inner) + inner * width + width
    layer = attention + feed_forward + 2 * 2 * width
    assert shape.parameters == shape.layers * layer + shape.vocab_size * width + 2 * width


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_settings_are_the_seeds(path: Path) -> None:
    options = read_experiments(path).options
    assert options.attention_sink_size == [4]
    if path.stem == "smollm2_135m":
        assert (options.model_name_or_path, options.dataset_name, options.engine) == (
            ["smollm2-135m"],
            ["kjv"],
            "parallel",
        )
        return
    assert (options.dataset_name, options.data_column, options.split) == (["emozilla/pg19-test"], "text", "test")
    assert options.window_size == [2048 if path.stem == "btlm_3b" else 1024]
    assert options.num_tokens == (16384 if path.stem in ("btlm_3b", "mistral_7b") else 8192)
    assert options.engine == "stepwise"
