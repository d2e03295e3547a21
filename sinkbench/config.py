"""What a run is asked for."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict

from sinkbench.strategies.registry import BUILTIN as STRATEGIES
from sinkbench.validation import Axis, Count, Flag, Text, Whole, one_of


@dataclass(frozen=True)
class ModelSource:
    """Which model, and how it is to be loaded.

    Attributes:
        name: a Hub id, a local folder, a ``.gguf`` file, or ``smollm2-135m``.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run code that the model brings.
        dtype: ``auto`` is float32 on a CPU and the checkpoint's own dtype on a GPU.
        device_map: as in transformers (``auto`` spreads over all GPUs); by default the first GPU, or the CPU.
        random_weights: draw the weights at random, for latency and memory without a download; ``name`` may then be a
            ``config.json`` or a folder with one.
        quantization: ``4bit`` or ``8bit`` weights, through bitsandbytes.
        allow_pickle: read ``pytorch_model.bin`` where there are no safetensors: tensors only, no code in it runs.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    device_map: str | None = None
    random_weights: bool = False
    quantization: str | None = None
    allow_pickle: bool = False

    @cached_property
    def location(self) -> dict[str, Any]:
        """The arguments by which transformers finds it."""
        from sinkbench.models.loading import locate

        return locate(self)


@dataclass(frozen=True)
class Source:
    """Where the stream comes from.

    Attributes:
        name: a Hub id, a local file or folder, or ``kjv``.
        column: holds the text, or lists of token ids.
        task: the configuration of a Hub dataset.
        split: which split; a local file has one, which answers to any name.
        samples: rows to read as one stream.
        revision: branch, tag or commit of a Hub dataset.
        streaming: read rows as they are needed; otherwise the split is downloaded whole, and kept for later runs.
    """

    name: str
    column: str = "text"
    task: str | None = None
    split: str = "test"
    samples: int = 1
    revision: str | None = None
    streaming: bool = True


@dataclass(frozen=True)
class RunOptions:
    """Everything that decides a run; the fields are the options of ``sinkbench run``.

    ``name`` is what its files are called; by default as the experiment is.
    """

    experiment: str = "attention_sinks"
    model: ModelSource = field(default_factory=lambda: ModelSource("smollm2-135m"))
    source: Source = field(default_factory=lambda: Source("kjv"))
    num_tokens: int = 8192
    window_size: int = 1024
    attention_sink_size: int = 4
    engine: str = "stepwise"
    chunk_size: int | None = None
    cuda_graphs: bool = True
    output_dir: Path = Path("results")
    overwrite: bool = False
    resume: bool = False
    name: str | None = None

    @property
    def csv(self) -> Path:
        """Where the rows go; the record lies beside it, with the suffix ``.json``."""
        return self.output_dir / f"{self.name or self.experiment}.csv"


AXES = ("model_name_or_path", "experiment", "window_size", "attention_sink_size", "dtype", "dataset_name")


DTYPES = ("auto", "float32", "bfloat16", "float16")


ENGINES = ("stepwise", "parallel")


class Options(BaseModel):
    """The options of ``sinkbench run`` as a file gives them, with the same defaults; an axis is a list of values."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    experiment: Axis[Annotated[str, one_of(STRATEGIES)]] = ["attention_sinks"]
    window_size: Axis[Count] = [1024]
    attention_sink_size: Axis[Whole] = [4]
    model_name_or_path: Axis[Text] = ["smollm2-135m"]
    revision: Text = "main"
    trust_remote_code: Flag = False
    allow_pickle: Flag = False
    dtype: Axis[Annotated[str, one_of(DTYPES)]] = ["auto"]
    device_map: Text | None = None
    random_weights: Flag = False
    load_in_4bit: Flag = False
    load_in_8bit: Flag = False
    dataset_name: Axis[Text] = ["kjv"]
    dataset_revision: Text = "main"
    streaming: Flag = True
    data_column: Text = "text"
    task: Text | None = None
    split: Text = "test"
    num_samples: Count = 1
    num_tokens: Count = 8192
    output_dir: Text = "results"
    overwrite: Flag = False
    resume: Flag = False
    engine: Annotated[str, one_of(ENGINES)] = "stepwise"
    chunk_size: Count | None = None
    cuda_graphs: Flag = True
