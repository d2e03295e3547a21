"""Bits per byte and perplexity per word: the only units in which models with different tokenizers compare."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sinkbench.results.comparison import Comparison
from sinkbench.results.intervals import Interval
from sinkbench.results.record import SPELLED
from sinkbench.results.run import Run
from sinkbench.results.table import Column, Table


@dataclass(frozen=True)
class Units:
    """What a perplexity per token comes to in units of the text."""

    bits_per_byte: Interval
    word_perplexity: Interval | None


def units_of(perplexity: Interval | None, spelled: Mapping[str, float] | None) -> Units | None:
    """``perplexity`` per token in units of the text; ``None`` where that is not known.

    Args:
        perplexity: ``exp`` of the mean NLL, with its interval.
        spelled: ``tokens`` over which, and ``bytes`` and ``words`` of the text that these spell.
    """
    if perplexity is None or not spelled:
        return None
    nats = [math.log(x) if x > 0 else math.nan for x in (perplexity.value, perplexity.low, perplexity.high)]
    total = Interval(*nats).times(spelled["tokens"])
    words = total.times(1 / spelled["words"]).exp() if spelled["words"] else None
    return Units(total.times(1 / (math.log(2) * spelled["bytes"])), words)


def spelled_by(run: Run) -> dict[str, float] | None:
    """Tokens, bytes and words of the text that the run's rows predict, as its record says; ``None`` where it does not.

    A record that speaks of more or fewer rows than there are says nothing.
    """
    found = {name: run.number(SPELLED, name) for name in ("tokens", "bytes", "words")}
    if any(value is None or value < 0 for value in found.values()) or not found["bytes"]:
        return None
    return {name: value or 0.0 for name, value in found.items()} if found["tokens"] == _predicted(run) else None


def _predicted(run: Run) -> float | None:
    """How many tokens the rows predict; ``None`` where record and rows differ."""
    if run.recorded("protocol") is None:
        return run.length
    written = run.number("rows_written") or run.number("rows")  # windows read tokens that they do not predict
    return run.number("rows") if len(run.frame) == written else None


def units_table(compared: Sequence[Comparison], runs: Mapping[str, Run]) -> Table | None:
    """The runs in units of the text that they share; ``None`` where its size is in no record.

    The same tokens spell the same text, so the record of any run that ends where all do will say it.
    """
    tokens = compared[0].tokens
    spelled = next((size for run in runs.values() if run.length == tokens and (size := spelled_by(run))), None)
    found = {run.name: units_of(run.perplexity, spelled) for run in compared}
    if not spelled or not any(found.values()):
        return None
    columns = [
        Column("run", "run"),
        Column("bits_per_byte", "bits per byte", ".4f", interval=True),
        Column("word_perplexity", "perplexity per word", ",.2f", interval=True),
    ]
    rows = [[name, units and units.bits_per_byte, units and units.word_perplexity] for name, units in found.items()]
    title = f"In units of the text ({spelled['bytes']:,.0f} bytes, {spelled['words']:,.0f} words), lower is better"
    return Table("units", title, columns, [list(row) for row in rows])
