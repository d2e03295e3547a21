"""How much a run will read, as far as that is known before its text is."""

from functools import lru_cache

import numpy as np

from sinkbench.config import RunConfig
from sinkbench.data.protocols import Window, windows_of
from sinkbench.models.embedded import CODE, source_files
from sinkbench.runs.protocol import tokens_for

BYTES_A_TOKEN = 3.6  # of Python's library under the tokenizer of SmolLM2: every 12th of its files, 3.62
GROUPS = 16  # of documents of about the same length


def streams_of(options: RunConfig) -> list[tuple[int, int]]:
    """The streams that ``options`` asks for: how many, and the tokens that are predicted of each.

    Documents whose lengths nobody knows are as long as they may be, and without a number one.
    """
    if not options.documents:
        return [(1, options.num_tokens)]
    if options.dataset_name != CODE:
        return [(options.num_samples or 1, options.num_tokens)]
    lengths = (np.array(_code_bytes()[: options.num_samples]) / BYTES_A_TOKEN).clip(max=options.num_tokens)
    groups = np.array_split(np.sort(lengths[lengths > 1]), GROUPS)
    return [(len(group), max(1, round(group.mean()))) for group in groups if len(group)]


@lru_cache
def _code_bytes() -> list[int]:
    return [len(text.encode()) for _, text in source_files()]


def windows_asked(options: RunConfig) -> list[Window]:
    """The windows of a protocol, of a text that is as long as it may be.

    Raises:
        UserError: that is shorter than a window.
    """
    assert options.context_length is not None
    return windows_of(options.protocol, tokens_for(options), options.context_length, options.stride)
