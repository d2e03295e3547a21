"""Dense attention, as transformers does it: everything is kept."""

from sinkbench.strategies.policy import Keep


def transformers(window_size: int, attention_sink_size: int) -> Keep:
    """Keep every token; both sizes are without meaning here."""
    return Keep(sinks=0, recent=None)
