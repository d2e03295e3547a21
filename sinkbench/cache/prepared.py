"""What a cache has to know of its model: found once for all caches of a plan, as every short forward makes one."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from sinkbench.cache.strip import compaction_interval
from sinkbench.models.sizes import copies_of
from sinkbench.positions.bare import device_of
from sinkbench.positions.detection import facts_of, read_positions
from sinkbench.positions.families import family_of
from sinkbench.positions.reach import Reach
from sinkbench.positions.rotary import Rope
from sinkbench.strategies import Plan


@dataclass(frozen=True)
class Prepared:
    """Facts of a model under a plan.

    Attributes:
        facts: on which the others depend.
        ropes: how the keys of each layer turn.
        device: where the model computes.
        itemsize: bytes of one of its numbers.
        copies: as of :func:`~sinkbench.models.sizes.copies_of`.
        reach: how far positions may go.
        needs_attention: whether the model's own attention would read the cache wrongly even token by token.
    """

    plan: Plan
    facts: tuple[Any, ...]
    ropes: Sequence[Rope | None]
    device: torch.device
    itemsize: int
    copies: int
    reach: Reach
    needs_attention: bool


_PREPARED: WeakKeyDictionary[PreTrainedModel, Prepared] = WeakKeyDictionary()


def prepared(model: PreTrainedModel, plan: Plan) -> Prepared:
    """The facts of ``model`` under ``plan``, found anew where either is another than at the last call.

    Raises:
        UserError: the model's positions cannot stream.
    """
    facts, known = facts_of(model), _PREPARED.get(model)
    if known is None or known.plan is not plan or known.facts != facts:
        known = _PREPARED[model] = _prepare(model, plan, copy.deepcopy(facts))
    return known


def _prepare(model: PreTrainedModel, plan: Plan, facts: tuple[Any, ...]) -> Prepared:
    bounded = any(layer.policy.window is not None for layer in plan.kept)
    # dense attention never moves a key, so any model will do
    ropes = read_positions(model) if bounded else [None] * len(plan.layers)
    kept = [rope for layer, rope in zip(plan.layers, ropes, strict=True) if layer is not None]
    spare = [compaction_interval(layer.policy) for layer in plan.kept if layer.policy.window is not None]
    return Prepared(
        plan,
        facts,
        ropes,
        device_of(model),
        model.dtype.itemsize,
        copies_of(model.config),
        Reach.of(plan, kept, max(spare, default=0)),
        _needs_attention(model, plan),
    )


def _needs_attention(model: PreTrainedModel, plan: Plan) -> bool:
    """Whether the model's own attention would read the cache wrongly even token by token.

    A score needs weights; one mask for all layers does not do where they hold different numbers of entries; and a model
    that adds terms by position adds those of consecutive positions.
    """
    uneven = len({layer.policy.window for layer in plan.governed}) > 1
    apart = family_of(model).alibi is not None and any(layer.gap for layer in plan.kept)
    return plan.by_score or uneven or apart
