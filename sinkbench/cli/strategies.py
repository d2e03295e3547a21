"""``sinkbench strategies``: what can be kept."""

from typing import TYPE_CHECKING

from sinkbench.cli.output import Document, Format, FormatOption, show

if TYPE_CHECKING:
    from sinkbench.strategies.registry import Found


def strategies(form: FormatOption = Format.text) -> None:
    """List the strategies: what each keeps, its parameters with their defaults, where it is from.

    One of your own is named as FILE.py:CLASS (docs/strategies.md).
    """
    from sinkbench.results.table import Column, Table
    from sinkbench.strategies.base import parameters, sentence
    from sinkbench.strategies.registry import available

    found = available()
    columns = [
        Column("experiment", "--experiment"),
        Column("keeps", "keeps, between two tokens"),
        Column("parameters", "--set"),
        Column("source", "from"),
    ]
    rows = [[one.name, sentence(one.kind), parameters(one.kind), one.source] for one in found]
    show(Document([Table("strategies", "", columns, [list(row) for row in rows])]), form, lambda: _print(found))


def _print(found: "list[Found]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sinkbench.results.table import settings_text
    from sinkbench.strategies.base import parameters, sentence

    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    table.add_column("--experiment", no_wrap=True)
    table.add_column("keeps, between two tokens", overflow="fold")
    table.add_column("--set", overflow="fold", min_width=12)
    table.add_column("from", overflow="fold")
    for one in found:
        settings = settings_text(parameters(one.kind)).replace(" ", "\n")
        table.add_row(Text(one.name), Text(sentence(one.kind)), Text(settings), Text(one.source))
    Console().print(table)
