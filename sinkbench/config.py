"""The configuration: everything that decides a run. An option is declared once, here.

From a declaration follow the option of the command line and its help (:mod:`sinkbench.cli.options`), the key of an
experiment file (:mod:`sinkbench.sweeps.experiment`), what a record says, and what the key of a result is made of.
Nothing here looks at files, asks the Hub or imports torch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sinkbench.validation import (
    Device,
    Flag,
    Folder,
    Heat,
    Settings,
    Share,
    Size,
    SizeOrZero,
    Text,
    Whole,
    checked,
    one_of,
)

MODEL, TEXT = "smollm2-135m", "kjv"  # what comes from the package index (sinkbench.models.embedded)
CODE = "stdlib"  # what comes with Python
DTYPES = ("auto", "float32", "bfloat16", "float16")
ENGINES = ("stepwise", "parallel")
POSITIONS = ("cache", "text")
PROTOCOLS = ("stream", "windows", "strided", "llamacpp", "rolling")
STRATEGY, MODELS, DATA, OUTPUT, SPEED = "Strategy", "Model", "Dataset", "Output", "How to run"  # panels of --help


@dataclass(frozen=True)
class Option:
    """What is said of an option, beside its type and default.

    Attributes:
        metavar: what stands for its value in ``--help``; empty for a flag.
        help: one sentence.
        panel: of ``--help``.
        axis: whether an experiment file may list several values, for a run each.
        decides: whether its value, as it stands, decides the numbers of a run. Options that decide them by what they
            stand for (a model, a text, a strategy) are resolved for the key instead (:mod:`sinkbench.runs.key`).
        default: what ``--help`` shows as the default, where that is not the value.
        off: whether a flag has an opposite, ``--no-...``.
    """

    metavar: str
    help: str
    panel: str
    axis: bool = False
    decides: bool = False
    default: str | None = None
    off: bool = False


LATER = {  # options that decide, and that the first results were without
    "documents": False,
    "every": 1,
    "protocol": "stream",
    "context_length": None,
    "stride": None,
}


Dtype = Annotated[str, one_of(DTYPES)]
Place = Annotated[str, one_of(POSITIONS)]
Engine = Annotated[str, one_of(ENGINES)]
Protocol = Annotated[str, one_of(PROTOCOLS)]


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
        model: the model itself, where a program gave it; nothing is then loaded.
        tokenizer: the tokenizer itself, likewise.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    device_map: str | None = None
    random_weights: bool = False
    quantization: str | None = None
    allow_pickle: bool = False
    model: Any = field(default=None, hash=False, repr=False)
    tokenizer: Any = field(default=None, hash=False, repr=False)


@dataclass(frozen=True)
class Source:
    """Where the stream comes from.

    Attributes:
        name: a Hub id, a local file or folder, ``kjv``, or ``stdlib``.
        column: holds the text, or lists of token ids.
        rows: the dataset itself, where a program gave it: rows by column.
        task: the configuration of a Hub dataset.
        split: which split; a local file has one, which answers to any name.
        samples: rows to read; ``None``: all. Of an embedded text that is one stream, all are read.
        revision: branch, tag or commit of a Hub dataset.
        streaming: read rows as they are needed; otherwise the split is downloaded whole, and kept for later runs.
        documents: whether each row is a stream of its own; otherwise all are one.
    """

    name: str
    column: str = "text"
    rows: Any = field(default=None, hash=False, repr=False)
    task: str | None = None
    split: str = "test"
    samples: int | None = 1
    revision: str | None = None
    streaming: bool = True
    documents: bool = False


@dataclass(frozen=True)
class Objects:
    """What a program gave as objects (:mod:`sinkbench.library`); the options then say what these are called.

    Attributes:
        strategy: a class derived from :class:`sinkbench.strategies.Strategy`, or one with its parameters.
        model: a loaded model of transformers.
        tokenizer: a loaded tokenizer of transformers.
        rows: a dataset: rows by column.
        call: how the program asked for the run, in the place of a command line; empty where there was one.
    """

    strategy: Any = None
    model: Any = None
    tokenizer: Any = None
    rows: Any = None
    call: str = ""

    @property
    def given(self) -> list[str]:
        """What of these there is: a record of it cannot be repeated from its options alone."""
        return [name for name in ("strategy", "model", "tokenizer", "rows") if getattr(self, name) is not None]


class StrategyConfig(BaseModel):
    """What is kept: options that all commands share which run a strategy."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    experiment: Annotated[
        Text, Option("NAME", "What is kept: a name of `sinkbench strategies`, or FILE.py:CLASS.", STRATEGY, axis=True)
    ] = "attention_sinks"
    set: Annotated[
        Settings,
        Option("NAME=VALUE", "A parameter of the strategy; repeatable.", STRATEGY, default="the strategy's own"),
    ] = Field(default_factory=dict)
    positions: Annotated[
        Place | None,
        Option("NAME", "Where entries stand: cache or text.", STRATEGY, axis=True, default="the strategy's own"),
    ] = None
    kv_format: Annotated[
        Text,
        Option(
            "NAME", "How keys and values are stored: model, q8_0, q4_0, fp8_e4m3, kivi2, kivi4.", STRATEGY, axis=True
        ),
    ] = "model"
    window_size: Annotated[Size, Option("N", "Cache entries kept between steps.", STRATEGY, axis=True)] = 1024
    attention_sink_size: Annotated[
        SizeOrZero | None,
        Option(
            "N",
            "How many of them are the first tokens.",
            STRATEGY,
            axis=True,
            default="the strategy's own, 4 for attention_sinks",
        ),
    ] = None

    name: Text | None = None
    """What its files are called; by default as the strategy, and what differs from its defaults."""

    objects: Any = Field(default=Objects(), exclude=True, repr=False)
    """:class:`Objects`."""

    def but(self, **changes: Any) -> Self:
        """The same with some values changed; they are not checked again."""
        return self.model_copy(update=changes)


