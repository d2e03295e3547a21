"""Which engine runs a stream: the first that does not refuse the plan."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from sinkbench.engines.base import Engine
from sinkbench.engines.captured import Captured
from sinkbench.engines.chunks import refuses_plan
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.recompute import Recompute
from sinkbench.engines.stepwise import Stepwise
from sinkbench.errors import UserError
from sinkbench.strategies import Plan


def choose_engine(
    model: PreTrainedModel,
    plan: Plan,
    engine: str,
    cuda_graphs: bool = True,
    chunk: int | None = None,
    note: Callable[[str], None] = lambda line: None,
    stage: Callable[[str], None] = lambda what: None,
    reference: Plan | None = None,
    until: int | None = None,
) -> Engine:
    """The engine for ``plan``.

    Args:
        engine: ``--engine``: ``stepwise`` or ``parallel``.
        cuda_graphs: whether steps may be captured.
        chunk: tokens a forward of the parallel engine; by default chosen from the free memory.
        note: is called with a line where an engine has to go another way than it would.
        stage: is called with what goes on before the first step.
        reference: the plan to diverge from; ``None`` for none.
        until: tokens of a stream that the reference reads; ``None`` for all.

    Raises:
        UserError: no such engine, or none of its kind can run the plan.
    """
    captured = [Captured(model, None, note, stage)] if cuda_graphs and engine == "stepwise" else []
    if reference is not None and any(candidate.refuses(plan) is None for candidate in captured):
        note("two caches are not captured as CUDA graphs: with --reference, steps take the plain way")
    kinds: dict[str, Sequence[Engine]] = {
        "stepwise": [
            *(captured if reference is None else []),
            Stepwise(model, reference, until),
            Recompute(model, reference=reference, until=until),
        ],
        "parallel": [
            Parallel(model, chunk, reference=reference, until=until),
            Recompute(model, batched=True, chunk=chunk, reference=reference, until=until),
        ],
    }
    if engine not in kinds:
        raise UserError(f"no engine {engine!r}: --engine is one of {', '.join(kinds)}")
    if engine == "parallel" and reference is not None and reference.context is None:
        reason = refuses_plan(reference)
        if reason is not None:
            raise UserError(f"the parallel engine cannot run the reference: {reason}")
    reasons = []
    for candidate in kinds[engine]:
        reason = candidate.refuses(plan)
        if reason is None:
            return candidate
        reasons.append(reason)
    raise UserError(f"the {engine} engine cannot run this: {reasons[0]}")
