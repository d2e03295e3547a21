"""Models and tokenizers: from the Hub, a local folder, a ``.gguf`` file, or the embedded one."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from sinkbench.config import ModelSource
from sinkbench.errors import UserError
from sinkbench.files import SPECIAL, is_special, read_json
from sinkbench.models import embedded, hub
from sinkbench.models.checkpoints import check_complete, check_config, check_finite, refuse_adapters, refuse_pickles
from sinkbench.models.gguf import unpacked
from sinkbench.models.given import attention_for, fingerprint
from sinkbench.models.silence import silent
from sinkbench.models.sizes import layer_sizes
from sinkbench.signals import check
from sinkbench.strategies import Chosen
from sinkbench.strategies.formats import Format

MOST_LAYERS = 10_000
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A model that has been found.

    Attributes:
        arguments: those by which transformers finds it; none of a model that was given as an object.
        fingerprint: of such a model, as it was when it was given.
    """

    source: ModelSource
    arguments: dict[str, Any] = field(hash=False)
    fingerprint: str = ""


def locate(source: ModelSource) -> Checkpoint:
    """Find a model: a Hub model is pinned to one commit, a GGUF file unpacked, one that is at hand looked at.

    Raises:
        UserError: it is not there, may not be had, is damaged, or missing embedded packages.
    """
    if source.model is not None:
        return Checkpoint(source, {}, fingerprint(source.model))
    with _explained(source):
        arguments = _arguments(source)
        _check_layers(source.name, Path(arguments["pretrained_model_name_or_path"]))
        return Checkpoint(source, arguments)


@dataclass
class Locator:
    """:func:`locate` for runs that share models: each is looked for once, and again only where it was not found."""

    found: dict[ModelSource, Checkpoint] = field(default_factory=dict)

    def __call__(self, source: ModelSource) -> Checkpoint:
        if source not in self.found:
            self.found[source] = locate(source)
        return self.found[source]


def _arguments(source: ModelSource) -> dict[str, Any]:
    name = str(embedded.model_file()) if source.name == embedded.MODEL else source.name
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"no such file: {path}")
        return unpacked(path)
    if is_special(path):
        raise UserError(f"cannot read {path}: {SPECIAL}")
    if source.random_weights and path.suffix == ".json" and path.is_file():
        return {"pretrained_model_name_or_path": str(path)}
    if path.is_dir():
        _check_files(path)
        _check_weights(source, os.listdir(path))
        return {"pretrained_model_name_or_path": str(path)}
    if path.is_absolute() or name.startswith((".", "~")) or path.is_file():
        raise UserError(f"no model folder {name!r}: give a Hub id, a folder with config.json, or a .gguf file")
    pinned = hub.pin("model", name, source.revision)
    _check_weights(source, pinned.files)
    only = {} if pinned.reachable else {"local_files_only": True}
    return {"pretrained_model_name_or_path": name, "revision": pinned.commit, **only}


def _check_files(folder: Path) -> None:
    """Refuse what loading would wait for: whatever in ``folder``, or named by its index, is no file."""
    special = next((entry for entry in [*folder.iterdir(), *_shards(folder)] if is_special(entry)), None)
    if special is not None:
        raise UserError(f"cannot read {special}: {SPECIAL}")


def _check_layers(name: str, path: Path) -> None:
    """Refuse a local model of so many layers that their list alone would fill the memory: transformers makes it."""
    file = path / "config.json" if path.is_dir() else path
    with suppress(OSError, ValueError, AttributeError):  # of which transformers says more
        layers = read_json(file).get("num_hidden_layers")
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise UserError(
                f"the config.json of {name!r} has num_hidden_layers {layers}: at most {MOST_LAYERS:,} can be"
            )


def _shards(folder: Path) -> set[Path]:
    """The files that the indices of a folder name, as far as they can be read."""
    named: set[Path] = set()
    for index in folder.glob("*.index.json"):
        if not is_special(index):
            with suppress(OSError, ValueError, AttributeError, TypeError):
                named |= {folder / name for name in read_json(index)["weight_map"].values()}
    return named


def _check_weights(source: ModelSource, files: Iterable[str]) -> None:
    if source.random_weights:
        return
    refuse_adapters(source.name, files)
    if not source.allow_pickle:
        refuse_pickles(source.name, files)


def load_tokenizer(checkpoint: Checkpoint):  # noqa: ANN201
    """The tokenizer of a model.

    Raises:
        UserError: it is not there, may not be had, or brings code that is not trusted.
    """
    if checkpoint.source.tokenizer is not None:
        return checkpoint.source.tokenizer
    if checkpoint.source.model is not None:
        raise UserError("a text needs a tokenizer, and the model is an object: give tokenizer, an object or a name")
    trusted = checkpoint.source.trust_remote_code
    with _explained(checkpoint.source, "tokenizer of "), hub.patient(), silent():
        return AutoTokenizer.from_pretrained(**checkpoint.arguments, trust_remote_code=trusted)


