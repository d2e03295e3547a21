"""What a chunk's attention takes in float32, by our kernel and by plain torch, and how far each is from float64.

    python results/h200/float32.py

The heads of SmolLM2-135M (9 of 64 features on 3 of keys and values), 8,192 queries; of a band, and of all 65,536 keys.
"""

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch

from sinkbench.attention.bands import band
from sinkbench.attention.kernels import band as kernel
from sinkbench.attention.scores import Scores
from sinkbench.strategies import LayerPlan, LayerSizes, Policy
from sinkbench.strategies.formats import Format

QUERIES, KEYS = 8192, 65_536
HEADS, KV_HEADS, DIM = 9, 3, 64
ROWS = slice(QUERIES - 128, QUERIES)  # that are held against float64


def main() -> None:
    """Print a line a band."""
    torch.manual_seed(0)
    for recent in (508, 2044, None):
        held = KEYS if recent is None else QUERIES + recent
        policy = Policy(None) if recent is None else Policy(recent + 4, 4)
        plan = LayerPlan(policy, "cache", Format(), LayerSizes("full", KV_HEADS, DIM))
        query = 2 * torch.randn(1, HEADS, QUERIES, DIM, device="cuda")
        key, value = torch.randn(2, 1, KV_HEADS, held, DIM, device="cuda")
        first = held - QUERIES if recent is None else KEYS
        begin, scores = first + QUERIES - held, Scores(DIM**-0.5)
        exact = query[:, :, ROWS].double(), key.double(), value.double()
        wanted = band(*exact, first + ROWS.start, begin, plan, scores)[0]

        attend = partial(band, query, key, value, first, begin, plan, scores)
        with patch.object(kernel, "takes", lambda *of: False):
            plain, errors = milliseconds(attend), [(attend()[0][:, :, ROWS] - wanted).abs().max().item()]
        ours = milliseconds(attend)
        errors.append((attend()[0][:, :, ROWS] - wanted).abs().max().item())
        print(
            f"{'all' if recent is None else recent} keys: plain torch {plain:.2f} ms, error {errors[0]:.1e}; "
            f"our kernel {ours:.2f} ms, error {errors[1]:.1e}"
        )


def milliseconds(attend: Callable[[], object], times: int = 5) -> float:
    """The mean of so many calls behind one."""
    attend()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        attend()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


if __name__ == "__main__":
    main()
