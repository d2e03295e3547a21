"""What there is to show of each group, laid out once for the page and for Markdown."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sinkbench import __version__
from sinkbench.results.baseline import unfit_baseline
from sinkbench.results.comparison import BROKEN, DIVERGED, SMOOTH, onset_text
from sinkbench.results.documents import streams_of
from sinkbench.results.intervals import Interval
from sinkbench.results.looks import Look, looks_of
from sinkbench.results.presented import budget_table, recall_summary
from sinkbench.results.report.collect import Group
from sinkbench.results.report.comparing import GroupComparison, Onset, compare_group
from sinkbench.results.report.drawing import PageFigure, page_figures
from sinkbench.results.report.loss_figures import frontier_figures, recall_figure
from sinkbench.results.report.losses import GroupLosses, group_losses
from sinkbench.results.report.settings import GroupSettings, group_settings
from sinkbench.results.report.summary import RunSummary, summarise
from sinkbench.results.report.tables import (
    NOTHING,
    ReportTable,
    TableCell,
    TableColumn,
    number,
    ranged,
    report_table,
    without_empty_columns,
)
from sinkbench.results.report.warnings import ReportWarning, find_warnings
from sinkbench.results.run import Run
from sinkbench.results.statistics import MeasureStatistics


@dataclass(frozen=True)
class Named:
    """A text that belongs to a run, or a setting and its value."""

    name: str
    text: str


@dataclass(frozen=True)
class Section:
    """A group of runs.

    Attributes:
        title: its folder.
        warnings: what looks wrong.
        results: the final numbers.
        shared: the runs over the same tokens; ``None`` where there is nothing to compare.
        measured: what else there is over these tokens, a table each: other measures, and losses.
        figures: in the order in which they are shown.
        same: settings that all runs share.
        different: settings in which they differ; ``None`` where there is none.
        commands: how to repeat each run.
        texts: what each run wrote, for generated text.
        recorded: whether any run says how it was made.
    """

    title: str
    warnings: list[ReportWarning]
    results: ReportTable
    shared: ReportTable | None
    measured: list[tuple[str, ReportTable]]
    figures: list[PageFigure]
    same: list[Named]
    different: ReportTable | None
    commands: list[str]
    texts: list[Named]
    recorded: bool


@dataclass(frozen=True)
class Report:
    """A whole report."""

    title: str
    made: str
    sections: list[Section]

    @property
    def warning_count(self) -> int:
        """How many there are in all."""
        return sum(len(section.warnings) for section in self.sections)


def report(title: str, groups: Sequence[Group]) -> Report:
    """All there is to show of ``groups``."""
    strategies = [run.strategy for group in groups for run in group.runs]
    made = f"Made by sinkbench {__version__} on {datetime.now(UTC):%Y-%m-%d at %H:%M} UTC"
    return Report(title, made, [_section(group, strategies) for group in groups])


def _section(group: Group, strategies: Sequence[str]) -> Section:
    looks = looks_of({run.name: run.strategy for run in group.runs}, strategies)
    found = find_warnings(group)
    unlike = group.generated or any(warning.kind in ("different tokens", "mixed models") for warning in found)
    shared = None if unlike else compare_group(group.runs)
    found += _baseline_warnings(shared) if shared else []
    numbers = {run.name: summarise(run) for run in group.runs}
    losses = group_losses(group.runs, shared)
    known = group_settings(group.runs)
    return Section(
        title=group.title,
        warnings=found,
        results=_results(group, numbers, shared, looks),
        shared=_over_shared(shared, looks) if shared else None,
        measured=[*(_measured(one, looks) for one in (shared.measured if shared else ())), *_losses(losses, looks)],
        figures=[*page_figures(group.runs, looks), *_loss_figures(losses, looks)],
        same=[Named(name, value) for name, value in known.shared.items()],
        different=_different(known, looks) if known.names else None,
        commands=list(dict.fromkeys(command for run in group.runs if (command := _command(run)))),
        texts=[Named(run.name, str(run.recorded("text"))) for run in group.runs if run.recorded("text")],
        recorded=known.recorded,
    )


def _baseline_warnings(shared: GroupComparison) -> list[ReportWarning]:
    """Why the run that the others are compared to is no baseline, if so."""
    run = shared.baseline.run
    compared = next((one for one in shared.compared if run and one.name == run.name), None)
    message = unfit_baseline(run, compared) if run and compared else None
    return [ReportWarning("no baseline", (run.name,), message)] if run and message else []


def _results(
    group: Group, numbers: dict[str, RunSummary], shared: GroupComparison | None, looks: Mapping[str, Look]
) -> ReportTable:
    """The final numbers of each run."""
    onsets = shared.onsets if shared else {}
    columns = [
        TableColumn("Run", False),
        TableColumn("Tokens"),
        TableColumn("Perplexity [95 %]"),
        TableColumn("Bits per byte"),
        TableColumn("Perplexity per word"),
        TableColumn("Breaks at token"),
        TableColumn("Peak VRAM (GiB)"),
        TableColumn("Peak KV cache (MiB)"),
        TableColumn("Latency, median (ms)"),
        TableColumn("Latency, p99 (ms)"),
        TableColumn("Tokens a second"),
        TableColumn("Outcome", False),
    ]
    rows = [
        [
            _named(name, looks),
            number(found.tokens, ",.0f"),
            ranged(found.perplexity, ",.3f"),
            ranged(found.units and found.units.bits_per_byte, ".4f"),
            ranged(found.units and found.units.word_perplexity, ",.2f"),
            _onset(onsets.get(name)),
            number(found.peak_vram, ",.2f"),
            _bytes(found.kv_cache_bytes),
            number(found.median_latency, ",.3f", 1e3),
            number(found.p99_latency, ",.3f", 1e3),
            number(found.tokens_per_second, ",.1f"),
            TableCell(found.outcome),
        ]
        for name, found in numbers.items()
    ]
    return without_empty_columns(ReportTable(columns, rows, _notes(group, shared)))


def _notes(group: Group, shared: GroupComparison | None) -> list[str]:
    """What the numbers mean."""
    notes = ["Perplexity is over all tokens of a run; its interval is a block bootstrap over its rows."]
    if any(streams_of(run.frame) is not None for run in group.runs):
        notes.append("Of documents, intervals come from drawing documents, and curves are means at each input length.")
    if any(run.spacing > 1 for run in group.runs):
        thinned = {run.spacing for run in group.runs if run.spacing > 1}
        every = " or ".join(str(spacing) for spacing in sorted(thinned))
        notes.append(f"Files keep one row in {every}: intervals and latencies are those of the rows that are there.")
    if group.generated:
        notes.append("Each run reads a text that it wrote itself: perplexities are not those of one text.")
    if shared and shared.onsets:
        notes.append(
            f"A run breaks where its NLL over {SMOOTH} rows is {BROKEN} nats above that of the best of the runs that "
            "read as far."
        )
    if shared and any(onset.spacing > 1 for onset in shared.onsets.values()):
        notes.append("“≈”: of files that keep some rows only, and a run that fails slowly, it may seem early.")
    if shared and shared.not_judged:
        notes.append(f"Where a run breaks is not known of all: {shared.not_judged}.")
    return notes


def _over_shared(shared: GroupComparison, looks: Mapping[str, Look]) -> ReportTable:
    """The runs over the tokens that all have read."""
    columns = [
        TableColumn("Run", False),
        TableColumn("Perplexity [95 %]"),
        TableColumn("NLL above dense [95 %] (nats)"),
        TableColumn("Parts from dense at token"),
    ]
    rows = [
        [
            _named(run.name, looks),
            ranged(run.perplexity, ",.3f"),
            ranged(run.loss, "+.4f"),
            TableCell(NOTHING) if run.diverges is None else _onset(Onset(run.diverges, shared.spacing)),
        ]
        for run in shared.compared
    ]
    notes = [f"Over the first {shared.tokens:,} tokens, which all these runs have read."]
    if not shared.baseline.run:
        notes.append(f"Losses need `sinkbench compare`: {shared.baseline.why}.")
    if any(run.diverges for run in shared.compared):
        notes.append(f"A run parts from dense attention where its NLL over {SMOOTH} rows is {DIVERGED} nats above.")
    return without_empty_columns(ReportTable(columns, rows, notes))


def _measured(found: MeasureStatistics, looks: Mapping[str, Look]) -> tuple[str, ReportTable]:
    """Title and table of one measure."""
    columns = [
        TableColumn("Run", False),
        *(TableColumn(name[:1].upper() + name[1:]) for name in next(iter(found.runs.values()))),
    ]
    rows = [[_named(name, looks), *(_statistic(one) for one in of_run.values())] for name, of_run in found.runs.items()]
    return f"{found.measure.label} ({found.unit})" if found.unit else found.measure.label, ReportTable(
        columns, rows, [found.measure.note]
    )


def _losses(losses: GroupLosses, looks: Mapping[str, Look]) -> list[tuple[str, ReportTable]]:
    """Titles and tables of losses by recall distance and by budget."""
    tables = []
    if losses.baseline and losses.recall:
        table = recall_summary(losses.recall, losses.baseline.name)
        tables.append((table.title, report_table(table, looks)))
    if losses.baseline and losses.budgets:
        table = budget_table(losses.budgets, losses.baseline)
        tables.append((table.title, report_table(table, looks)))
    return tables


def _loss_figures(losses: GroupLosses, looks: Mapping[str, Look]) -> list[PageFigure]:
    """Their figures."""
    figures = []
    if losses.baseline and losses.recall:
        figures.append(recall_figure(losses.recall, losses.baseline.name, looks))
    if losses.baseline and losses.budgets:
        figures += frontier_figures(losses.budgets, losses.baseline.name)
    return figures


def _statistic(found: Interval | float) -> TableCell:
    return number(found, ".4g") if isinstance(found, float) else ranged(found, ".4g")


def _different(known: GroupSettings, looks: Mapping[str, Look]) -> ReportTable:
    """The settings in which runs differ."""
    columns = [TableColumn("Run", False), *(TableColumn(name.capitalize(), False) for name in known.names)]
    rows = [[_named(run, looks), *map(TableCell, values)] for run, values in known.different.items()]
    return ReportTable(columns, rows, [])


def _named(name: str, looks: Mapping[str, Look]) -> TableCell:
    return TableCell(name, colour=looks[name].colour, sign=looks[name].sign)


def _bytes(held: int | None) -> TableCell:
    return TableCell(NOTHING) if held is None else TableCell(f"{held / 2**20:,.1f}", f"{held:,} bytes")


def _onset(onset: Onset | None) -> TableCell:
    if onset is None:
        return TableCell(NOTHING)
    if onset.token is None:
        return TableCell("holds")
    return TableCell(onset_text(onset.token, onset.spacing))


def _command(run: Run) -> str:
    """The recorded command, in one line that a shell takes."""
    command = run.recorded("command")
    return shlex.join(map(str, command)) if isinstance(command, list) else ""
