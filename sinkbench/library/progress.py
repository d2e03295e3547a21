"""What is shown while a run goes on, and at its end."""

import math
import sys
import time
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sinkbench.config import RunConfig
from sinkbench.results.record import ENDED, OUT_OF_MEMORY

if TYPE_CHECKING:
    from sinkbench.engines.step import Steps
    from sinkbench.runs.result import RunResult


class Progress:
    """A live line on a terminal; nothing elsewhere."""

    def __init__(self, options: RunConfig) -> None:
        console = Console(stderr=True)
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(bar_width=12),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[state]}"),
            bars.TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )
        self._task = self._bars.add_task(options.experiment, total=options.num_tokens, state="starting")
        self._shown, self._documents = 0.0, options.documents

    def watch(self, step: "Steps", result: "RunResult") -> None:
        """Take note of a written row."""
        if self._bars.disable or time.monotonic() - self._shown < 0.2:
            return
        self._shown = time.monotonic()
        memory = f"{step.vram:.1f} GiB" if step.vram is not None else f"KV {step.kv_cache_bytes[-1] / 2**20:.0f} MiB"
        where = f"document {result.stream + 1}  " if self._documents else ""
        numbers = f"ppl {result.overall_ppl:.2f}  nll {step.nll[-1]:.2f}"
        state = f"{where}{result.tokens_per_second:.1f} tok/s  {numbers}  {memory}"
        self._bars.update(self._task, completed=result.rows, total=result.expected, state=state)

    def stage(self, what: str) -> None:
        """Say what goes on before the first row."""
        self._bars.update(self._task, state=what)

    def note(self, line: str) -> None:
        """Say a line that does not end the run."""
        self._bars.console.print(Text(f"sinkbench: {line}"), soft_wrap=True)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()


class Lines:
    """A line on standard error at each tenth of a run, where no live one can be: in a notebook, or a file."""

    def __init__(self, options: RunConfig) -> None:
        self._options, self._tenths = options, 0

    def watch(self, step: "Steps", result: "RunResult") -> None:
        """Take note of a written row."""
        asked = self._options.num_tokens
        if 10 * result.rows // asked > self._tenths:
            self._tenths = 10 * result.rows // asked
            state = f"{result.tokens_per_second:.1f} tok/s  ppl {result.overall_ppl:.2f}"
            self.note(f"{result.rows:,}/{asked:,}  {state}")

    def note(self, line: str) -> None:
        """Say a line that does not end the run."""
        print(f"{self._options.experiment}: {line}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


def outcome(result: "RunResult", asked: int) -> str:
    """What happened to a run, in a few words."""
    if result.not_finite and not result.exit_reason.startswith("failed"):
        count = f"{result.not_finite:,} of {result.rows:,}"
        return f"{outcome(replace(result, not_finite=0), asked)}; WARNING: {count} NLLs are no numbers"
    if result.exit_reason == OUT_OF_MEMORY:
        return f"ran out of memory after {result.rows:,} tokens"
    if result.exit_reason == ENDED:
        return f"the dataset ended after {result.rows:,} of {asked:,} tokens"
    if result.interrupted:
        kept = f"after {result.rows:,} tokens; they are kept" if result.rows else "before the first token"
        return f"{result.exit_reason} {kept}"
    return result.exit_reason


def closing_table(options: RunConfig, result: "RunResult") -> None:
    """The closing table."""
    title = f"{options.experiment} · {options.model_name_or_path} · {options.dataset_name}"
    table = Table(title=Text(title, style="table.title"), show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("outcome", Text(outcome(result, options.num_tokens)))
    table.add_row("tokens", f"{result.rows:,} at {result.tokens_per_second:.1f} a second")
    if options.documents:
        table.add_row("documents", f"{result.stream + 1:,}")
    none = "not a number" if result.not_finite else "-"
    ppl = none if math.isnan(result.overall_ppl) else f"{result.overall_ppl:.4f}"
    table.add_row("perplexity", ppl)
    if result.latency is not None:
        table.add_row("median latency", f"{result.latency * 1e3:.2f} ms a token")
    if result.peak_vram is not None:
        table.add_row("CUDA memory", f"{result.peak_vram:.2f} GiB at most")
    table.add_row("KV cache", f"{result.kv_cache_bytes / 2**20:.1f} MiB at most")
    table.add_row("rows", Text(str(result.csv)))
    Console().print(table)
