"""What a group of runs loses: by recall distance, and beside what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sinkbench.errors import UserError
from sinkbench.results.frontier import Budgeted, budgets
from sinkbench.results.recall import RunRecall, drawn_octaves, recall_by_distance
from sinkbench.results.report.comparing import GroupComparison
from sinkbench.results.run import Run


@dataclass(frozen=True)
class GroupLosses:
    """What runs lose to a baseline.

    Attributes:
        baseline: ``None`` where there is none.
        recall: by recall distance; none where it cannot be told.
        budgets: by cost; none where that is not known.
    """

    baseline: Run | None = None
    recall: list[RunRecall] = field(default_factory=list)
    budgets: list[Budgeted] = field(default_factory=list)


def group_losses(runs: Sequence[Run], shared: GroupComparison | None) -> GroupLosses:
    """What those of ``runs`` lose that are compared in ``shared``; nothing where their files do not say it."""
    if shared is None or shared.baseline.run is None:
        return GroupLosses()
    names = {compared.name for compared in shared.compared}
    baseline, known = shared.baseline.run, {run.name: run for run in runs if run.name in names}
    try:
        recall = [run for run in recall_by_distance(known, baseline) if drawn_octaves(run)]
    except UserError:  # files of other programs, thinned ones
        recall = []
    costs = [one for one in budgets(known, baseline) if one.held is not None or one.latency is not None]
    return GroupLosses(baseline, recall, costs if len(costs) > 1 else [])
