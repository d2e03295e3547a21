"""Window attention: the most recent tokens only (StreamingLLM, arXiv 2309.17453, figure 1b)."""

from sinkbench.strategies.policy import Keep


def windowed(window_size: int, attention_sink_size: int) -> Keep:
    """Keep the last ``window_size`` tokens."""
    return Keep(sinks=0, recent=window_size)
