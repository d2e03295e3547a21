"""What a run is asked for, and what came of it."""

from dataclasses import dataclass, field
from pathlib import Path

from sinkbench.models import ModelSource
from sinkbench.streams import Source

FINISHED, ENDED, OUT_OF_MEMORY = "finished", "dataset ended", "out of memory"


@dataclass(frozen=True)
class RunOptions:
    """Everything that decides a run; the fields are the options of ``sinkbench run``.

    ``name`` is what its files are called; by default as the experiment is.
    """

    experiment: str = "attention_sinks"
    model: ModelSource = field(default_factory=lambda: ModelSource("smollm2-135m"))
    source: Source = field(default_factory=lambda: Source("kjv"))
    num_tokens: int = 8192
    window_size: int = 1024
    attention_sink_size: int = 4
    engine: str = "stepwise"
    chunk_size: int | None = None
    cuda_graphs: bool = True
    output_dir: Path = Path("results")
    overwrite: bool = False
    resume: bool = False
    name: str | None = None

    @property
    def csv(self) -> Path:
        """Where the rows go; the record lies beside it, with the suffix ``.json``."""
        return self.output_dir / f"{self.name or self.experiment}.csv"


@dataclass
class RunResult:
    """What happened."""

    experiment: str
    csv: Path
    rows: int = 0
    overall_ppl: float = float("nan")
    exit_reason: str = "running"
    seconds: float = 0.0
    latency: float | None = None  # median seconds a step
    peak_vram: float | None = None  # GiB
    kv_cache_bytes: int = 0
    untimed: int = 0  # rows of sessions that were killed, which are not in ``seconds``

    @property
    def tokens_per_second(self) -> float:
        return (self.rows - self.untimed) / self.seconds if self.seconds else 0.0

    @property
    def interrupted(self) -> bool:
        return self.exit_reason.startswith("interrupted")