class ModelConfig(StrategyConfig):
    """Which model, beside what is kept."""

    model_name_or_path: Annotated[
        Text, Option("NAME", "Hub id, folder, .gguf file, or smollm2-135m (embedded).", MODELS, axis=True)
    ] = MODEL
    revision: Annotated[Text, Option("REV", "Branch, tag or commit on the Hub.", MODELS)] = "main"
    trust_remote_code: Annotated[Flag, Option("", "Run code that the model brings.", MODELS)] = False
    allow_pickle: Annotated[Flag, Option("", "Read pickled weights where there are no others.", MODELS)] = False
    dtype: Annotated[
        Dtype,
        Option(
            "TYPE",
            "auto, float32, bfloat16 or float16; auto is float32 on a CPU and the checkpoint's own on a GPU.",
            MODELS,
            axis=True,
        ),
    ] = "auto"
    device_map: Annotated[
        Device | None,
        Option("MAP", "As in transformers; auto spreads over GPUs.", MODELS, default="the first GPU, or the CPU"),
    ] = None

    @property
    def model(self) -> ModelSource:
        """Which model, and how it is to be loaded."""
        return ModelSource(
            name=self.model_name_or_path,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
            device_map=self.device_map,
            random_weights=getattr(self, "random_weights", False),
            quantization=getattr(self, "quantization", None),
            allow_pickle=self.allow_pickle,
            model=self.objects.model,
            tokenizer=self.objects.tokenizer,
        )


