"""A run under a protocol other than the stream: windows of a text, and what stands first in them."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.config import RunConfig
from sinkbench.data.protocols import Window, windows_of
from sinkbench.errors import UserError
from sinkbench.models.loading import Checkpoint, load_tokenizer


def tokens_for(config: RunConfig) -> int:
    """Tokens of the text for ``--num-tokens`` predictions, at most: one more, but where the first is predicted too."""
    return config.num_tokens + (config.protocol != "rolling")


def windows_for(config: RunConfig, text: Tensor) -> list[Window] | None:
    """The windows of ``text``; ``None`` where it is read as a stream.

    Raises:
        UserError: it is shorter than a window.
    """
    if config.protocol == "stream":
        return None
    assert config.context_length is not None
    return windows_of(config.protocol, len(text), config.context_length, config.stride)


def lead_of(config: RunConfig, checkpoint: Checkpoint, model: PreTrainedModel) -> int | None:
    """The token that says that a text begins: BOS, where ``rolling`` finds none EOS; ``None`` where there is none.

    It is the tokenizer's; of a model that has none, the one of its configuration.

    Raises:
        UserError: ``rolling`` needs one.
    """
    try:
        known: Any = load_tokenizer(checkpoint)
    except UserError:
        known = model.config.get_text_config(decoder=True)
    bos, eos = _id(known, "bos_token_id"), _id(known, "eos_token_id")
    if config.protocol != "rolling":
        return bos
    if bos is None and eos is None:
        raise UserError(
            "--protocol rolling begins with BOS or EOS, and this tokenizer has neither: take another protocol"
        )
    return eos if bos is None else bos


def _id(known: Any, name: str) -> int | None:
    """A token id; of several the first."""
    value = getattr(known, name, None)
    return next(iter(value), None) if isinstance(value, list) else value


def on_record(config: RunConfig, windows: list[Window], lead: int | None) -> dict[str, Any]:
    """What a record says of the protocol."""
    return {
        "name": config.protocol,
        "context_length": config.context_length,
        "stride": config.stride,
        "windows": len(windows),
        "first_token": lead if any(window.lead for window in windows) else None,
    }
