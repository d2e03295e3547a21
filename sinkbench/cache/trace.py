"""When every token was evicted, in every layer and head: collected while a stream is read.

Layers whose entries go by a score say what goes; of the others it follows from the plan.
"""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from sinkbench.results.traces import ABSENT, HELD, Lifetimes
from sinkbench.strategies import Plan
from sinkbench.strategies.policy import Policy

NOTES = 4096  # that wait on the device: each is a small tensor there, which takes up 512 bytes
ENTRIES = 2**18  # that wait there, of whole chunks
NEVER = -1


class Trace:
    """What a cache under ``plan`` evicts of one stream.

    Layers are numbered among those that the strategy governs. What is noted stays on its device for some thousands of
    notes, so that a step does not wait for them; it must not be changed afterwards. To note a step again is no harm.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._died: dict[int, np.ndarray] = {}  # by layer: the step after which each token went, (H, capacity)
        self._waiting: defaultdict[int, list[tuple[Tensor, Tensor | int]]] = defaultdict(list)
        self._notes = self._entries = 0

    def note(self, layer: int, step: int, tokens: Tensor) -> None:
        """After step ``step``, of each head the entry of one of ``tokens`` (int64, ``(H,)``) went."""
        self._wait(layer, tokens[:, None], step)

    def note_many(self, layer: int, tokens: Tensor, steps: Tensor) -> None:
        """Entries of ``tokens`` went after ``steps``, both int64, ``(H, n)``; those with a negative step did not."""
        self._wait(layer, tokens, steps)

    def _wait(self, layer: int, tokens: Tensor, steps: Tensor | int) -> None:
        self._waiting[layer].append((tokens, steps))
        self._notes += 1
        self._entries += tokens.numel()
        if self._notes >= NOTES or self._entries >= ENTRIES:
            self._settle()

    def _settle(self) -> None:
        """Take over what waits."""
        for layer, noted in self._waiting.items():
            tokens = torch.cat([tokens for tokens, _ in noted], 1).cpu().numpy()
            steps = np.empty_like(tokens)
            many = [step for _, step in noted if isinstance(step, Tensor)]
            chunks = torch.cat(many, 1).cpu().numpy() if many else steps[:, :0]
            place = taken = 0
            for of_one, step in noted:
                size = of_one.shape[1]
                if isinstance(step, Tensor):
                    steps[:, place : place + size] = chunks[:, taken : taken + size]
                    taken += size
                else:
                    steps[:, place] = step
                place += size
            self._enter(layer, tokens, steps)
        self._waiting.clear()
        self._notes = self._entries = 0

    def _enter(self, layer: int, tokens: np.ndarray, steps: np.ndarray) -> None:
        heads, went = np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape), steps >= 0
        died = self._of(layer, len(tokens), int(tokens.max(initial=-1)) + 1)
        died[heads[went], tokens[went]] = steps[went]

    def _of(self, layer: int, heads: int, length: int) -> np.ndarray:
        """What is known of a layer, with room for ``length`` tokens."""
        known = self._died.setdefault(layer, np.empty((heads, 0), np.int32))
        if known.shape[1] < length:
            more = np.full((heads, max(length, 2 * known.shape[1]) - known.shape[1]), NEVER, np.int32)
            self._died[layer] = known = np.concatenate((known, more), 1)
        return known

    def lifetimes(self, strategy: str, fed: int) -> Lifetimes:
        """What was kept of the first ``fed`` tokens, once these have been fed; ``strategy`` is the name of the plan's.

        What was noted beyond them is left out, so that a stream may have gone further.
        """
        self._settle()
        governed = [(i, layer) for i, layer in enumerate(self.plan.layers) if layer is not None and not layer.own]
        most = max((layer.sizes.kv_heads for _, layer in governed), default=0)
        by_score = any(layer.by_score for _, layer in governed)
        alike = {layer.policy for _, layer in governed}
        sizes = {layer.sizes.kv_heads for _, layer in governed}
        if not by_score and len(alike) == len(sizes) == 1:  # the same for all: no need of room for each
            found = np.broadcast_to(by_position(alike.pop(), fed), (len(governed), most, fed))
        else:
            found = np.full((len(governed), most, fed), ABSENT, np.int32)
            for number, (_, layer) in enumerate(governed):
                of_layer = self._scored(number, fed) if layer.by_score else by_position(layer.policy, fed)
                found[number, : layer.sizes.kv_heads] = of_layer
        windows = np.array([layer.policy.window or 0 for _, layer in governed], np.int64)
        return Lifetimes(strategy, np.array([i for i, _ in governed], np.int32), windows, found)

    def _scored(self, layer: int, fed: int) -> np.ndarray:
        """Lifetimes in a layer that said what went, ``(H, fed)``, or ``(1, fed)`` where it said nothing."""
        died = self._died.get(layer, np.empty((1, 0), np.int32))[:, :fed]
        born = np.arange(died.shape[1], dtype=np.int32)
        found = np.full((len(died), fed), HELD, np.int32)
        found[:, : died.shape[1]] = np.where((died >= 0) & (died < fed), died - born + 1, HELD)
        return found


def by_position(policy: Policy, fed: int) -> np.ndarray:
    """Lifetimes of the first ``fed`` tokens where position alone decides what goes, int32, ``(fed,)``."""
    born = np.arange(fed, dtype=np.int64)
    oldest = policy.oldest(born + 1)  # of what is held behind the sinks, after so many tokens
    gone = np.searchsorted(oldest, born, side="right") + 1  # tokens fed when each was gone
    return np.where((born < policy.sinks) | (gone > fed), HELD, gone - born).astype(np.int32)
