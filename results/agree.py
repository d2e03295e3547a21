"""Whether two folders of results agree: runs of one name, over the rows that both have.

    python results/agree.py ONE OTHER

Prints of each corpus how many runs both have, how many of these have one key (the same run, by all that decides its
numbers), and the largest relative difference of their perplexities over the rows that both have.
"""

import sys
from pathlib import Path

import numpy as np

import sinkbench
from sinkbench.results.run import Run


def rows_of(run: Run) -> dict[tuple[int, int], float]:
    """NLLs by stream and place in it."""
    frame = run.frame
    places = zip(frame["stream"].fillna(0), frame["input_length"], strict=True)
    return dict(zip(places, frame["nll"], strict=True))


def apart(one: Run, other: Run) -> tuple[float, int]:
    """The relative difference of two perplexities over the rows that both have, and how many these are."""
    a, b = rows_of(one), rows_of(other)
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return 0.0, 0
    return float(abs(np.expm1(np.mean([a[place] - b[place] for place in shared])))), len(shared)


def main(one: Path, other: Path) -> None:
    """A line a corpus."""
    for folder in sorted(path for path in one.iterdir() if (other / path.name).is_dir()):
        ours, theirs = dict(sinkbench.read(folder)), dict(sinkbench.read(other / folder.name))
        both = sorted(ours.keys() & theirs.keys())
        keys = sum(ours[name].record["key"] == theirs[name].record["key"] for name in both)
        found = {name: apart(ours[name], theirs[name]) for name in both}
        worst = max(both, key=lambda name: found[name][0])
        rows = {count for _, count in found.values()}
        print(
            f"{folder.name}: {len(both)} runs, {keys} with one key; over {min(rows):,} to {max(rows):,} rows of each "
            f"perplexities differ by at most {found[worst][0]:.1e} ({worst})"
        )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
