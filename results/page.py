"""The page of a benchmark: its tables and figures, and some of the rows of its results.

    sinkbench sweep experiments/benchmark_cpu.toml --output-dir FULL
    python results/page.py FULL results/benchmark_cpu

writes the ``README.md`` of that folder anew between the marks that stand in it, a ``ranking.md``, the figures, a
``report.html`` of what has the middle one of the budgets, and beside them rows and records, thinned to 400 rows a run
at most. What steps cost is taken from a third argument, where
there is one: ``speed.json``, which ``sinkbench speed --output speed.md`` writes.

A folder of FULL is a corpus, with a run of dense attention that the others are held against, as far as the model was
trained for. Intervals are 95 %, by a block bootstrap of a stream and by drawing documents.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import chdir
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import sinkbench
from sinkbench.results.baseline import sound_length
from sinkbench.results.comparison import shared_rows
from sinkbench.results.divergence import agreement
from sinkbench.results.documents import streams_of
from sinkbench.results.frontier import series_of
from sinkbench.results.intervals import Interval, interval
from sinkbench.results.recall import recall_by_distance, window_of
from sinkbench.results.report.writing import write_report
from sinkbench.results.run import DENSE, Run
from sinkbench.validation import MOST

ROWS, ALL_ROWS = 400, 12_000  # of a run, and of all runs, that are kept, about
FEW = 10  # documents, of which drawing some says nothing
MAIN = ("windowed", "attention_sinks", "context_shift", "pyramid", "h2o", "tova")
GUARDED = ("knorm", "keydiff", "random")  # in figures with four sinks and recent tokens
Runs = Mapping[str, Run]


@dataclass(frozen=True)
class Row:
    """A run on one corpus: its line in the rankings, its budget, and what it loses to dense attention.

    Attributes:
        series: the run's name without the budget.
        budget: entries it keeps; ``None`` for all.
        kl: of each token, nats.
        loss: mean NLL above dense attention, nats.
        tied: whether its divergence and the smallest at this budget differ by no more than chance.
    """

    series: str
    budget: int | None
    run: Run
    kl: np.ndarray
    streams: np.ndarray | None
    loss: Interval
    agrees: Interval
    tied: bool = False

    @property
    def sure(self) -> bool:
        """Whether intervals say anything: of a stream, or of documents enough."""
        return self.streams is None or len(np.unique(self.streams)) >= FEW

    @property
    def divergence(self) -> Interval:
        return interval(self.kl, streams=self.streams)


def rows_of(runs: Runs) -> list[Row]:
    """Every run but the dense one, over the tokens for which there is dense attention to be held against."""
    series, frames = series_of(runs), shared_rows({name: run.frame for name, run in runs.items()})
    trained = sound_length(runs[DENSE]) or MOST
    frames = {name: frame[frame["input_length"] <= trained] for name, frame in frames.items()}
    dense = frames[DENSE]["nll"].to_numpy()
    found = []
    for name, run in runs.items():
        if name != DENSE:
            frame = frames[name]
            streams = streams_of(frame)
            kl, loss = frame["kl"].to_numpy(), interval(frame["nll"].to_numpy() - dense, streams=streams)
            same = agreement(frame)["same top (%)"]
            assert isinstance(same, Interval)
            found.append(Row(series[name], window_of(run), run, kl, streams, loss, same))
    return found


def budgets_of(rows: list[Row]) -> list[int]:
    """The budgets that several strategies have."""
    known = [row.budget for row in rows if row.budget]
    return sorted({budget for budget in known if known.count(budget) > 2})


def middle(budgets: list[int]) -> int:
    """The one of ``budgets`` in their middle."""
    return budgets[len(budgets) // 2]


def ranked(rows: list[Row], budget: int) -> list[Row]:
    """Those of one budget, the nearest to dense attention first, with who is tied with it."""
    mine = sorted((row for row in rows if row.budget == budget), key=lambda row: row.kl.mean())
    best = mine[0].kl
    return [replace(row, tied=row.sure and interval(row.kl - best, streams=row.streams).low <= 0) for row in mine]


def shown(value: Interval, digits: int = 3) -> str:
    """A value and its interval."""
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ranking(rows: list[Row]) -> Iterator[str]:
    """A table a budget: rank, divergence, loss, agreement."""
    for budget in budgets_of(rows):
        lines = [
            [
                f"{place}{' =' if row.tied and place > 1 else ''}",
                f"`{row.series}`",
                shown(row.divergence),
                shown(row.loss),
                shown(row.agrees, 1),
            ]
            for place, row in enumerate(ranked(rows, budget), start=1)
        ]
        head = ["", "strategy", "KL (nats)", "ΔNLL (nats)", "same top token (%)"]
        yield f"### {budget:,} entries\n\n" + table(head, lines)


def summary(rows: list[Row]) -> str:
    """Divergence by strategy and budget, sorted by the largest; bold: the smallest, and those tied with it."""
    budgets = budgets_of(rows)
    by_budget = {budget: {row.series: row for row in ranked(rows, budget)} for budget in budgets}
    last = by_budget[budgets[-1]]
    names = {row.series: row for row in rows if row.budget in budgets}
    lines = []
    for name in sorted(names, key=lambda name: float(last.get(name, names[name]).kl.mean())):
        cells = []
        for budget in budgets:
            row = by_budget[budget].get(name)
            text = (shown(row.divergence) if row.sure else f"{row.kl.mean():.3f}") if row else ""
            cells.append(f"**{text}**" if row and row.tied else text)
        lines.append([f"`{name}`", *cells])
    return table(["KL (nats)", *(f"{budget:,}" for budget in budgets)], lines)


def formats(corpora: Mapping[str, list[Row]]) -> str:
    """What dense attention loses when all of it is kept in fewer bits."""
    names = [row.series for row in next(iter(corpora.values())) if row.budget is None]
    of = {corpus: {row.series: row for row in rows} for corpus, rows in corpora.items()}
    lines = [[f"`{name}`", *(shown(of[corpus][name].divergence, 5) for corpus in of)] for name in names]
    return table(["KL (nats)", *of], lines)


def perplexities(runs: Runs, budgets: list[int]) -> str:
    """Perplexity over all tokens, by strategy and budget, sorted by the largest."""
    series = series_of(runs)
    found: dict[str, dict[int, Run]] = {}
    for name, run in runs.items():
        found.setdefault(series[name], {})[window_of(run) or 0] = run
    lines = []
    for name, of in sorted(found.items(), key=lambda item: item[1][max(item[1])].perplexity):
        cells = [f"{of[budget].perplexity:,.2f}" if budget in of else "" for budget in [0, *budgets]]
        lines.append([f"`{name}`", *cells])
    return table(["perplexity", "all", *(f"{budget:,}" for budget in budgets)], lines)


def recall(runs: Runs, budget: int) -> str:
    """Loss by recall distance at one budget: within the window, beyond it, and of pairs never seen."""
    chosen = {name: run for name, run in runs.items() if name == DENSE or window_of(run) == budget}
    series, lines = series_of(runs), []
    found = recall_by_distance(chosen, chosen[DENSE])
    for one in sorted(found, key=lambda one: one.whole.loss.value if one.whole.loss else 0.0):
        if one.beyond is None or one.within is None:
            continue
        losses = [shown(part.loss) if part.loss else "" for part in (one.whole, one.within, one.beyond, one.never)]
        share = f"{100 * one.beyond.share_of_loss:.0f}" if one.beyond.share_of_loss is not None else ""
        lines.append([f"`{series[one.name]}`", *losses, share])
    return table(["ΔNLL (nats)", "all", "within", "beyond", "never seen", "beyond, % of the loss"], lines)


def costs(runs: Runs, steps: Mapping[str, float], budget: int) -> str:
    """What each strategy costs at one budget: bytes held, milliseconds a token in parallel and of a step."""
    series, lines = series_of(runs), []
    for name, run in runs.items():
        if window_of(run) in (budget, None):
            held, took = run.number("peak_kv_cache_bytes") or 0, run.number("seconds") or 0
            step = steps.get(series[name])
            numbers = f"{held / 2**20:.1f}", f"{1e3 * took / len(run.frame):.2f}"
            lines.append([f"`{series[name]}`", *numbers, *([f"{step:.2f}" if step else ""] if steps else [])])
    return table(["", "MiB held", "ms a token, in parallel", *(["ms a step"] if steps else [])], lines)


def thin(full: Path, to: Path) -> None:
    """Every so many-th row, and the last of each stream, with records that say so."""
    paths = sorted(full.rglob("*.csv"))
    rows = min(ROWS, ALL_ROWS / len(paths))
    for path in paths:
        record = json.loads(path.with_suffix(".json").read_text())
        header, *lines = path.read_text().splitlines(keepends=True)
        every = max(1, 2 ** round(np.log2(len(lines) / rows)))
        lengths = [int(line.split(",", 1)[0]) for line in lines]
        ends = [after <= length for length, after in zip(lengths, [*lengths[1:], 0], strict=True)]
        kept = [line for line, n, last in zip(lines, lengths, ends, strict=True) if n % every == 0 or last]
        place = to / path.relative_to(full)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(header + "".join(kept))
        record["rows_written"] = len(kept)
        place.with_suffix(".json").write_text(json.dumps(record, indent=2))


def report(full: Path, page: Path, corpora: Mapping[str, list[Row]]) -> None:
    """The page of dense attention, its formats, and what has the middle budget."""
    full, page = full.resolve(), page.resolve()
    with TemporaryDirectory() as place, chdir(place):  # headings are paths as they are given
        for corpus, rows in corpora.items():
            budgets, folder = budgets_of(rows), Path(page.name, corpus)
            folder.mkdir(parents=True)
            for stem in [DENSE, *(row.run.name for row in rows if row.budget in (middle(budgets), None))]:
                for suffix in (".csv", ".json"):
                    shutil.copy(full / corpus / f"{stem}{suffix}", folder)
        write_report([Path(page.name)], page / "report.html")
    (page / "report.md").unlink()


def figures(full: Path, page: Path, corpora: Mapping[str, list[Row]]) -> None:
    """Frontiers; of the first corpus, a stream, recall, retention and perplexity over it."""
    for number, (corpus, of) in enumerate(corpora.items()):
        if not of[0].sure:
            continue
        chosen = [path for path in sorted((full / corpus).glob("*.csv")) if _drawn(path.stem)]
        title = f"SmolLM2-135M, {corpus}: what a budget costs, and what it loses"
        output = page / f"frontier{f'_{corpus}' if number else ''}.png"
        sinkbench.plot(chosen, features="frontier", title=title, output=output)
    corpus, rows = next(iter(corpora.items()))
    budgets = budgets_of(rows)
    small = budgets[0]
    drawn = [(middle(budgets), "recall", "recall"), (small, ("perplexity", "kv_cache"), "perplexity")]
    if any((full / corpus).glob("*.trace.npz")):
        drawn.append((small, "retention", "retention"))
    for budget, feature, name in drawn:
        chosen = [
            path
            for path in sorted((full / corpus).glob("*.csv"))
            if (path.stem == DENSE and feature != "retention")
            or (_drawn(path.stem) and path.stem.endswith(f"window_{budget}"))
        ]
        title = f"SmolLM2-135M, {corpus}, {budget:,} entries"
        sinkbench.plot(chosen, features=feature, title=title, output=page / f"{name}.png")


def _drawn(stem: str) -> bool:
    series = re.sub(r"-window_\d+$", "", stem)
    guarded = any(re.fullmatch(rf"{name}-sinks_4-recent_\d+", series) for name in GUARDED)
    return guarded or series in (DENSE, *MAIN, "attention_sinks-q8_0")


def written(text: str, parts: Mapping[str, str]) -> str:
    """``text`` with what stands between ``<!-- NAME -->`` and ``<!-- / -->`` made anew."""
    for name, part in parts.items():
        found = re.compile(rf"(<!-- {name} -->\n).*?(<!-- / -->)", re.S)
        text = found.sub(lambda match, part=part: f"{match[1]}{part}\n{match[2]}", text)
    return text


def main(full: Path, page: Path, steps: Path | None = None) -> None:
    """Everything."""
    runs = {path.name: dict(sinkbench.read(path)) for path in sorted(full.iterdir()) if path.is_dir()}
    rows = {corpus: rows_of(of) for corpus, of in runs.items()}
    costs_of = json.loads(steps.read_text())["costs"] if steps else []
    known = {cost["what"].removeprefix("stepwise, "): float(np.median(cost["timings"])) for cost in costs_of}
    text: dict[str, str] = {"formats": formats(rows)}
    for corpus, of in rows.items():
        budgets = budgets_of(of)
        text |= {f"summary {corpus}": summary(of), f"perplexity {corpus}": perplexities(runs[corpus], budgets)}
        text |= {f"recall {corpus}": recall(runs[corpus], middle(budgets))}
        text |= {f"costs {corpus}": costs(runs[corpus], known, middle(budgets))}
    readme = page / "README.md"
    readme.write_text(written(readme.read_text(), text))
    parts = ["# Rankings by budget"]
    for corpus, of in rows.items():
        parts += [f"## {corpus}", *ranking(of)] if of[0].sure else []
    (page / "ranking.md").write_text("\n\n".join(parts) + "\n")
    figures(full, page, rows)
    report(full, page, rows)
    thin(full, page)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
