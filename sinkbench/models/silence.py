"""Libraries that load things, without their own advice and progress bars."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from transformers.utils import logging as hf_logging

LOGGERS = ("huggingface_hub", "datasets", "fsspec")


@contextmanager
def quiet() -> Iterator[None]:
    """Within this context the loaders say nothing below an error, and draw no bars."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def silent() -> Iterator[None]:
    """As :func:`quiet`, and nothing on standard error: the GGUF reader has a bar that nothing turns off."""
    with quiet(), redirect_stderr(io.StringIO()):
        yield
