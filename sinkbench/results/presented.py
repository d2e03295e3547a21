"""What is found about runs, as tables of values: by recall distance, over key tokens, by budget."""

from collections.abc import Sequence

from sinkbench.results.baseline import sound_length
from sinkbench.results.frontier import Budgeted
from sinkbench.results.key_tokens import GAIN, READ, KeyTokens
from sinkbench.results.recall import Recalled, RunRecall
from sinkbench.results.run import Run
from sinkbench.results.table import Column, Table

RECALL_COLUMNS = [
    Column("run", "run"),
    Column("tokens_back", "tokens back"),
    Column("distance_from"),
    Column("distance_to"),
    Column("tokens", "tokens", ",.0f"),
    Column("share_of_tokens", "% of tokens", ".1f", 100.0),
    Column("loss", "ΔNLL (nats)", "+.3f", interval=True),
    Column("share_of_loss", "% of loss", ".1f", 100.0),
]
NEVER, ALL, WITHIN, BEYOND = "never seen before", "all", "within the window", "beyond the window"


def recall_table(found: Sequence[RunRecall], baseline: str, ngram: int) -> Table:
    """Every run's loss, a row for each octave, and for all tokens within and beyond its window."""
    what = "pair" if ngram == 2 else f"{ngram}-gram"
    return Table(
        "recall",
        f"loss against {baseline}, by how many tokens back the same {what} was last seen",
        RECALL_COLUMNS,
        [[run.name, *cells] for run in found for cells in _recall_rows(run)],
    )


def recall_runs_table(found: Sequence[RunRecall]) -> Table:
    """What the rows of :func:`recall_table` are about, a row a run."""
    columns = [
        Column("run", "run"),
        Column("window", "window", ",.0f"),
        Column("first_token", "first token", ",.0f"),
        Column("last_token", "last token", ",.0f"),
        Column("onset", "loss sets in at", ",.0f"),
        Column("not_finite", "no number", ",.0f"),
    ]
    rows = [[run.name, run.window, run.first, run.last, run.onset, run.not_finite] for run in found]
    return Table("runs", "", columns, [list(row) for row in rows])


def recall_title(run: RunRecall, baseline: str) -> str:
    """Above the rows of one run."""
    window = f", window {run.window:,}" if run.window else ""
    onset = f"; the loss sets in {run.onset:,} tokens back" if run.onset else "; no distance at which the loss sets in"
    wrong = f"; {run.not_finite:,} tokens without a number are left out" if run.not_finite else ""
    return f"{run.name}{window}: loss against {baseline}, tokens {run.first:,} to {run.last:,}{onset}{wrong}"


def recall_summary(found: Sequence[RunRecall], baseline: str) -> Table:
    """A row a run: what it loses of tokens within its window, beyond it, and never seen before."""
    columns = [
        Column("run", "Run"),
        Column("window", "Window", ",.0f"),
        Column("all", "All tokens (nats)", "+.4f", interval=True),
        Column("within", "Seen within the window", "+.4f", interval=True),
        Column("beyond", "Seen beyond the window", "+.4f", interval=True),
        Column("beyond_tokens", "… % of tokens", ".1f", 100.0),
        Column("beyond_loss", "… % of loss", ".1f", 100.0),
        Column("never", "Never seen before", "+.4f", interval=True),
        Column("onset", "Loss sets in at (tokens back)", ",.0f"),
    ]
    rows = []
    for run in found:
        beyond = run.beyond
        shares = (beyond.share, beyond.share_of_loss) if beyond else (None, None)
        within = run.within and run.within.loss
        losses = [run.window, run.whole.loss, within, beyond and beyond.loss]
        rows.append([run.name, *losses, *shares, run.never.loss, run.onset])
    first, last = min(run.first for run in found), max(run.last for run in found)
    notes = [
        f"NLL minus that of {baseline}, by how many tokens back the same pair was last seen; tokens {first:,} "
        f"to {last:,}, of each run those behind its window.",
        "The loss sets in at the distance that parts tokens best into those that lose less and those that lose more.",
    ]
    return Table("recall", "Loss by recall distance (nats)", columns, rows, notes)


def _recall_rows(run: RunRecall) -> list[list]:
    groups = [(f"{octave.low:,} to {(octave.high or 0) - 1:,}", octave) for octave in run.octaves]
    groups.append((NEVER, run.never))
    groups += [(name, group) for name, group in ((WITHIN, run.within), (BEYOND, run.beyond)) if group]
    return [_recall_row(name, group) for name, group in (*groups, (ALL, run.whole))]


def _recall_row(name: str, group: Recalled) -> list:
    last = None if group.high is None else group.high - 1
    bounds = (None, None) if name in (NEVER, ALL) else (group.low, last)
    return [name, *bounds, group.tokens, group.share, group.loss, group.share_of_loss]


def key_token_table(found: Sequence[KeyTokens], long: str, short: str) -> Table:
    """LongPPL of every run."""
    columns = [
        Column("run", "run"),
        Column("long_ppl", "LongPPL", ".3f", interval=True),
        Column("other_ppl", "perplexity of the others", ".3f", interval=True),
        Column("key_tokens", "key tokens", ",.0f"),
        Column("tokens", "of", ",.0f"),
    ]
    rows = [[run.name, run.long_ppl, run.other_ppl, run.key, run.tokens] for run in found]
    note = (
        f"A token is a key token where its NLL in {long} is below {READ:g} nats and more than {GAIN:g} nats below that "
        f"in {short}."
    )
    return Table("key_tokens", f"key tokens of {long} against {short}", columns, [list(row) for row in rows], [note])


def budget_table(found: Sequence[Budgeted], baseline: Run) -> Table:
    """Every run by what it costs and loses."""
    sound = sound_length(baseline)
    up_to = (
        f" up to the {sound:,} tokens that {baseline.name} was trained for" if sound and baseline.length > sound else ""
    )
    columns = [
        Column("run", "Run"),
        Column("strategy"),
        Column("window", "Window", ",.0f"),
        Column("held_bytes", "Cache (MiB)", ",.2f", 2.0**-20),
        Column("latency", "A step (ms)", ",.3f", 1e3),
        Column("loss", f"ΔNLL to {baseline.name}", "+.4f", interval=True),
        Column("kl", "KL (nats)", ".4f", interval=True),
        Column("unbeaten_by_bytes", "On the frontier (bytes)"),
        Column("unbeaten_by_latency", "On the frontier (latency)"),
    ]
    rows = [
        [one.name, one.strategy, one.window, one.held, one.latency, one.loss, one.kl, one.best, one.fastest]
        for one in found
    ]
    note = "On the frontier are the runs of which no other costs no more and loses less."
    return Table(
        "budgets", f"Cost and loss to {baseline.name}, by budget{up_to}", columns, [list(row) for row in rows], [note]
    )
