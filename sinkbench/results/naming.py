"""Names for runs from several folders: as short as tells them apart."""

from collections.abc import Sequence
from pathlib import Path


def distinguishing_names(places: Sequence[Path]) -> list[str]:
    """A name for each path, no two alike: what all share is left out, then what one does not need.

    Runs of different names go by these; runs of one name in several folders by what differs of the folders; and
    where both differ, by as many of the innermost folders as it takes.
    """
    if len(places) < 2:
        return [place.name for place in places]
    parts = [place.parts for place in places]
    if len(set(map(len, parts))) == 1:  # then what all share within is left out too
        differing = [i for i in range(len(parts[0])) if len({part[i] for part in parts}) > 1]
        kept = [tuple(part[i] for i in differing) or part[-1:] for part in parts]
    else:
        shortest = min(map(len, parts))
        same = [len({part[-1 - i] for part in parts}) == 1 for i in range(shortest - 1)]
        tail = next((i for i, alike in enumerate(same) if not alike), len(same))
        kept = [part[: len(part) - tail] for part in parts]
    return [_shortest_of(kept, number) for number in range(len(kept))]


def _shortest_of(kept: Sequence[tuple[str, ...]], number: int) -> str:
    """The fewest last parts of one path that are not the last parts of another; all where there are none."""
    mine = kept[number]
    others = [part for place, part in enumerate(kept) if place != number]
    count = next((n for n in range(1, len(mine) + 1) if all(part[-n:] != mine[-n:] for part in others)), len(mine))
    return str(Path(*mine[-count:]))
