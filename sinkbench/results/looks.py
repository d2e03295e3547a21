"""How a run looks in figures and reports: no two look alike, however many strategies there are, and runs of each.

A colour is a strategy's. There are eight that colour-blind people can distinguish; strategies beyond these,
and further runs of one strategy, share a colour and carry marks. Where dashes mean nothing else, they differ too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sinkbench.results.run import FIRST

# Okabe and Ito's colours, https://jfly.uni-koeln.de/color/, with grey for yellow, which is pale on white.
OWN = dict(zip(FIRST, ("#D55E00", "#009E73", "#0072B2", "#CC79A7"), strict=True))  # in every figure with them
FREE = ("#E69F00", "#56B4E9", "#000000", "#7F7F7F")
ALL = (*OWN.values(), *FREE)

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")  # plotly's
# matplotlib's and plotly's names of a shape, and the shape itself, filled and hollow
SHAPES = (
    ("o", "circle", "●○"),
    ("s", "square", "■□"),
    ("^", "triangle-up", "▲△"),
    ("D", "diamond", "◆◇"),
    ("v", "triangle-down", "▼▽"),
    ("*", "star", "★☆"),
    (">", "triangle-right", "▶▷"),
    ("p", "pentagon", "⬟⬠"),
)


@dataclass(frozen=True)
class Look:
    """How one run is drawn.

    Attributes:
        colour: as ``#RRGGBB``.
        number: 0 for a plain line; others of the colour carry marks: shapes, hollow shapes, then the number itself.
    """

    colour: str
    number: int = 0

    @property
    def marker(self) -> str:
        """matplotlib's marker; empty for a plain line."""
        if not self.number:
            return ""
        return SHAPES[self._shape][0] if self._is_shape else f"${self.number}$"

    @property
    def symbol(self) -> str:
        """plotly's symbol, of which it has a fixed number; empty for a plain line."""
        outline = "-open" if (self.number - 1) // len(SHAPES) % 2 else ""
        return SHAPES[self._shape][1] + outline if self.number else ""

    @property
    def sign(self) -> str:
        """The mark as text; empty for a plain line."""
        if not self.number:
            return ""
        return SHAPES[self._shape][2][self.hollow] if self._is_shape else str(self.number)

    @property
    def hollow(self) -> bool:
        """Whether the mark is the outline of a shape."""
        return len(SHAPES) < self.number <= 2 * len(SHAPES)

    @property
    def dash(self) -> str:
        """plotly's dashes, for figures in which they mean nothing else."""
        return DASHES[self.number % len(DASHES)]

    @property
    def _shape(self) -> int:
        """Each colour begins with another one, so that the ninth strategy and those after it differ in both."""
        return (self.number - 1 + (ALL.index(self.colour) if self.colour in ALL else 0)) % len(SHAPES)

    @property
    def _is_shape(self) -> bool:
        return self.number <= 2 * len(SHAPES)


def looks_of(runs: Mapping[str, str], strategies: Iterable[str] = ()) -> dict[str, Look]:
    """A look for each run, no two of them alike.

    Args:
        runs: the strategy of each run by its name, in the order in which they are shown.
        strategies: further ones that are shown elsewhere on the same page, where they have colours too.
    """
    shown = {*runs.values(), *strategies}
    first = {strategy: Look(colour) for strategy, colour in OWN.items() if strategy in shown}
    free = (*FREE, *(colour for strategy, colour in OWN.items() if strategy not in shown))
    for place, strategy in enumerate(sorted(shown - set(OWN))):
        beyond = place - len(free)
        first[strategy] = Look(free[place]) if beyond < 0 else Look(ALL[beyond % len(ALL)], 1 + beyond // len(ALL))
    sharing = 1 + max((look.number for look in first.values()), default=0)  # strategies that may share a colour
    seen: dict[str, int] = {}
    found = {}
    for name, strategy in runs.items():
        before = seen.get(strategy, 0)
        seen[strategy] = before + 1
        found[name] = Look(first[strategy].colour, first[strategy].number + before * sharing)
    return found
