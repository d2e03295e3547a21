"""``sinkbench.compare``: runs over the same tokens, as a frame."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sinkbench.errors import UserError
from sinkbench.results.document import Document
from sinkbench.validation import MOST

if TYPE_CHECKING:
    import pandas as pd

    from sinkbench.results.baseline import Baseline
    from sinkbench.results.comparison import Comparison
    from sinkbench.results.recall import RunRecall
    from sinkbench.results.run import Run
    from sinkbench.results.statistics import MeasureStatistics
    from sinkbench.results.table import Table

RECALL_DISTANCE, BUDGET = "recall-distance", "budget"
BY = (RECALL_DISTANCE, BUDGET)
Span = tuple[int | None, int | None]
FEW = "at least two runs are needed to compare: give CSV files, or a folder that holds several"


def compare(
    *runs: Any,
    baseline: str | None = None,
    by: str | None = None,
    ngram: int | None = None,
    tokens: str | tuple[int | None, int | None] | None = None,
    key_tokens: tuple[str, str] | None = None,
) -> "pd.DataFrame":
    """As ``sinkbench compare``: perplexity, loss to dense attention or another run, where they part.

    Args:
        runs: files, folders, or runs that are at hand.
        baseline: the run that the others are compared to; by default the one of dense attention.
        by: ``recall-distance``: the loss by how many tokens back a pair was last seen; ``budget``: the loss beside what
            the cache holds.
        ngram: by recall distance, of so many tokens in place of pairs.
        tokens: by recall distance, the first and the last that count, also as ``"FIRST:LAST"``.
        key_tokens: LongPPL: two runs, of which the first has the long context.

    Returns:
        A row a run. Intervals are 95 %, in columns of their own; NLLs are in nats. ``attrs`` has the baseline, what
        else is true of all rows, and notes, such as why a baseline is none.

    Raises:
        UserError: fewer than two runs, of different tokens, or arguments that do not go together.
    """
    import pandas as pd

    from sinkbench.library.reading import runs_of

    span = check_comparison(by, ngram, tokens, key_tokens)
    document = compared(runs_of(runs), baseline, by, ngram, span, key_tokens)[0]
    names, rows = document.joined() if key_tokens or not by else (None, document.tables[0].records())
    frame = pd.DataFrame(rows, columns=names).set_index("run")
    frame.attrs = {**document.facts, "notes": list(document.notes)}
    return frame


def check_comparison(
    by: str | None, ngram: int | None, tokens: str | Span | None, key_tokens: tuple[str, str] | None
) -> Span:
    """The tokens that count.

    Raises:
        UserError: options that do nothing together, or are none.
    """
    if by is not None and by not in BY:
        raise UserError(f"--by must be one of {', '.join(BY)} (got {by!r})")
    for name, value in (("--ngram", ngram), ("--tokens", tokens)):
        if value is not None and by != RECALL_DISTANCE:
            raise UserError(f"{name} needs --by recall-distance")
    checked_ngram(ngram)
    if key_tokens is not None and by is not None:
        raise UserError("--key-tokens is a comparison of its own: leave out --by")
    if key_tokens is not None and (isinstance(key_tokens, str) or len(key_tokens) != 2):
        raise UserError(f"--key-tokens takes the names of two runs (got {key_tokens!r})")
    return tokens_between(tokens)


def checked_ngram(ngram: int | None) -> int:
    """How many tokens have to come again: pairs where nothing is said.

    Raises:
        UserError: fewer than two.
    """
    if ngram is not None and (not isinstance(ngram, int) or ngram < 2):
        raise UserError(f"--ngram is {ngram}: give 2 or more")
    return 2 if ngram is None else ngram


def tokens_between(given: str | Span | None) -> Span:
    """The input lengths that ``FIRST:LAST`` names; either may be left out.

    Raises:
        UserError: it is nothing of that kind.
    """
    if given is None:
        return None, None
    if isinstance(given, tuple | list) and len(given) == 2:
        given = ":".join("" if bound is None else str(bound) for bound in given)
    first, colon, last = str(given).partition(":")
    if not colon or not all(part == "" or (part.isdecimal() and part.isascii()) for part in (first, last)):
        raise UserError(f"--tokens is {given!r}: give FIRST:LAST, such as 1025:8192")
    found = (int(first) if first else None, int(last) if last else None)
    if 0 in found or (found[0] or 1) > (found[1] or MOST):
        raise UserError(f"--tokens is {given!r}: FIRST is at least 1 and LAST no less than FIRST")
    return found


def compared(
    found: "Mapping[str, Run]",
    baseline: str | None,
    by: str | None,
    ngram: int | None,
    span: Span,
    key_tokens: tuple[str, str] | None,
) -> "tuple[Document, list[RunRecall]]":
    """What is found of runs, and by recall distance also as it was found.

    Raises:
        UserError: fewer than two runs, of different tokens, or no baseline where one is needed.
    """
    import numpy as np

    from sinkbench.results.baseline import choose_baseline

    if len(found) < 2:
        raise UserError(FEW)
    runs = dict(found)
    with np.errstate(all="ignore"):  # what is no number shows as such
        if key_tokens is not None:
            return _over_key_tokens(runs, *key_tokens), []
        chosen = choose_baseline(list(runs.values()), baseline)
        if by == RECALL_DISTANCE:
            return _by_recall(runs, chosen, checked_ngram(ngram), span)
        if by == BUDGET:
            return _by_budget(runs, chosen), []
        return _whole(runs, chosen), []


def needed(runs: "Mapping[str, Run]", asked: str | None, what: str) -> "Run":
    """The baseline of ``what``, which cannot be without one.

    Raises:
        UserError: there is none.
    """
    from sinkbench.results.baseline import choose_baseline

    return _run_of(choose_baseline(list(runs.values()), asked), what)


def _run_of(chosen: "Baseline", what: str) -> "Run":
    if chosen.run is None:
        raise UserError(f"{what} needs a baseline: {chosen.why.removeprefix('no baseline: ')}")
    return chosen.run


def _over_key_tokens(found: "dict[str, Run]", long: str, short: str) -> Document:
    from sinkbench.results.key_tokens import over_key_tokens
    from sinkbench.results.presented import key_token_table

    table = key_token_table(over_key_tokens(found, long, short), long, short)
    return Document([table], {"long": long, "short": short}, table.notes)


def _by_recall(
    found: "dict[str, Run]", chosen: "Baseline", ngram: int, span: Span
) -> "tuple[Document, list[RunRecall]]":
    from sinkbench.results.presented import recall_runs_table, recall_table
    from sinkbench.results.recall import recall_by_distance

    baseline = _run_of(chosen, "--by recall-distance")
    recalled = recall_by_distance(found, baseline, ngram, span)
    tables = [recall_table(recalled, baseline.name, ngram), recall_runs_table(recalled)]
    return Document(tables, {"baseline": baseline.name, "ngram": ngram}, [chosen.why]), list(recalled)


def _by_budget(found: "dict[str, Run]", chosen: "Baseline") -> Document:
    from sinkbench.results.frontier import budgets
    from sinkbench.results.presented import budget_table

    baseline = _run_of(chosen, "--by budget")
    table = budget_table(budgets(found, baseline), baseline)
    return Document([table], {"baseline": baseline.name}, [chosen.why, *table.notes])


def _whole(found: "dict[str, Run]", chosen: "Baseline") -> Document:
    """Whole runs: perplexities, losses, where they part and fail, and what else was measured."""
    from sinkbench.results.baseline import unfit_baseline
    from sinkbench.results.comparison import compare_runs
    from sinkbench.results.divergence import beyond_training
    from sinkbench.results.statistics import statistics_of
    from sinkbench.results.units import units_table

    frames = {name: run.frame for name, run in found.items()}
    runs, measures = compare_runs(frames, chosen.name), statistics_of(frames)
    unfit = [unfit_baseline(chosen.run, run) for run in runs if chosen.run and run.name == chosen.name]
    unfit += dict.fromkeys(beyond_training(run.record, runs[0].longest) for run in found.values())
    notes = [chosen.why, *(f"warning: {warning}" for warning in filter(None, unfit))]
    units = units_table(runs, found)
    tables = [comparison_table(runs, chosen.name), *([units] if units else []), *map(measure_table, measures)]
    return Document(tables, {"baseline": chosen.name, "tokens": runs[0].tokens, "spacing": runs[0].spacing}, notes)


def comparison_table(compared: "list[Comparison]", baseline: str | None) -> "Table":
    """One row a run; without a baseline, what each comes to by itself."""
    from sinkbench.results.table import Column, Table

    spacing = compared[0].spacing
    by_rows = f", by one row in {spacing}" if spacing > 1 else ""
    of = f" of {compared[0].documents:,} documents" if compared[0].documents > 1 else ""
    columns = [Column("run", "run"), Column("perplexity", "perplexity", ".2f", interval=True)]
    if baseline:
        columns += [
            Column("loss", f"ΔNLL to {baseline}", "+.3f", interval=True),
            Column("mean_difference", "|Δ|", ".4f"),
            Column("parts_at", "parts at", "≈,.0f" if spacing > 1 else ",.0f"),
        ]
    columns += [Column("fails_at"), Column("fails"), Column("what_happened", "what happened")]
    rows = []
    for run in compared:
        against = [run.loss, run.mean_difference, run.diverges] if baseline else []
        rows.append([run.name, run.perplexity, *against, run.breaks, run.fails, _what_happened(run)])
    return Table("runs", f"over the first {compared[0].tokens:,} tokens{of}{by_rows}", columns, rows)


def measure_table(measured: "MeasureStatistics") -> "Table":
    """One measure, one row a run; for programs in its unit too."""
    from sinkbench.results.intervals import Interval
    from sinkbench.results.table import Column, Table

    unit = f" ({measured.unit})" if measured.unit else ""
    better = f", {measured.measure.better} is better" if measured.measure.better else ""
    first = next(iter(measured.runs.values()))
    columns = [
        Column(_name(measured.measure.column, name), name, ".4g", interval=isinstance(found, Interval))
        for name, found in first.items()
    ]
    rows = [[name, *statistics.values()] for name, statistics in measured.runs.items()]
    title = f"{measured.measure.label}{unit}{better}"
    return Table(measured.measure.column, title, [Column("run", "run"), *columns], rows)


def _name(column: str, statistic: str) -> str:
    """What programs call a statistic of a column."""
    return f"{column}_{statistic}".replace(" %", "").replace(" ", "_").replace(".", "_")


def _what_happened(run: "Comparison") -> str:
    from sinkbench.results.comparison import SPARSE, onset_text

    if run.spacing > SPARSE:
        return "fails; too few rows to tell where" if run.fails else "too few rows to tell"
    if run.breaks is not None:
        return f"fails from token {onset_text(run.breaks, run.spacing)} on"
    if run.diverges is not None:
        return "holds, at a small loss"
    return "holds"
