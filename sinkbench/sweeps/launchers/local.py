"""Cells one after the other in this process; a model is loaded once for all its cells."""

import gc
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from sinkbench.config import ModelSource, RunConfig
from sinkbench.engines.step import Steps
from sinkbench.models.loading import Checkpoint, load_model, locate
from sinkbench.runs.record import device_name
from sinkbench.runs.result import OUT_OF_MEMORY, RunResult
from sinkbench.runs.run import failure, run
from sinkbench.signals import check


def devices() -> set[str]:
    """The devices of this process, as records name them."""
    return {device_name(), device_name("cpu")}


class Shelf:
    """Room for one model: the last that was asked for."""

    def __init__(self, find: Callable[[ModelSource], Checkpoint] = locate) -> None:
        self.find = find
        self.checkpoint: Checkpoint | None = None
        self.model: PreTrainedModel | None = None

    def load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """The model of ``checkpoint``, loaded if it is not the one at hand."""
        if self.model is None or checkpoint != self.checkpoint:
            self.clear()
            self.model, self.checkpoint = load_model(checkpoint), checkpoint
        return self.model

    def clear(self) -> None:
        """Give the model's memory back."""
        self.model = self.checkpoint = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def launch(
    cells: Sequence[RunConfig],
    retries: int,
    started: Callable[[int], None],
    finished: Callable[[int, RunResult], None],
    watch: Callable[[int, Steps, RunResult], None] = lambda index, steps, result: None,
    find: Callable[[ModelSource], Checkpoint] = locate,
) -> None:
    """Carry out ``cells``; ``watch`` is called after each written row. An interruption ends the cell, and the rest."""
    shelf = Shelf(find)
    for index, options in enumerate(cells):
        check()
        started(index)
        result = _tried(options, retries, shelf, partial(watch, index))
        finished(index, result)
        if result.interrupted:
            return


def _tried(options: RunConfig, retries: int, shelf: Shelf, watch: Callable[[Steps, RunResult], None]) -> RunResult:
    result = RunResult(options.experiment, options.csv)
    for _ in range(retries + 1):
        check()
        try:
            result = run(options, watch, shelf.load, find=shelf.find)
        except Exception as error:
            result.exit_reason = failure(error)
            continue
        if result.exit_reason == OUT_OF_MEMORY:
            shelf.clear()  # with whatever the allocator still holds
        return result
    return result
