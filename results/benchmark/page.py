"""The page of the benchmark: its tables and figures, and every 128th row of its results.

    sinkbench sweep experiments/benchmark.toml --output-dir FULL
    sinkbench speed --window-size 256 --steps 100 --num-tokens 8192 --dense-tokens 0 --dtype float32 \\
        --strategies windowed attention_sinks context_shift pyramid h2o tova knorm keydiff random --output STEPS.md
    python results/benchmark/page.py FULL STEPS.json

writes ``README.md`` anew between the marks that stand in it, ``ranking.md``, the figures, and the thinned rows and
records beside itself. Intervals are 95 %, by a block bootstrap of the stream and by drawing documents.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import sinkbench
from sinkbench.results.comparison import shared_rows
from sinkbench.results.divergence import agreement
from sinkbench.results.documents import streams_of
from sinkbench.results.frontier import series_of
from sinkbench.results.intervals import Interval, interval
from sinkbench.results.recall import recall_by_distance, window_of
from sinkbench.results.run import DENSE, Run

HERE = Path(__file__).parent
EVERY = 128
TRAINED = 8192  # tokens: what lies beyond in a stream has no dense attention to be held against
BUDGETS = (128, 256, 512, 1024, 2048)
MAIN = ("windowed", "attention_sinks", "context_shift", "pyramid", "h2o", "tova")
GUARDED = ("knorm", "keydiff", "random")  # in figures with four sinks and 64 recent tokens
CORPORA = {"kjv": f"the first {TRAINED:,} tokens of a stream of the King James Bible", "stdlib": "32 files of Python"}


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
    def divergence(self) -> Interval:
        return interval(self.kl, streams=self.streams)


def rows_of(runs: Mapping[str, Run]) -> list[Row]:
    """Every run but the dense one, over the tokens for which there is dense attention to be held against."""
    series, frames = series_of(runs), shared_rows({name: run.frame for name, run in runs.items()})
    frames = {name: frame[frame["input_length"] <= TRAINED] for name, frame in frames.items()}
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


def ranked(rows: list[Row], budget: int) -> list[Row]:
    """Those of one budget, the nearest to dense attention first, with who is tied with it."""
    mine = sorted((row for row in rows if row.budget == budget), key=lambda row: row.kl.mean())
    best = mine[0].kl
    return [replace(row, tied=interval(row.kl - best, streams=row.streams).low <= 0) for row in mine]


def shown(value: Interval, digits: int = 3) -> str:
    """A value and its interval."""
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ranking(rows: list[Row]) -> Iterator[str]:
    """A table a budget: rank, divergence, loss, agreement."""
    for budget in BUDGETS:
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
    """Divergence by strategy and budget, sorted by the middle one; bold: the smallest, and those tied with it."""
    by_budget = {budget: {row.series: row for row in ranked(rows, budget)} for budget in BUDGETS}
    order = sorted(
        {row.series for row in rows if row.budget}, key=lambda name: _mean(by_budget[512].get(name), by_budget, name)
    )
    lines = []
    for name in order:
        cells = []
        for budget in BUDGETS:
            row = by_budget[budget].get(name)
            text = f"{row.kl.mean():.3f}" if row else ""
            cells.append(f"**{text}**" if row and row.tied else text)
        lines.append([f"`{name}`", *cells])
    return table(["", *(f"{budget:,}" for budget in BUDGETS)], lines)


def _mean(row: Row | None, by_budget: Mapping[int, Mapping[str, Row]], name: str) -> float:
    known = row or next(rows[name] for rows in by_budget.values() if name in rows)
    return float(known.kl.mean())


def formats(corpora: Mapping[str, list[Row]]) -> str:
    """What dense attention loses when all of it is kept in fewer bits."""
    names = [row.series for row in corpora["kjv"] if row.budget is None]
    of = {corpus: {row.series: row for row in rows} for corpus, rows in corpora.items()}
    lines = [[f"`{name}`", *(shown(of[corpus][name].divergence, 5) for corpus in of)] for name in names]
    return table(["KL (nats)", *of], lines)


def stream(runs: Mapping[str, Run]) -> str:
    """Perplexity over the whole stream, by strategy and budget, sorted by the middle one."""
    series = series_of(runs)
    found: dict[str, dict[int, Run]] = {}
    for name, run in runs.items():
        found.setdefault(series[name], {})[window_of(run) or 0] = run
    order = sorted(found, key=lambda name: (found[name].get(512) or next(iter(found[name].values()))).perplexity)
    lines = []
    for name in order:
        of = found[name]
        cells = [f"{of[budget].perplexity:,.2f}" if budget in of else "" for budget in BUDGETS]
        lines.append([f"`{name}`", *(cells if 0 not in of else [f"{of[0].perplexity:,.2f}", *[""] * 4])])
    return table(["", *(f"{budget:,}" for budget in BUDGETS)], lines)


def recall(runs: Mapping[str, Run], budget: int = 512) -> str:
    """Loss by recall distance at one budget: within the window, beyond it, and where it sets in."""
    chosen = {name: run for name, run in runs.items() if name == DENSE or window_of(run) == budget}
    series = series_of(runs)
    found = recall_by_distance(chosen, chosen[DENSE])
    lines = []
    for one in sorted(found, key=lambda one: one.whole.loss.value if one.whole.loss else 0.0):
        if one.beyond is None or one.within is None:
            continue
        losses = [shown(part.loss) if part.loss else "" for part in (one.whole, one.within, one.beyond, one.never)]
        share = f"{100 * one.beyond.share_of_loss:.0f}" if one.beyond.share_of_loss is not None else ""
        lines.append([f"`{series[one.name]}`", *losses, share])
    return table(["ΔNLL (nats)", "all", "within", "beyond", "never seen", "beyond, % of the loss"], lines)


def costs(runs: Mapping[str, Run], steps: Mapping[str, float], budget: int = 1024) -> str:
    """What each strategy costs at one budget: bytes held, microseconds a token in parallel; milliseconds of a step."""
    series, lines = series_of(runs), []
    for name, run in runs.items():
        if window_of(run) not in (budget, None):
            continue
        held, took = run.number("peak_kv_cache_bytes") or 0, run.number("seconds") or 0
        if window_of(run) is None:
            within = run.frame["kv_cache_bytes"][run.frame["input_length"] <= TRAINED]
            held = float(within.max())
        step = steps.get(name.split("-")[0]) if "-sinks" not in name else None
        lines.append(
            [
                f"`{series[name]}`",
                f"{held / 2**20:.1f}",
                f"{1e6 * took / len(run.frame):.0f}",
                "" if step is None else f"{step:.2f}",
            ]
        )
    return table(["", "MiB held", "µs a token, one stream in parallel", "ms a step"], lines)


def thin(full: Path, to: Path) -> None:
    """Every 128th row, and the last of each stream, with records that say so."""
    for path in sorted(full.rglob("*.csv")):
        record = json.loads(path.with_suffix(".json").read_text())
        header, *lines = path.read_text().splitlines(keepends=True)
        lengths = [int(line.split(",", 1)[0]) for line in lines]
        ends = [after <= length for length, after in zip(lengths, [*lengths[1:], 0], strict=True)]
        kept = [line for line, n, last in zip(lines, lengths, ends, strict=True) if n % EVERY == 0 or last]
        place = to / path.relative_to(full)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(header + "".join(kept))
        record["rows_written"] = len(kept)
        place.with_suffix(".json").write_text(json.dumps(record, indent=2))


def figures(full: Path) -> None:
    """Frontiers, recall, and perplexity over the stream."""
    for corpus, about in CORPORA.items():
        chosen = [path for path in sorted((full / corpus).glob("*.csv")) if _drawn(path.stem)]
        sinkbench.plot(
            chosen,
            features="frontier",
            title=f"SmolLM2-135M: what a budget costs, and what it loses\\n{about}",
            output=HERE / f"frontier{'' if corpus == 'kjv' else '_' + corpus}.png",
        )
    for budget, feature, name in ((512, "recall", "recall"), (1024, ("perplexity", "kv_cache"), "stream")):
        chosen = [
            path
            for path in sorted((full / "kjv").glob("*.csv"))
            if path.stem == DENSE or (_drawn(path.stem) and path.stem.endswith(f"window_{budget}"))
        ]
        sinkbench.plot(
            chosen,
            features=feature,
            title=f"SmolLM2-135M, King James Bible, {budget:,} entries",
            output=HERE / f"{name}.png",
        )


def _drawn(stem: str) -> bool:
    series = re.sub(r"-window_\d+$", "", stem)
    return series in (DENSE, *MAIN, "attention_sinks-q8_0", *(f"{name}-sinks_4-recent_64" for name in GUARDED))


def written(text: str, parts: Mapping[str, str]) -> str:
    """``text`` with what stands between ``<!-- NAME -->`` and ``<!-- / -->`` made anew."""
    for name, part in parts.items():
        found = re.compile(rf"(<!-- {name} -->\n).*?(<!-- / -->)", re.S)
        assert found.search(text), f"README.md has no place for {name}"
        text = found.sub(lambda match, part=part: f"{match[1]}{part}\n{match[2]}", text)
    return text


def main(full: Path, steps: Path | None = None) -> None:
    """Everything."""
    runs = {corpus: dict(sinkbench.read(full / corpus)) for corpus in CORPORA}
    rows = {corpus: rows_of(of) for corpus, of in runs.items()}
    costs_of = json.loads(steps.read_text())["costs"] if steps else []
    seconds = {cost["what"].removeprefix("stepwise, "): float(np.median(cost["timings"])) for cost in costs_of}
    text: dict[str, str] = {f"summary {corpus}": summary(of) for corpus, of in rows.items()}
    text |= {"formats": formats(rows), "stream": stream(runs["kjv"]), "recall": recall(runs["kjv"])}
    text |= {"costs": costs(runs["kjv"], seconds)}
    page = HERE / "README.md"
    page.write_text(written(page.read_text(), text))
    parts = ["# Rankings by budget"]
    for corpus, of in rows.items():
        parts += [f"## {corpus}: {CORPORA[corpus]}", *ranking(of)]
    (HERE / "ranking.md").write_text("\n\n".join(parts) + "\n")
    figures(full)
    thin(full, HERE)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
