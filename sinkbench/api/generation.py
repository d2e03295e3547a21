"""``sinkbench generate``: a model writes on and on under a strategy; how long does it stay fluent?"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkbench.api.decoding import Detokenizer, GeneratedToken, Sampling, Session, stream_tokens
from sinkbench.config import GenerateConfig
from sinkbench.engines.step import Steps, vram_allocated
from sinkbench.errors import UserError
from sinkbench.metrics.fluency import BLOCK, NonWords, Repetition, fresh_nll, vocabulary_of
from sinkbench.models.loading import check_format, load_model, load_tokenizer, locate, resolved_revision
from sinkbench.models.sizes import layer_sizes
from sinkbench.positions.detection import check_reach
from sinkbench.results.columns import measured_by
from sinkbench.runs.account import exit_reason
from sinkbench.runs.record import device_name, now, versions, write_json
from sinkbench.runs.result import FINISHED
from sinkbench.runs.writer import RowWriter
from sinkbench.signals import Interrupted, check, signals, undisturbed
from sinkbench.strategies import Chosen, Plan
from sinkbench.strategies.registry import chosen_by


@dataclass
class Written:
    """A text as it grows.

    Attributes:
        prompt: ids of the prompt.
        said: generated tokens.
        text: as it was shown, without the prompt.
        fresh: NLL of the first ``len(fresh)`` generated tokens with fresh context.
        seconds: since the prompt was fed.
        exit_reason: how it ended.
    """

    prompt: list[int] = field(default_factory=list)
    said: list[GeneratedToken] = field(default_factory=list)
    text: str = ""
    fresh: list[float] = field(default_factory=list)
    rates: list[tuple[float | None, float | None]] = field(default_factory=list)
    seconds: float = 0.0
    exit_reason: str = "running"

    @property
    def interrupted(self) -> bool:
        return self.exit_reason.startswith("interrupted")


def generate(options: GenerateConfig, show: Callable[[str], None] = lambda text: None) -> Written:
    """Write a text; ``show`` is called with each piece of it, the prompt first.

    Special tokens, the end of the text among them, are never chosen: the text goes on until it has its length.

    Raises:
        UserError: whatever the user can mend.
    """
    chosen = chosen_by(options)
    written = Written()
    with signals() as watch, RowWriter(options.csv, options.overwrite, measured_by("generate")) as writer:
        record = _opening(options)
        work = _Work(options, chosen, record, written, writer, show)
        error = watch.attempt(work.carry_out)
        work.measure()
        error = writer.disturbed() or error
        written.exit_reason = FINISHED if error is None else exit_reason(error)
        if writer.rows or not (writer.replaces or isinstance(error, UserError)):  # otherwise its message says it all
            write_json(options.csv.with_suffix(".json"), record | _closing(written))
    if error is not None and not isinstance(error, (Interrupted, torch.OutOfMemoryError)):
        raise error
    return written


@dataclass
class _Work:
    """A text under way; ``model`` is there once it is loaded."""

    options: GenerateConfig
    chosen: Chosen
    record: dict[str, Any]
    written: Written
    writer: RowWriter
    show: Callable[[str], None]
    model: PreTrainedModel | None = None

    def carry_out(self) -> None:
        """Everything between the opening of the files and their end."""
        options, written = self.options, self.written
        checkpoint = locate(options.model)
        tokenizer = load_tokenizer(checkpoint)
        written.prompt = tokenizer(options.prompt)["input_ids"]
        if not written.prompt:
            raise UserError("the prompt is empty: give at least one token to begin with")
        check_format(self.chosen, checkpoint)
        model = self.model = load_model(checkpoint)
        check()
        plan = self.chosen.plan(layer_sizes(model.config))
        if plan.dense:
            check_reach(model, len(written.prompt) + options.max_new_tokens)
        self.record |= _resolved(options, model)
        begin = time.perf_counter()
        try:
            self.show(options.prompt)
            _write(options, model, tokenizer, plan, written, self.writer, self.show)
        finally:
            written.seconds = time.perf_counter() - begin

    def measure(self) -> None:
        """Write the rows of the last tokens, if there are any."""
        if self.model is not None:
            _measure(self.model, self.written, self.writer)


def _write(
    options: GenerateConfig,
    model: PreTrainedModel,
    tokenizer: Any,
    plan: Plan,
    written: Written,
    writer: RowWriter,
    show: Callable[[str], None],
) -> None:
    sampling = Sampling(options.temperature, options.top_p, tuple(tokenizer.all_special_ids))
    generator = torch.Generator().manual_seed(options.seed)
    detokenizer = Detokenizer(tokenizer)
    repetition, non_words = Repetition(), NonWords(tokenizer, vocabulary_of(options.prompt))
    said = stream_tokens(Session(model, plan), written.prompt, sampling, generator)
    for generated in islice(said, options.max_new_tokens):
        with undisturbed():
            written.said.append(generated)
            written.rates.append((repetition.put(generated.token), non_words.put(generated.token)))
        piece = detokenizer.put(generated.token)
        written.text += piece
        show(piece)
        if len(written.said) - len(written.fresh) >= BLOCK:
            with undisturbed():
                _measure(model, written, writer)


def _measure(model: PreTrainedModel, written: Written, writer: RowWriter) -> None:
    """Score the tokens that have not been scored yet with fresh context; write their rows."""
    done = len(written.fresh)
    if done == len(written.said):
        return
    tokens = torch.tensor(written.prompt + [generated.token for generated in written.said])
    begin = len(written.prompt) + done
    written.fresh += fresh_nll(model, tokens[max(0, begin - BLOCK) : begin], tokens[begin:])
    for i in range(done, len(written.said)):
        generated, (repeated, odd) = written.said[i], written.rates[i]
        fed = len(written.prompt) + i
        step = Steps(fed, [generated.nll], generated.latency, vram_allocated(), [generated.kv_cache_bytes])
        more = {"fresh_nll": [written.fresh[i]], "repetition": [repeated], "non_word": [odd]}
        writer.write(step, [generated.token], more)


def _opening(options: GenerateConfig) -> dict[str, Any]:
    return {
        "experiment": chosen_by(options).name,
        "options": options.model_dump(mode="json"),
        "command": ["sinkbench", *sys.argv[1:]],
        "versions": versions(),
        "device": device_name(),
        "started": now(),
    }


def _resolved(options: GenerateConfig, model: PreTrainedModel) -> dict[str, Any]:
    return {
        "model": {
            "name": options.model_name_or_path,
            "class": type(model).__name__,
            "revision": resolved_revision(model),
            "attention": getattr(model.config, "_attn_implementation", None),
        },
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _closing(written: Written) -> dict[str, Any]:
    blocks = [written.fresh[i : i + BLOCK] for i in range(0, len(written.fresh), BLOCK)]
    return {
        "ended": now(),
        "exit_reason": written.exit_reason,
        "rows": len(written.said),
        "prompt_tokens": len(written.prompt),
        "seconds": written.seconds,
        "fresh_nll_by_block": {"tokens_a_block": BLOCK, "mean": [mean(block) for block in blocks]},
        "peak_kv_cache_bytes": max((generated.kv_cache_bytes for generated in written.said), default=0),
        "text": written.text,
    }