def load_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration of a model, without its weights.

    Raises:
        UserError: it may not be had, is damaged, is no causal language model's, or brings code that is not trusted.
    """
    source = checkpoint.source
    if source.model is not None:
        return source.model.config
    with _explained(source), hub.patient(), silent():
        config = AutoConfig.from_pretrained(**checkpoint.arguments, trust_remote_code=source.trust_remote_code)
        if config.is_encoder_decoder:
            raise UserError(f"{source.name!r} is an encoder-decoder model: a causal language model is needed")
        check_config(source.name, config)
    return config


def code_elsewhere(checkpoint: Checkpoint) -> list[str]:
    """The repositories whose code a trusted model runs, each at its commit; a local folder is not among them.

    Raises:
        UserError: its configuration or such a repository cannot be had.
    """
    arguments, name = checkpoint.arguments, checkpoint.source.name
    with _explained(checkpoint.source), hub.patient(), silent():
        config, _ = PretrainedConfig.get_config_dict(**arguments)
    named = config.get("auto_map")
    parts = [named.get(part) for part in ("AutoConfig", "AutoModelForCausalLM")] if isinstance(named, dict) else []
    repositories = sorted({part.partition("--")[0] for part in parts if isinstance(part, str) and "--" in part})
    own = {name: arguments["revision"]} if "revision" in arguments else {}
    return [f"{one}@{own.get(one) or hub.pin('model', one, None).commit}" for one in repositories]


def check_format(chosen: Chosen, checkpoint: Checkpoint) -> None:
    """Refuse a format that the layers of a model cannot take, before its weights are read.

    Raises:
        UserError: such a format; or as :func:`load_config`.
    """
    if chosen.format != Format():
        chosen.plan(layer_sizes(load_config(checkpoint)))


def load_model(checkpoint: Checkpoint, **kwargs: object) -> PreTrainedModel:
    """The model, ready to predict; ``kwargs`` go to transformers' ``from_pretrained``.

    Raises:
        UserError: it is not there, may not be had, is damaged or incomplete, or brings code that is not trusted.
    """
    source = checkpoint.source
    if source.model is not None:
        return source.model
    kwargs["device_map"] = source.device_map or ("cuda:0" if torch.cuda.is_available() else "cpu")
    dtype = TORCH_DTYPES.get(source.dtype, "auto" if torch.cuda.is_available() else torch.float32)
    config = load_config(checkpoint)
    with _explained(source), hub.patient(), silent():
        if source.random_weights:
            return _random(config, dtype, str(kwargs["device_map"]), source.trust_remote_code)
        if source.quantization:
            kwargs["quantization_config"] = _quantization(source.quantization)
        attention = attention_for(config.get_text_config(decoder=True))
        if attention:
            kwargs.setdefault("attn_implementation", attention)
        model = _read_weights(checkpoint, dtype=dtype, **kwargs)
    return model.eval()


def _read_weights(checkpoint: Checkpoint, **kwargs: object) -> PreTrainedModel:
    """The model with every weight that its configuration asks for, and no other, all finite."""
    source = checkpoint.source
    with _no_conversion():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **checkpoint.arguments,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=None if source.allow_pickle else True,
            ignore_mismatched_sizes=True,  # they are refused here, by name
            output_loading_info=True,
            **kwargs,
        )
    model, info = loaded
    check_complete(source.name, info, quantized=getattr(model, "hf_quantizer", None) is not None)
    check_finite(source.name, model)
    return model


@contextmanager
def _no_conversion() -> Iterator[None]:
    """Without transformers' thread that asks a service on the net to convert pickled weights."""
    name = "DISABLE_SAFETENSORS_CONVERSION"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _random(config: PretrainedConfig, dtype: torch.dtype | str, device: str, trusted: bool) -> PreTrainedModel:
    """A model of this shape with random weights."""
    chosen = dtype if isinstance(dtype, torch.dtype) else (config.dtype or torch.bfloat16)
    with torch.device("cuda:0" if device == "auto" else device), torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=trusted).eval()


def _quantization(bits: str) -> Any:
    """transformers' configuration for 4-bit (NF4) or 8-bit weights."""
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{bits} weights need bitsandbytes: pip install 'sinkbench[quantized]'")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def resolved_revision(model: PreTrainedModel) -> str | None:
    """The commit a Hub model was loaded from; ``None`` for local ones."""
    return getattr(model.config, "_commit_hash", None)


@contextmanager
def _explained(source: ModelSource, what: str = "model ") -> Iterator[None]:
    """Every failure to load in one line; a stage of loading, before and behind which signals are looked for."""
    check()
    try:
        yield
        check()
    except (UserError, KeyboardInterrupt, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        name = source.name
        text = " ".join(str(error).split()) or type(error).__name__
        line = hub.explain(error, "model", name, source.revision)
        if line is None and "trust_remote_code" in text:
            line = f"{name!r} brings its own code: read it, then give --trust-remote-code to run it"
        if line is None:
            line = f"cannot load the {what}{name!r}: {_plain(error, text)}"
        raise UserError(line) from error


def _plain(error: Exception, text: str) -> str:
    """What is wrong with the files, and what to do."""
    if isinstance(error, SafetensorError):
        return f"its weights are damaged or cut short ({_short(text)}): download or copy them again"
    if isinstance(error, UnpicklingError) or "weights_only" in text:
        return "its pickled weights hold more than tensors, or are damaged; none of it was run: use safetensors"
    if isinstance(error, FileNotFoundError):
        return f"{_short(text)}: a file is missing, download or copy it again"
    if isinstance(error, JSONDecodeError | IndexError | KeyError | TypeError | UnicodeDecodeError):
        kind = type(error).__name__
        return f"its config.json, index or tokenizer is damaged ({kind}: {_short(text)}): download or copy it again"
    return _short(text)


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."
