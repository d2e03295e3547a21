"""Cells one after the other in this process; a model is loaded once for all its cells, and a text read once."""

import gc
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from sinkbench.config import ModelSource, RunConfig, Source
from sinkbench.data.stream import Streams
from sinkbench.engines.step import Steps
from sinkbench.models.loading import Checkpoint, load_model, locate
from sinkbench.runs.account import failure
from sinkbench.runs.key import weights_of
from sinkbench.runs.protocol import tokens_for
from sinkbench.runs.record import device_name
from sinkbench.runs.result import OUT_OF_MEMORY, RunResult
from sinkbench.runs.run import read_text, run
from sinkbench.signals import check


def devices() -> set[str]:
    """The devices of this process, as records name them."""
    return {device_name(), device_name("cpu")}


class Shelf:
    """Room for one model and one text: the last that were asked for."""

    def __init__(self) -> None:
        self.loaded: tuple[Checkpoint, str] | None = None  # and its weights: a folder may hold others by now
        self.model: PreTrainedModel | None = None
        self.asked: tuple[Source, int, ModelSource] | None = None
        self.text: Streams | None = None

    def read(self, config: RunConfig, tokenizer: Callable[[], object]) -> Streams:
        """The streams of ``config``, read if they are not those at hand; what a program gave as rows, always."""
        wanted = config.source, tokens_for(config), config.model
        if self.text is None or config.source.rows is not None or wanted != self.asked:
            self.text, self.asked = read_text(config, tokenizer), wanted
        return self.text

    def load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """The model of ``checkpoint``, loaded if it is not the one at hand."""
        wanted = checkpoint, weights_of(checkpoint)
        if self.model is None or wanted != self.loaded:
            self.clear()
            self.model, self.loaded = load_model(checkpoint), wanted
        return self.model

    def clear(self) -> None:
        """Give the model's memory back."""
        self.model = self.loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def launch(
    cells: Sequence[RunConfig],
    retries: int,
    started: Callable[[int], None],
    finished: Callable[[int, RunResult], None],
    watch: Callable[[int, Steps, RunResult], None] = lambda index, steps, result: None,
    note: Callable[[str], None] = lambda line: None,
    find: Callable[[ModelSource], Checkpoint] = locate,
) -> None:
    """Carry out ``cells``; ``watch`` is called after each written row, ``note`` with a line about the cell that runs.

    An interruption ends the cell, and the rest.
    """
    shelf = Shelf()
    for index, options in enumerate(cells):
        check()
        started(index)
        given = {"load": shelf.load, "read": shelf.read, "find": find}
        result = _tried(options, retries, partial(run, watch=partial(watch, index), note=note, **given), shelf)
        finished(index, result)
        if result.interrupted:
            return


def _tried(options: RunConfig, retries: int, carried_out: Callable[[RunConfig], RunResult], shelf: Shelf) -> RunResult:
    result = RunResult(options.experiment, options.csv)
    for _ in range(retries + 1):
        check()
        try:
            result = carried_out(options)
        except Exception as error:
            result.exit_reason = failure(error)
            continue
        if result.exit_reason == OUT_OF_MEMORY:
            shelf.clear()  # with whatever the allocator still holds
        return result
    return result
