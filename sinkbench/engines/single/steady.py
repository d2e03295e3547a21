"""What follows from a model's buffers and the position alone: computed once a step, whichever layers ask for it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sinkbench.engines.single.pending import memory

LARGEST = 2**24  # numbers of a buffer that is compared with others


class Steady:
    """Answers of a step that follow from what no layer changes.

    Attributes:
        twins: of buffers that hold the same in every layer, the memory of each and that of the first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers = [b for b in model.buffers() if 0 < b.numel() <= LARGEST]
        self.twins: dict[int, int] = {}
        seen: dict[Any, list[Tensor]] = {}
        for buffer in self.buffers:
            alike = seen.setdefault((buffer.shape, buffer.dtype, buffer.stride(), buffer.storage_offset()), [])
            first = next((b for b in alike if torch.equal(b, buffer)), None)
            alike.extend([buffer] if first is None else [])
            self.twins[memory(buffer)] = memory(buffer if first is None else first)
        self.answers: dict[Any, Any] = {}
        self.known: dict[int, int] = {}

    def begin(self, *also: Tensor) -> None:
        """A step begins, in which ``also`` does not change either."""
        self.answers = {}
        self.known = self.twins | {memory(x): memory(x) for x in also}

    def changes(self, *tensors: Tensor) -> None:
        """These are about to be changed."""
        if any(memory(x) in self.known for x in tensors):
            self.begin()

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``func`` of these arguments, asked once a step where they are steady."""
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        random = torch.Tag.nondeterministic_seeded in func.tags
        if not tensors or random or any(memory(x) not in self.known for x in tensors):
            return func(*args, **kwargs)
        key = func, len(args), tuple(kwargs), tuple(self._of(x) for x in leaves)
        if key not in self.answers:
            out = func(*args, **kwargs)
            self.answers[key] = out, tensors  # which keeps their memory from being used again
            self.known |= {memory(x): memory(x) for x in tree_leaves(out) if isinstance(x, Tensor)}
        return self.answers[key][0]

    def _of(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return type(x), str(x)
        return self.known[memory(x)], x.storage_offset(), x.shape, x.stride(), x.dtype
