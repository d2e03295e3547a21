"""Which run the others are compared to, and whether it can bear that."""

from collections.abc import Sequence
from dataclasses import dataclass

from sinkbench.errors import UserError
from sinkbench.results.comparison import Comparison, onset_text
from sinkbench.results.run import DENSE, Run


@dataclass(frozen=True)
class Baseline:
    """The run that others are compared to.

    Attributes:
        run: ``None`` where there is none.
        why: one line that says which and why, or what to do.
    """

    run: Run | None
    why: str

    @property
    def name(self) -> str | None:
        """The name of the run."""
        return self.run.name if self.run else None


def choose_baseline(runs: Sequence[Run], asked: str | None = None) -> Baseline:
    """The run called ``asked``, or the only one of dense attention.

    Raises:
        UserError: no run is called so.
    """
    if asked is not None:
        run = next((run for run in runs if run.name == asked), None)
        if run is None:
            raise UserError(
                f"no run is called {asked}: --baseline can be {', '.join(candidate.name for candidate in runs)}"
            )
        return Baseline(run, f"baseline: {asked}, as --baseline says")
    dense = [run for run in runs if run.strategy == DENSE]
    if len(dense) == 1:
        return Baseline(dense[0], f"baseline: {dense[0].name}, the only run of dense attention")
    found = f"{len(dense)} runs are" if dense else "no run is"
    names = ", ".join(run.name for run in dense or runs)
    return Baseline(None, f"no baseline: {found} of dense attention; --baseline NAME chooses one ({names})")


def sound_length(run: Run) -> int | None:
    """The tokens up to which dense attention is a baseline: those its model was trained for, where that is known."""
    trained = run.number("model", "context_length") if run.strategy == DENSE else None
    return int(trained) if trained and trained >= 1 else None


def unfit_baseline(run: Run, compared: Comparison) -> str | None:
    """What to say where a baseline is read beyond what its model was trained for, or fails; else ``None``.

    Args:
        run: the baseline.
        compared: the baseline among the runs that are compared to it.
    """
    dense = run.strategy == DENSE
    trained = run.number("model", "context_length")
    if dense and trained and compared.longest > trained:
        return (
            f"dense attention is read beyond the {trained:,.0f} tokens the model was trained for: from there on it is "
            "no baseline"
        )
    if not compared.fails:
        return None
    where = f" from token {onset_text(compared.breaks, compared.spacing)} on" if compared.breaks is not None else ""
    beyond = ", perhaps beyond what the model was trained for" if dense else ""
    return f"{'dense attention' if dense else run.name} fails{where}{beyond}: from there on it is no baseline"
