"""Sliding window with re-computation: the baseline of StreamingLLM (arXiv 2309.17453, figure 1c)."""

from sinkbench.strategies.policy import Keep


def recompute(window_size: int, attention_sink_size: int) -> Keep:
    """Read the last ``window_size`` tokens afresh for every token; nothing is carried."""
    return Keep(sinks=0, recent=window_size, fresh=True)