class RunConfig(ModelConfig):
    """Everything that decides a run: the options of ``sinkbench run``."""

    random_weights: Annotated[
        Flag, Option("", "Random weights; the model may be a config.json.", MODELS, decides=True)
    ] = False
    load_in_4bit: Annotated[Flag, Option("", "NF4 weights (bitsandbytes).", MODELS, decides=True)] = False
    load_in_8bit: Annotated[Flag, Option("", "8-bit weights (bitsandbytes).", MODELS, decides=True)] = False
    dataset_name: Annotated[
        Text, Option("NAME", "Hub id, file, folder, kjv (embedded), or stdlib (Python's own source).", DATA, axis=True)
    ] = TEXT
    dataset_revision: Annotated[Text, Option("REV", "Branch, tag or commit on the Hub.", DATA)] = "main"
    streaming: Annotated[
        Flag, Option("", "Read rows as needed; otherwise keep the whole split, for offline.", DATA, off=True)
    ] = True
    data_column: Annotated[Text, Option("NAME", "Column of text, or of lists of token ids.", DATA)] = "text"
    task: Annotated[Text | None, Option("NAME", "Configuration of the dataset.", DATA)] = None
    split: Annotated[Text, Option("NAME", "Split of the dataset.", DATA)] = "test"
    num_samples: Annotated[
        Size | None, Option("N", "Rows to read, at most.", DATA, default="1; with --documents, all")
    ] = None
    documents: Annotated[
        Flag, Option("", "Each row is a stream of its own, from an empty cache.", DATA, decides=True)
    ] = False
    num_tokens: Annotated[Size, Option("N", "Tokens to predict, of each stream.", DATA, decides=True)] = 8192
    reference: Annotated[
        Text | None,
        Option("NAME", "A strategy to diverge from, usually transformers: columns kl, same_top, reference_nll.", DATA),
    ] = None
    protocol: Annotated[
        Protocol,
        Option(
            "NAME",
            "stream; of dense attention also windows, strided, llamacpp, rolling: as others cut the text and score it.",
            DATA,
            decides=True,
        ),
    ] = "stream"
    context_length: Annotated[
        Size | None,
        Option("N", "Tokens of a window of --protocol.", DATA, decides=True, default="2048; 512 with llamacpp"),
    ] = None
    stride: Annotated[
        Size | None,
        Option("N", "Tokens from a window to the next (strided).", DATA, decides=True, default="half a window"),
    ] = None
    output_dir: Annotated[Folder, Option("DIR", "Where the rows (.csv) and their record (.json) go.", OUTPUT)] = Field(
        default=Path("results"), strict=False
    )
    overwrite: Annotated[Flag, Option("", "Replace an existing result.", OUTPUT)] = False
    resume: Annotated[Flag, Option("", "Go on behind the last row of a run cut short.", OUTPUT)] = False
    every: Annotated[Size, Option("N", "Write every N-th row, and the last of each stream.", OUTPUT, decides=True)] = 1
    trace: Annotated[
        Flag, Option("", "Write beside the rows how long each token was held, by layer and head.", OUTPUT)
    ] = False
    engine: Annotated[
        Engine,
        Option(
            "NAME", "stepwise: token by token; parallel: many tokens a forward, the same NLLs.", SPEED, decides=True
        ),
    ] = "stepwise"
    chunk_size: Annotated[
        Size | None,
        Option("N", "Tokens a forward (parallel engine).", SPEED, decides=True, default="by free memory"),
    ] = None
    cuda_graphs: Annotated[
        Flag, Option("", "Capture steps on CUDA where the model allows it.", SPEED, decides=True, off=True)
    ] = True

    @model_validator(mode="before")
    @classmethod
    def _of_protocol(cls, given: Any) -> Any:
        """What a protocol stands for: the usual windows, and many tokens a forward."""
        if not isinstance(given, dict) or given.get("protocol", "stream") not in PROTOCOLS[1:]:
            return given
        protocol, length = given["protocol"], given.get("context_length")
        if length is None:
            length = 512 if protocol == "llamacpp" else 2048
        usual = {"context_length": length, "engine": "parallel"}
        if protocol == "strided" and given.get("stride") is None and isinstance(length, int):
            usual["stride"] = max(1, length // 2)
        return {**given, **usual}

    @model_validator(mode="after")
    def _within_protocol(self) -> Self:
        reason = self._refused_by_protocol()
        if reason is not None:
            raise PydanticCustomError("protocol", "{reason}", {"reason": reason})
        return self

    def _refused_by_protocol(self) -> str | None:
        """What does not go with ``--protocol``; ``None`` where all does."""
        name, length, stride = self.protocol, self.context_length or 0, self.stride or 0
        least = {"stream": 0, "rolling": 1, "llamacpp": 3}.get(name, 2)
        reasons = {
            "--stride goes with --protocol strided alone": stride and name != "strided",
            "--context-length goes with a --protocol other than stream": length and name == "stream",
            f"--context-length must be at least {least} with --protocol {name} (got {length})": length < least,
            f"--stride {stride} would leave tokens out between windows of --context-length {length}": stride > length,
        }
        if name != "stream":
            reasons |= {
                f"--protocol {name} is of dense attention: give --experiment transformers": (
                    self.experiment != "transformers"
                ),
                f"--protocol {name} carries no cache that could be stored in a --kv-format": self.kv_format != "model",
            }
            excluded = ("reference", "documents", "resume", "trace")
            reasons |= {
                f"--protocol {name} and --{other} exclude each other": getattr(self, other) for other in excluded
            }
        return next((reason for reason, holds in reasons.items() if holds), None)

    @model_validator(mode="after")
    def _excluding(self) -> Self:
        for one, other in (("overwrite", "resume"), ("load_in_4bit", "load_in_8bit"), ("documents", "trace")):
            if getattr(self, one) and getattr(self, other):
                flags = {"one": one.replace("_", "-"), "other": other.replace("_", "-")}
                raise PydanticCustomError("exclude", "--{one} and --{other} exclude each other", flags)
        return self

    @property
    def quantization(self) -> str | None:
        """``4bit``, ``8bit``, or ``None``."""
        return "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else None

    @property
    def source(self) -> Source:
        """Where the stream comes from."""
        return Source(
            name=self.dataset_name,
            column=self.data_column,
            rows=self.objects.rows,
            task=self.task,
            split=self.split,
            samples=self.num_samples or (None if self.documents else 1),
            revision=self.dataset_revision,
            streaming=self.streaming,
            documents=self.documents,
        )

    @property
    def csv(self) -> Path:
        """Where the rows go; the record lies beside it, with the suffix ``.json``."""
        return self.output_dir / f"{self.name or self.experiment}.csv"

    @property
    def deciding(self) -> dict[str, Any]:
        """The options that decide the numbers as they stand; what the other engine alone looks at is left out.

        So is what came later than the first results, as long as it is as it was before.
        """
        other = "chunk_size" if self.engine == "stepwise" else "cuda_graphs"
        options = options_of(type(self)).items()
        values = {name: getattr(self, name) for name, option in options if option.decides and name != other}
        return {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}


TALK, WRITING = "Conversation", "Text"  # panels of --help
PROMPT = "Once upon a time, in a small village by the sea, there lived"


class GenerateConfig(ModelConfig):
    """Everything that decides a generated text: the options of ``sinkbench generate``."""

    prompt: Annotated[str, Option("TEXT", "What the text begins with.", WRITING)] = PROMPT
    max_new_tokens: Annotated[Size, Option("N", "Tokens to write; none ends the text.", WRITING)] = 2000
    temperature: Annotated[Heat, Option("X", "0 takes the likeliest token.", WRITING)] = 1.0
    top_p: Annotated[Share, Option("X", "Share of the likeliest tokens.", WRITING)] = 0.95
    seed: Annotated[Whole, Option("N", "Of the sampling.", WRITING)] = 0
    output_dir: Annotated[Folder, Option("DIR", "Where generate_<experiment>.csv goes.", OUTPUT)] = Field(
        default=Path("results"), strict=False
    )
    overwrite: Annotated[Flag, Option("", "Replace an existing result.", OUTPUT)] = False

    @property
    def csv(self) -> Path:
        """Where the rows go."""
        return self.output_dir / f"generate_{self.name or self.experiment}.csv"


class ChatConfig(ModelConfig):
    """Everything that decides a conversation: the options of ``sinkbench chat``."""

    system: Annotated[str | None, Option("TEXT", "The system message.", TALK)] = None
    max_new_tokens: Annotated[Size, Option("N", "Longest answer, in tokens.", TALK)] = 256
    temperature: Annotated[Heat, Option("X", "0 takes the likeliest token.", TALK)] = 0.7
    top_p: Annotated[Share, Option("X", "Share of the likeliest tokens.", TALK)] = 0.9
    seed: Annotated[Whole, Option("N", "Of the sampling.", TALK)] = 0


def options_of(config: type[BaseModel]) -> dict[str, Option]:
    """What is said of each option of a configuration; fields of which nothing is said are none."""
    found = {
        name: next((said for said in field.metadata if isinstance(said, Option)), None)
        for name, field in config.model_fields.items()
    }
    return {name: option for name, option in found.items() if option is not None}


Config = TypeVar("Config", bound=BaseModel)


def flag(name: str) -> str:
    """How the option of this name is given on the command line."""
    return f"--{name.replace('_', '-')}"


def configured(config: type[Config], given: dict[str, Any]) -> Config:
    """The configuration that a command line, or a program, gives.

    Raises:
        UserError: one line that names the option.
    """
    return checked(config, given, lambda key: f"{flag(key)} " if key else "")
