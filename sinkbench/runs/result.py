"""What a run is asked for, and what came of it."""

from dataclasses import dataclass, field
from pathlib import Path

from sinkbench.results.record import ENDED, FINISHED, OUT_OF_MEMORY, RUNNING

__all__ = ["ENDED", "FINISHED", "OUT_OF_MEMORY", "RunResult"]


@dataclass
class RunResult:
    """What happened."""

    experiment: str
    csv: Path
    rows: int = 0
    expected: int | None = None  # rows at the end, where that is known
    stream: int = 0  # the document that the last row is of
    overall_ppl: float = float("nan")
    exit_reason: str = RUNNING
    seconds: float = 0.0
    latency: float | None = None  # median seconds a step
    peak_vram: float | None = None  # GiB
    kv_cache_bytes: int = 0
    not_finite: int = 0  # rows whose NLL is no number
    untimed: int = 0  # rows of sessions that were killed, which are not in ``seconds``
    notes: list[str] = field(default_factory=list)  # lines about what did not end this session

    @property
    def tokens_per_second(self) -> float:
        return (self.rows - self.untimed) / self.seconds if self.seconds else 0.0

    @property
    def interrupted(self) -> bool:
        return self.exit_reason.startswith("interrupted")
