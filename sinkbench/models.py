"""Models and tokenizers: from the Hub, a local folder, a ``.gguf`` file, or the embedded one."""

import hashlib
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as hf_logging

from sinkbench import embedded
from sinkbench.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNPACK_LIMIT = 2**30  # GGUF files up to this size are unpacked once and kept


@dataclass(frozen=True)
class ModelSource:
    """Which model, and how it is to be loaded.

    Attributes:
        name: a Hub id, a local folder, a ``.gguf`` file, or ``smollm2-135m``.
        dtype: ``auto`` is float32 on a CPU and the checkpoint's own dtype on a GPU.
        random_weights: draw the weights at random, for latency and memory without a download; ``name`` may then be a
            ``config.json`` or a folder with one.
        quantization: ``4bit`` or ``8bit`` weights, through bitsandbytes.
        device_map: as in transformers (``auto`` spreads over all GPUs); by default the first GPU, or the CPU.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    device_map: str | None = None
    random_weights: bool = False
    quantization: str | None = None

    @cached_property
    def location(self) -> dict[str, Any]:
        """The arguments by which transformers finds it.

        Raises:
            UserError: a local path that does not exist, or missing embedded packages.
        """
        name = str(embedded.model_file()) if self.name == embedded.MODEL else self.name
        path = Path(name).expanduser()
        if path.suffix == ".gguf":
            if not path.is_file():
                raise UserError(f"no such file: {path}")
            return _unpacked(path)
        if self.random_weights and path.suffix == ".json" and path.is_file():
            return {"pretrained_model_name_or_path": str(path)}
        if path.is_dir():
            return {"pretrained_model_name_or_path": str(path)}
        if path.is_absolute() or name.startswith((".", "~")) or path.is_file():
            raise UserError(f"no model folder {name!r}: give a Hub id, a folder with config.json, or a .gguf file")
        return {"pretrained_model_name_or_path": name, "revision": self.revision or "main"}


def load_tokenizer(source: ModelSource):  # noqa: ANN201
    """The tokenizer of ``source``."""
    with _told(source), _quiet():
        return AutoTokenizer.from_pretrained(**source.location, trust_remote_code=source.trust_remote_code)


def load_model(source: ModelSource, **kwargs: object) -> PreTrainedModel:
    """The model of ``source``, ready to predict; ``kwargs`` go to transformers' ``from_pretrained``."""
    kwargs["device_map"] = source.device_map or ("cuda:0" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES.get(source.dtype, "auto" if torch.cuda.is_available() else torch.float32)
    with _told(source), _quiet():
        config = AutoConfig.from_pretrained(**source.location, trust_remote_code=source.trust_remote_code)
        if config.is_encoder_decoder:
            raise UserError(f"{source.name!r} is an encoder-decoder model: a causal language model is needed")
        if source.random_weights:
            return _random(config, dtype, str(kwargs["device_map"]))
        if source.quantization:
            kwargs["quantization_config"] = _quantization(source.quantization)
        attention = _attention_for(config.get_text_config(decoder=True))
        if attention:
            kwargs.setdefault("attn_implementation", attention)
        model = AutoModelForCausalLM.from_pretrained(
            **source.location, trust_remote_code=source.trust_remote_code, dtype=dtype, **kwargs
        )
    return model.eval()


def _random(config: PretrainedConfig, dtype: torch.dtype | str, device: str) -> PreTrainedModel:
    """A model of this shape with random weights."""
    chosen = dtype if isinstance(dtype, torch.dtype) else (config.dtype or torch.bfloat16)
    with torch.device("cuda:0" if device == "auto" else device), torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=chosen).eval()


def _quantization(bits: str) -> Any:
    """transformers' configuration for 4-bit (NF4) or 8-bit weights."""
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{bits} weights need bitsandbytes: pip install 'sinkbench[quantized]'")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _attention_for(config: PretrainedConfig) -> str | None:
    """The implementation that computes what the architecture says, where transformers' default may not."""
    if getattr(config, "attn_logit_softcapping", None):
        return "eager"  # sdpa leaves Gemma 2's soft cap out
    if config.model_type == "falcon" and config.alibi:
        return "sdpa"  # eager adds the ALiBi terms twice in transformers 5.17
    return None


def resolved_revision(model: PreTrainedModel) -> str | None:
    """The commit a Hub model was loaded from; ``None`` for local ones."""
    return getattr(model.config, "_commit_hash", None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars and advice, which would tear the progress line."""
    level, hub = hf_logging.get_verbosity(), logging.getLogger("huggingface_hub")
    hub_level, bars = hub.level, hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF reader has a bar that nothing turns off
            yield
    finally:
        hf_logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def _told(source: ModelSource) -> Iterator[None]:
    """Tell every failure to load in one line."""
    try:
        yield
    except (UserError, KeyboardInterrupt, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        name = source.name
        if "gated repo" in text or "Access to model" in text or "401" in text:
            raise UserError(
                f"{name!r} is gated or private: ask for access on its Hub page, then `hf auth login`"
            ) from error
        if "trust_remote_code" in text:
            raise UserError(
                f"{name!r} brings its own code: read it, then give --trust-remote-code to run it"
            ) from error
        if isinstance(error, OSError) and (
            "not a valid model identifier" in text or "Can't load" in text or "couldn't connect" in text.lower()
        ):
            raise UserError(
                f"no model {name!r}: neither a local folder nor to be had from the Hub ({_short(text)})"
            ) from error
        raise UserError(f"cannot load the model {name!r}: {_short(text) or type(error).__name__}") from error


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


def cache_folder() -> Path:
    """Where unpacked models are kept: ``$SINKBENCH_CACHE``, or ``sinkbench`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("SINKBENCH_CACHE") or Path(base) / "sinkbench")


def _unpacked(path: Path) -> dict[str, Any]:
    """A GGUF file as a folder of safetensors, unpacked once: reading GGUF takes half a minute, the folder a second."""
    straight = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    stat = path.stat()
    if stat.st_size > UNPACK_LIMIT:
        return straight
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{path.stem}-{key}"
    if not (folder / "config.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            parts = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unpacking-"))
        except OSError as error:
            logging.getLogger(__name__).debug("cannot keep the unpacked model: %s", error)
            return straight
        try:
            _unpack(straight, parts)
            parts.rename(folder)
        except OSError:  # another process was quicker, or the disk is full: the file itself will do
            if not (folder / "config.json").is_file():
                return straight
        finally:
            shutil.rmtree(parts, ignore_errors=True)
    return {"pretrained_model_name_or_path": str(folder)}


def _unpack(location: dict[str, Any], folder: Path) -> None:
    with _quiet():
        AutoTokenizer.from_pretrained(**location).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
    model.hf_quantizer = None  # type: ignore[assignment] # the weights are plain floats by now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
