"""``sinkbench strategies``: what can be kept."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sinkbench.strategies.base import parameters, sentence
from sinkbench.strategies.registry import available


def strategies() -> None:
    """List the strategies: what each keeps, its parameters with their defaults, where it is from.

    One of your own is named as FILE.py:CLASS (docs/strategies.md).
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    table.add_column("--experiment", no_wrap=True)
    table.add_column("keeps, between two tokens", overflow="fold")
    table.add_column("--set", overflow="fold", min_width=12)
    table.add_column("from", overflow="fold")
    for found in available():
        defaults = "\n".join(f"{name}={_shown(value)}" for name, value in parameters(found.kind).items())
        table.add_row(Text(found.name), Text(sentence(found.kind)), Text(defaults or "-"), Text(found.source))
    Console().print(table)


def _shown(value: object) -> str:
    return "auto" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
