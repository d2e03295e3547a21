"""What is measured: each column of a result file, declared once.

From :data:`MEASURES` follow the columns of a file and which of them readers take, what ``sinkbench plot --features``
knows, what a report draws, and what ``sinkbench compare`` shows beside perplexities. To add a measure, compute it and
add one entry.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from sinkbench.results.transforms import Transform, averaged, log, smoothed, unchanged

if TYPE_CHECKING:
    from sinkbench.config import RunConfig


class Presence(Enum):
    """Which files have a column."""

    SEED = "every file, those of the scripts that sinkbench replaces too"
    ALWAYS = "every file that sinkbench writes"
    WHERE_MEASURED = "files of runs that measured it"


class ComparedAs(Enum):
    """What ``sinkbench compare`` shows of a column, over the rows that runs share."""

    NONE = "nothing, or what has a column of its own in the table"
    MEAN = "mean with interval"
    SHARE = "mean with interval, in percent"
    DISTRIBUTION = "mean with interval, median, high quantiles and largest"


@dataclass(frozen=True)
class Drawing:
    """How a measure is drawn over the input length.

    Attributes:
        feature: what ``--features`` calls it.
        heading: over its figure in a report.
        line: matplotlib's style of its lines where no feature before it in the figure has that style.
        transform: from the column to the curve.
        from_zero: whether the axis of a report begins at 0.
        limited: whether ``--log-perplexity-limit`` bounds the axis.
        logarithmic: whether the axis is; what is not above 0 is then not drawn.
        substitute: the column drawn in its place where no run has this one, and why that is.
        missing: what to say where no run has the column, nor its substitute.
        axis: beside the figure of a report, where the label is too long for a small screen.
    """

    feature: str
    heading: str
    line: str = "-"
    transform: Transform = unchanged
    from_zero: bool = False
    limited: bool = False
    logarithmic: bool = False
    substitute: tuple[str, str] | None = None
    missing: str = "run the experiments again"
    axis: str = ""


@dataclass(frozen=True)
class Measure:
    """A column.

    Attributes:
        column: its name in the header.
        label: what it is, in a few words without the unit. Of a drawing: what is drawn.
        sentence: what it means, or how what is drawn comes from it; without a full stop.
        units: name and factor from the value drawn; the first in which the largest is at least 1 counts, else the last.
        better: ``lower`` or ``higher``; empty where neither is.
        presence: which files have it.
        command: the command that measures it.
        reference: whether it needs the reference run of ``--reference``.
        drawing: ``None`` for what is not drawn.
        compared: what ``sinkbench compare`` shows of it.
    """

    column: str
    label: str
    sentence: str
    units: tuple[tuple[str, float], ...] = (("", 1.0),)
    better: str = ""
    presence: Presence = Presence.WHERE_MEASURED
    command: str = "run"
    reference: bool = False
    drawing: Drawing | None = None
    compared: ComparedAs = ComparedAs.NONE

    @property
    def label_within(self) -> str:
        """``label`` as it stands within a sentence."""
        return self.label if self.label[1:2].isupper() else self.label[:1].lower() + self.label[1:]

    @property
    def note(self) -> str:
        """``sentence``, and which values are better."""
        return f"{self.sentence}; {self.better} is better." if self.better else f"{self.sentence}."

    def unit(self, largest: float) -> tuple[str, float]:
        """Name and factor of the unit in which values up to ``largest`` are shown."""
        return next((unit for unit in self.units if largest * unit[1] >= 1), self.units[-1])


NOT_GENERATED = "they are not of generated text; use sinkbench generate"
PERCENT = (("%", 100.0),)
# what --features calls figures of their own: of traces, of loss by recall distance, of cost against loss
RETENTION, RECALL, FRONTIER = "retention", "recall", "frontier"
OWN_FIGURES = (RETENTION, RECALL, FRONTIER)

_DECLARED = (
    Measure("input_length", "Input length", "Tokens fed so far: 1, 2, 3 …", (("tokens", 1.0),), "", Presence.SEED),
    Measure("nll", "NLL", "-ln p of the next token, in float32", (("nats", 1.0),), "lower", Presence.SEED),
    Measure("ppl", "Perplexity of a token", "exp(nll)", better="lower", presence=Presence.SEED),
    Measure(
        "overall_ppl",
        "Log perplexity",
        "Mean NLL of all tokens so far",
        (("nats", 1.0),),
        "lower",
        Presence.SEED,
        drawing=Drawing("perplexity", "Perplexity", "-", log, limited=True),
    ),
    Measure(
        "cuda_vram_allocated",
        "CUDA VRAM",
        "Allocated by torch on all visible devices",
        (("GiB", 1.0),),
        "lower",
        Presence.SEED,
        drawing=Drawing(
            "vram",
            "CUDA memory",
            "--",
            substitute=("kv_cache_bytes", "no CUDA"),
            missing="they were made without CUDA and hold no kv_cache_bytes either; leave out the feature vram",
        ),
    ),
    Measure(
        "latency",
        "Time per token",
        "Rolling median of the steps",
        (("s", 1.0), ("ms", 1000.0)),
        "lower",
        Presence.SEED,
        drawing=Drawing(
            "latency",
            "Latency",
            ":",
            smoothed,
            from_zero=True,
            missing="they were made with the parallel engine, which runs no step a token; use --engine stepwise",
        ),
    ),
    Measure(
        "kv_cache_bytes",
        "KV cache",
        "Keys and values held after a token",
        (("MiB", 2.0**-20),),
        "lower",
        Presence.ALWAYS,
        drawing=Drawing("kv_cache", "KV cache", "--", from_zero=True),
    ),
    Measure("token", "Token", "Id of the token that was predicted", presence=Presence.ALWAYS),
    Measure("stream", "Document", "Which of the documents: 0, 1, 2 …", command="run --documents"),
    Measure(
        "kl",
        "Divergence from the reference",
        "Kullback-Leibler divergence from the next-token distribution of the reference, mean of 256 tokens",
        (("nats", 1.0),),
        "lower",
        reference=True,
        drawing=Drawing(
            *("kl", "Divergence from the reference", "-", averaged),
            logarithmic=True,
            missing="run the experiments with --reference transformers",
            axis="KL to the reference",
        ),
    ),
    Measure(
        "same_top",
        "Same top token",
        "Whether run and reference have the same most likely next token",
        PERCENT,
        "higher",
        reference=True,
    ),
    Measure(
        "reference_nll",
        "NLL of the reference",
        "-ln p of the next token under the reference, in float32",
        (("nats", 1.0),),
        "lower",
        reference=True,
    ),
    Measure(
        "fresh_nll",
        "NLL with fresh context",
        "Mean of 256 tokens, each scored by the same model without the cache",
        (("nats", 1.0),),
        "lower",
        command="generate",
        drawing=Drawing("fluency", "Fluency", "-", averaged, missing=NOT_GENERATED),
    ),
    Measure(
        "repetition",
        "Repeated 4-grams",
        "Of the text of the last 256 tokens",
        PERCENT,
        "lower",
        command="generate",
        drawing=Drawing("repetition", "Repetition", "--", from_zero=True, missing=NOT_GENERATED),
    ),
    Measure(
        "non_word",
        "Non-words",
        "Of the text of the last 256 tokens",
        PERCENT,
        "lower",
        command="generate",
        drawing=Drawing("non_word", "Non-words", ":", from_zero=True, missing=NOT_GENERATED),
    ),
)

MEASURES = {measure.column: measure for measure in _DECLARED}
SEED_COLUMNS = tuple(m.column for m in _DECLARED if m.presence is Presence.SEED)
BASE_COLUMNS = SEED_COLUMNS + tuple(m.column for m in _DECLARED if m.presence is Presence.ALWAYS)


def known_columns() -> tuple[str, ...]:
    """All columns that readers take, those of every file first."""
    return row_columns(column for column in MEASURES if column not in BASE_COLUMNS)


def row_columns(further: Iterable[str] = ()) -> tuple[str, ...]:
    """The columns of a file that measures ``further`` ones too, in the order in which they are written.

    Raises:
        ValueError: one of them is not declared.
    """
    asked = set(further) - set(BASE_COLUMNS)
    if not asked <= set(MEASURES):
        raise ValueError(f"no measure is declared for {', '.join(sorted(asked - set(MEASURES)))}")
    return BASE_COLUMNS + tuple(column for column in MEASURES if column in asked)


def measured_by(command: str) -> tuple[str, ...]:
    """The columns that ``command`` adds to those of every file, where it needs no reference for them."""
    return tuple(
        m.column
        for m in MEASURES.values()
        if m.presence is Presence.WHERE_MEASURED and m.command == command and not m.reference
    )


def further_columns(config: "RunConfig") -> tuple[str, ...]:
    """What the rows of a run say beside the columns of every file."""
    diverging = tuple(m.column for m in MEASURES.values() if m.reference and config.reference)
    return (*(("stream",) if config.documents else ()), *diverging)


def drawn_measures() -> list[tuple[Measure, Drawing]]:
    """What can be drawn."""
    return [(measure, measure.drawing) for measure in MEASURES.values() if measure.drawing]


def features() -> dict[str, Measure]:
    """What can be drawn, by what ``--features`` calls it."""
    return {drawing.feature: measure for measure, drawing in drawn_measures()}


def features_of(command: str) -> list[str]:
    """What ``--features`` calls the measures of ``command``."""
    return [drawing.feature for measure, drawing in drawn_measures() if measure.command == command]
