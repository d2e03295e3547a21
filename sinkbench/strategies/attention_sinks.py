"""Attention sinks: the first tokens and the most recent ones (StreamingLLM, arXiv 2309.17453, section 3.2)."""

from sinkbench.strategies.policy import Keep


def attention_sinks(window_size: int, attention_sink_size: int) -> Keep:
    """Keep the first ``attention_sink_size`` tokens and the last ``window_size - attention_sink_size``."""
    return Keep(sinks=attention_sink_size, recent=window_size - attention_sink_size)
