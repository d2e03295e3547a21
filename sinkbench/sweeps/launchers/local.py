"""Cells one after the other in this process; a model is loaded once for all its cells."""

import gc
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from sinkbench.config import ModelSource, RunOptions
from sinkbench.engines.step import Steps
from sinkbench.models.loading import load_model
from sinkbench.runs.result import OUT_OF_MEMORY, RunResult
from sinkbench.runs.run import failure, run


class Shelf:
    """Room for one model: the last that was asked for."""

    def __init__(self) -> None:
        self.source: ModelSource | None = None
        self.model: PreTrainedModel | None = None

    def load(self, source: ModelSource) -> PreTrainedModel:
        """The model of ``source``, loaded if it is not the one at hand."""
        if self.model is None or source != self.source:
            self.clear()
            self.model, self.source = load_model(source), source
        return self.model

    def clear(self) -> None:
        """Give the model's memory back."""
        self.model = self.source = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def launch(
    cells: Sequence[RunOptions],
    retries: int,
    started: Callable[[int], None],
    finished: Callable[[int, RunResult], None],
    watch: Callable[[int, Steps, RunResult], None] = lambda index, steps, result: None,
) -> None:
    """Carry out ``cells``; ``watch`` is called after each written row. An interruption ends the cell, and the rest."""
    shelf = Shelf()
    for index, options in enumerate(cells):
        started(index)
        result = _tried(options, retries, shelf, partial(watch, index))
        finished(index, result)
        if result.interrupted:
            return


def _tried(options: RunOptions, retries: int, shelf: Shelf, watch: Callable[[Steps, RunResult], None]) -> RunResult:
    result = RunResult(options.experiment, options.csv)
    for _ in range(retries + 1):
        try:
            result = run(options, watch, shelf.load)
        except Exception as error:
            result.exit_reason = failure(error)
            continue
        if result.exit_reason == OUT_OF_MEMORY:
            shelf.clear()  # with whatever the allocator still holds
        return result
    return result
