"""What there is to show of each group, laid out once for the page and for Markdown."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sinkbench import __version__
from sinkbench.results.comparison import BROKEN, DIVERGED, SMOOTH, about
from sinkbench.results.report.collect import Group, Run
from sinkbench.results.report.comparing import Onset, Shared, compare_runs
from sinkbench.results.report.drawing import Figure, Look, figures, looks
from sinkbench.results.report.settings import Settings, settings
from sinkbench.results.report.summary import Numbers, measure
from sinkbench.results.report.tables import NOTHING, Cell, Column, Table, number, ranged, without_empty_columns
from sinkbench.results.report.warnings import ReportWarning, find_warnings


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
        figures: in the order in which they are shown.
        same: settings that all runs share.
        different: settings in which they differ; ``None`` where there is none.
        commands: how to repeat each run.
        texts: what each run wrote, for generated text.
        recorded: whether any run says how it was made.
    """

    title: str
    warnings: list[ReportWarning]
    results: Table
    shared: Table | None
    figures: list[Figure]
    same: list[Named]
    different: Table | None
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
    return Report(title, made, [_section(group, looks(group.runs, strategies)) for group in groups])


def _section(group: Group, looked: dict[str, Look]) -> Section:
    found = find_warnings(group)
    unlike = group.generated or any(warning.kind in ("different tokens", "mixed models") for warning in found)
    shared = None if unlike else compare_runs(group.runs)
    numbers = {run.name: measure(run) for run in group.runs}
    known = settings(group.runs)
    return Section(
        title=group.title,
        warnings=found,
        results=_results(group, numbers, shared, looked),
        shared=_over_shared(shared, looked) if shared else None,
        figures=figures(group.runs, looked),
        same=[Named(name, value) for name, value in known.shared.items()],
        different=_different(known, looked) if known.names else None,
        commands=list(dict.fromkeys(command for run in group.runs if (command := _command(run)))),
        texts=[Named(run.name, str(run.told("text"))) for run in group.runs if run.told("text")],
        recorded=known.recorded,
    )


def _results(group: Group, numbers: dict[str, Numbers], shared: Shared | None, looked: dict[str, Look]) -> Table:
    """The final numbers of each run."""
    onsets = shared.onsets if shared else {}
    columns = [
        Column("Run", False),
        Column("Tokens"),
        Column("Perplexity [95 %]"),
        Column("Breaks at token"),
        Column("Peak VRAM (GiB)"),
        Column("Peak KV cache (MiB)"),
        Column("Latency, median (ms)"),
        Column("Latency, p99 (ms)"),
        Column("Tokens a second"),
        Column("Outcome", False),
    ]
    rows = [
        [
            _named(name, looked),
            number(found.tokens, ",.0f"),
            ranged(found.perplexity, ",.3f"),
            _onset(onsets.get(name)),
            number(found.peak_vram, ",.2f"),
            _bytes(found.kv_cache_bytes),
            number(found.median_latency, ",.3f", 1e3),
            number(found.p99_latency, ",.3f", 1e3),
            number(found.tokens_per_second, ",.1f"),
            Cell(found.outcome),
        ]
        for name, found in numbers.items()
    ]
    return without_empty_columns(Table(columns, rows, _notes(group, shared)))


def _notes(group: Group, shared: Shared | None) -> list[str]:
    """What the numbers mean."""
    notes = ["Perplexity is over all tokens of a run; its interval is a block bootstrap over its rows."]
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
        notes.append("“≈”: of files that keep some rows only, and a run that fails slowly, it may be told early.")
    if shared and shared.untold:
        notes.append(f"Where a run breaks is not told for all: {shared.untold}.")
    return notes


def _over_shared(shared: Shared, looked: dict[str, Look]) -> Table:
    """The runs over the tokens that all have read."""
    columns = [
        Column("Run", False),
        Column("Perplexity [95 %]"),
        Column("NLL above dense [95 %] (nats)"),
        Column("Parts from dense at token"),
    ]
    rows = [
        [
            _named(run.name, looked),
            ranged(run.perplexity, ",.3f"),
            ranged(run.loss, "+.4f"),
            Cell(NOTHING) if run.diverges is None else _onset(Onset(run.diverges, shared.spacing)),
        ]
        for run in shared.compared
    ]
    notes = [f"Over the first {shared.tokens:,} tokens, which all these runs have read."]
    if any(run.diverges for run in shared.compared):
        notes.append(f"A run parts from dense attention where its NLL over {SMOOTH} rows is {DIVERGED} nats above.")
    return without_empty_columns(Table(columns, rows, notes))


def _different(known: Settings, looked: dict[str, Look]) -> Table:
    """The settings in which runs differ."""
    columns = [Column("Run", False), *(Column(name.capitalize(), False) for name in known.names)]
    return Table(columns, [[_named(run, looked), *map(Cell, values)] for run, values in known.different.items()], [])


def _named(name: str, looked: dict[str, Look]) -> Cell:
    return Cell(name, colour=looked[name].colour)


def _bytes(held: int | None) -> Cell:
    return Cell(NOTHING) if held is None else Cell(f"{held / 2**20:,.1f}", f"{held:,} bytes")


def _onset(onset: Onset | None) -> Cell:
    if onset is None:
        return Cell(NOTHING)
    if onset.token is None:
        return Cell("holds")
    return Cell(about(onset.token, onset.spacing))


def _command(run: Run) -> str:
    """The recorded command, in one line that a shell takes."""
    command = run.told("command")
    return shlex.join(map(str, command)) if isinstance(command, list) else ""
