"""What a step begins and ends with, as one launch each: the rotations of its query, and the loss of its logits."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.kernels.ahead import launch
from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last
from sinkbench.attention.kernels.softmax import joined
from sinkbench.engines.turns import Turns

BLOCK = 4096  # logits a program


@triton.jit
def _set_turns(
    token, position, windows, blocks, frequencies, signs, cos, sin, dim, WIDTH: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    begin_next(OVERLAP)
    way = tl.program_id(0)
    d = tl.arange(0, WIDTH)
    inside = d < dim
    window, block = tl.load(windows + way), tl.load(blocks + way)
    frequency = tl.load(frequencies + d, mask=inside, other=0.0)
    sign = tl.load(signs + d, mask=inside, other=0.0)
    wait_for_last(OVERLAP)
    t = tl.load(token)
    over = tl.maximum(t - window, 0)
    dropped = tl.where(window < 0, 0, (over + block - 1) // block * block)
    angle = (t - dropped - tl.load(position)).to(tl.float64) * frequency
    at = way * dim + d
    tl.store(cos + at, tl.cos(angle).to(cos.dtype.element_ty), mask=inside)
    tl.store(sin + at, (tl.sin(angle) * sign).to(sin.dtype.element_ty), mask=inside)


class Ways:
    """:meth:`Turns.set`, in one launch."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        device = turns.frequencies.device
        numbers = [(-1, 1) if way is None or way.window is None else (way.window, way.block) for way in turns.ways]
        self.windows, self.blocks = torch.tensor(numbers, device=device).T.contiguous()

    def set(self, token: Tensor, position: Tensor) -> None:
        turns, rotation = self.turns, self.turns.rotation
        dim = rotation.cos.shape[1]
        launch(
            _set_turns,
            (len(turns.ways),),
            *(token, position, self.windows, self.blocks, turns.frequencies, turns.signs, rotation.cos, rotation.sin),
            *(dim,),
            **{"WIDTH": triton.next_power_of_2(dim), "num_warps": 1, **overlapping(token)},
        )


@triton.jit
def _end(
    logits, tokens, counter, position, nll, tops, sums, arrivals, count, splits,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin_next(OVERLAP)
    split = tl.program_id(0)
    at = split * BLOCK + tl.arange(0, BLOCK)
    wait_for_last(OVERLAP)
    x = tl.load(logits + at, mask=at < count, other=float("-inf")).to(tl.float32)
    top, share = joined(x, 1.0)
    tl.store(tops + split, top)
    tl.store(sums + split, share)
    # the last program to come this far puts all results together, and moves on to the next token
    tl.debug_barrier()
    if tl.atomic_add(arrivals, 1, sem="acq_rel") == splits - 1:
        tl.store(arrivals, 0)
        each = tl.arange(0, SPLITS)
        some = each < splits
        highs = tl.load(tops + each, mask=some, other=float("-inf"), volatile=True)
        highest, total = joined(highs, tl.load(sums + each, mask=some, other=0.0, volatile=True))
        t = tl.load(counter)
        label = tl.load(tokens + t + 1)
        tl.store(nll, tl.log(total) + highest - tl.load(logits + label).to(tl.float32))
        tl.store(counter, t + 1)
        tl.store(position, tl.load(position) + 1)


@dataclass(frozen=True)
class End:
    """The loss of a step, and the way to the next: in device memory, but for the loss.

    Attributes:
        tokens: int64, all of the stream; ``counter`` and ``position``, int64, ``(1,)``, are moved on by one.
        nll: float32, a number: where the loss of the token behind that at ``counter`` goes; pinned memory of the host,
            where that is what shall read it.
        arrivals: int32, ``(1,)``, zero between two steps.
    """

    tokens: Tensor
    counter: Tensor
    position: Tensor
    nll: Tensor
    arrivals: Tensor

    def __call__(self, logits: Tensor) -> None:
        """``logits``, ``(vocabulary,)``, contiguous."""
        splits = triton.cdiv(len(logits), BLOCK)
        tops, sums = (torch.empty(splits, device=logits.device) for _ in range(2))
        launch(
            _end,
            (splits,),
            *(logits, self.tokens, self.counter, self.position, self.nll, tops, sums, self.arrivals),
            *(len(logits), splits),
            **{"BLOCK": BLOCK, "SPLITS": triton.next_power_of_2(splits), "num_warps": 8, **overlapping(logits)},
        )
