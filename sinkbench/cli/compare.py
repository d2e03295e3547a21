"""``sinkbench compare``: what a strategy loses, over the same tokens."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinkbench.cli.options import place, tokens_between
from sinkbench.cli.output import Document, Format, FormatOption, print_table, show
from sinkbench.errors import UserError

if TYPE_CHECKING:
    from sinkbench.results.baseline import Baseline
    from sinkbench.results.run import Run


class By(StrEnum):
    """What ``compare`` looks at in place of whole runs."""

    recall_distance = "recall-distance"
    budget = "budget"


def compare(
    runs: Annotated[
        list[Path], typer.Argument(parser=place, metavar="RUN...", help="CSV files of runs, or folders of them.")
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The run that the others are compared to, as the table calls it; by default the one of dense "
            "attention.",
        ),
    ] = None,
    by: Annotated[
        By | None,
        typer.Option(
            metavar="WHAT",
            help="recall-distance: the loss by how many tokens back a pair was last seen; budget: the loss beside "
            "what the cache holds.",
        ),
    ] = None,
    ngram: Annotated[
        int | None, typer.Option(metavar="N", help="By recall distance: of N tokens in place of pairs.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:LAST",
            help="By recall distance: these only; by default those behind a run's window, up to the length that a "
            "dense baseline was trained for.",
        ),
    ] = None,
    key_tokens: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="LONG SHORT",
            help="LongPPL: perplexity of the tokens that run LONG, with a long context, predicts much better than "
            "SHORT; names as the table has them.",
        ),
    ] = None,
    form: FormatOption = Format.text,
) -> None:
    """Compare runs over the same tokens: perplexity, loss to dense attention or another run, where they part.

    Intervals are 95 %, by a block bootstrap; |Δ| is the mean absolute
    difference of NLLs. A run parts from the baseline where its NLL over 256
    tokens is 0.05 nats above; it fails where it is 0.5 nats above the best.
    """
    import numpy as np

    span = tokens_between(tokens)
    _refuse(by, ngram, tokens, key_tokens)
    found = _read(runs)
    if len(found) < 2:
        raise UserError("at least two runs are needed to compare: give CSV files, or a folder that holds several")
    with np.errstate(all="ignore"):  # what is no number shows as such
        if key_tokens is not None:
            _over_key_tokens(found, key_tokens, form)
            return
        from sinkbench.results.baseline import choose_baseline

        chosen = choose_baseline(list(found.values()), baseline)
        if by is By.recall_distance:
            _by_recall(found, chosen, 2 if ngram is None else ngram, span, form)
        elif by is By.budget:
            _by_budget(found, chosen, form)
        else:
            from sinkbench.cli.comparing import compare_whole

            compare_whole(found, chosen, form)


def _refuse(by: By | None, ngram: int | None, tokens: str | None, key_tokens: tuple[str, str] | None) -> None:
    """Refuse options that do nothing together, and n-grams that are none."""
    recall = by is By.recall_distance
    for name, value in (("--ngram", ngram), ("--tokens", tokens)):
        if value is not None and not recall:
            raise UserError(f"{name} needs --by recall-distance")
    if ngram is not None and ngram < 2:
        raise UserError(f"--ngram is {ngram}: give 2 or more")
    if key_tokens is not None and by is not None:
        raise UserError("--key-tokens is a comparison of its own: leave out --by")


def _read(paths: list[Path]) -> "dict[str, Run]":
    """Runs by names that are as short as tells them apart; a file that is given twice is one run."""
    from dataclasses import replace

    from sinkbench.results.naming import distinguishing_names
    from sinkbench.results.reading import read_run, read_runs

    found: dict[Path, Run] = {}
    for path in dict.fromkeys(paths):
        for run in read_runs(path).values() if path.is_dir() else [read_run(path)]:
            found.setdefault(((path if path.is_dir() else path.parent) / run.name).resolve(), run)
    names = distinguishing_names(list(found))
    return {name: replace(run, name=name) for name, run in zip(names, found.values(), strict=True)}


def _needed(chosen: "Baseline", what: str) -> "Run":
    if chosen.run is None:
        raise UserError(f"{what} needs a baseline: {chosen.why.removeprefix('no baseline: ')}")
    return chosen.run


def _over_key_tokens(found: "dict[str, Run]", names: tuple[str, str], form: Format) -> None:
    from sinkbench.results.key_tokens import over_key_tokens
    from sinkbench.results.presented import key_token_table

    table = key_token_table(over_key_tokens(found, *names), *names)
    _show_one(Document([table], {"long": names[0], "short": names[1]}, table.notes), form)


def _by_recall(
    found: "dict[str, Run]", chosen: "Baseline", ngram: int, span: tuple[int | None, int | None], form: Format
) -> None:
    from sinkbench.results.presented import recall_runs_table, recall_table, recall_title
    from sinkbench.results.recall import recall_by_distance
    from sinkbench.results.table import Table

    baseline = _needed(chosen, "--by recall-distance")
    recalled = recall_by_distance(found, baseline, ngram, span)
    table = recall_table(recalled, baseline.name, ngram)
    document = Document([table, recall_runs_table(recalled)], {"baseline": baseline.name, "ngram": ngram}, [chosen.why])

    def people() -> None:
        for run in recalled:
            rows = [row[1:] for row in table.rows if row[0] == run.name]
            part = Table(table.name, recall_title(run, baseline.name), table.columns[1:], rows)
            print_table(part, inline=True)
            typer.echo()
        typer.echo(chosen.why)

    show(document, form, people)


def _by_budget(found: "dict[str, Run]", chosen: "Baseline", form: Format) -> None:
    from sinkbench.results.frontier import budgets
    from sinkbench.results.presented import budget_table

    baseline = _needed(chosen, "--by budget")
    table = budget_table(budgets(found, baseline), baseline)
    _show_one(Document([table], {"baseline": baseline.name}, [chosen.why, *table.notes]), form)


def _show_one(document: Document, form: Format) -> None:
    """One table, and its notes below."""

    def people() -> None:
        print_table(document.tables[0])
        for note in document.notes:
            typer.echo(note)

    show(document, form, people)
