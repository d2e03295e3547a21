"""``sinkbench compare``: what a strategy loses, over the same tokens."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinkbench.cli.options import place
from sinkbench.cli.output import Document, Format, FormatOption, print_table, show
from sinkbench.library.comparing import check_comparison, compared

if TYPE_CHECKING:
    from sinkbench.results.recall import RunRecall


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
    from sinkbench.library.reading import runs_of

    span = check_comparison(by, ngram, tokens, key_tokens)
    document, recalled = compared(runs_of(runs), baseline, by, ngram, span, key_tokens)

    def people() -> None:
        if recalled:
            _print_recall(document, recalled)
        else:
            _print(document)

    show(document, form, people)


def _print_recall(document: Document, recalled: "list[RunRecall]") -> None:
    """A table a run, and the notes below."""
    from sinkbench.results.presented import recall_title
    from sinkbench.results.table import Table

    table = document.tables[0]
    for run in recalled:
        rows = [row[1:] for row in table.rows if row[0] == run.name]
        part = Table(table.name, recall_title(run, document.facts["baseline"]), table.columns[1:], rows)
        print_table(part, inline=True)
        typer.echo()
    for note in document.notes:
        typer.echo(note)


def _print(document: Document) -> None:
    """The first table, the notes, and what else was measured."""
    first, *further = document.tables
    print_table(first)
    for note in document.notes:
        typer.echo(note)
    for table in further:
        typer.echo()
        print_table(table)
