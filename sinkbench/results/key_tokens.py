"""LongPPL: the perplexity of key tokens, which a long context makes much easier than a short one.

*What is Wrong with Perplexity for Long-context Language Modeling?* (https://arxiv.org/abs/2410.23771).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sinkbench.errors import UserError
from sinkbench.results.comparison import shared_rows
from sinkbench.results.documents import streams_of
from sinkbench.results.intervals import Interval
from sinkbench.results.resampling import group_sums
from sinkbench.results.run import Run

GAIN = 2.0  # nats that the long context must win
READ = 2.0  # nats under which the NLL with the long context must be


@dataclass(frozen=True)
class KeyTokens:
    """A run over the key tokens of two others.

    Attributes:
        name: of the run.
        tokens: rows that all runs share and that count.
        key: how many of them are key tokens.
        long_ppl: ``exp`` of the mean NLL of the key tokens; ``None`` where there is none.
        other_ppl: that of all other tokens; ``None`` where there is none.
        not_finite: key tokens left out because the run's NLL is no number.
    """

    name: str
    tokens: int
    key: int
    long_ppl: Interval | None
    other_ppl: Interval | None
    not_finite: int = 0


def key_tokens(long: np.ndarray, short: np.ndarray) -> np.ndarray:
    """Which tokens are key tokens, by their NLLs with a long and with a short context; bool, shape ``(n,)``.

    Where an NLL is no number, the token is none.
    """
    with np.errstate(invalid="ignore"):
        return (short - long > GAIN) & (long < READ)


def over_key_tokens(runs: Mapping[str, Run], long: str, short: str) -> list[KeyTokens]:
    """LongPPL of each run, over the rows that all have.

    Args:
        runs: by name.
        long: the run with the long context.
        short: the run with the short one.

    Raises:
        UserError: a name is not that of a run, both are the same, or the runs do not share rows.
    """
    for name in (long, short):
        if name not in runs:
            raise UserError(f"no run is called {name}: --key-tokens takes two of {', '.join(runs)}")
    if long == short:
        raise UserError(f"--key-tokens takes two runs, of a long and of a short context (got {long} twice)")
    frames = shared_rows({name: run.frame for name, run in runs.items()})
    nll = {name: frame["nll"].to_numpy(float) for name, frame in frames.items()}
    key, streams = key_tokens(nll[long], nll[short]), streams_of(frames[long])
    return [_of_run(name, values, key, streams) for name, values in nll.items()]


def _of_run(name: str, nll: np.ndarray, key: np.ndarray, streams: np.ndarray | None) -> KeyTokens:
    finite = np.isfinite(nll)
    own = streams if streams is None else streams[finite]
    sums = group_sums(nll[finite], key[finite].astype(int), 2, streams=own) if finite.any() else None
    other, mine = (sums.mean([0]), sums.mean([1])) if sums else (None, None)
    left_out = int((key & ~finite).sum())
    return KeyTokens(name, len(nll), int(key.sum()), mine and mine.exp(), other and other.exp(), left_out)
