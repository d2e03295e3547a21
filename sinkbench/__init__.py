"""sinkbench: what does a language model lose, and what does it cost, when its KV cache is cut?

``from sinkbench import AutoModelForCausalLM`` loads models that keep attention sinks (:mod:`sinkbench.api`).
"""

TYPE_CHECKING = False  # as of ``typing``, whose import is half of the time in which a signal finds no handler yet
if TYPE_CHECKING:
    from typing import Any

    from sinkbench.api.classes import SinkCache as SinkCache
    from sinkbench.api.classes import attention_sinks as attention_sinks

__version__ = "0.1.0"


def __getattr__(name: str) -> "Any":
    """The drop-in API, imported when it is asked for: transformers takes seconds, ``sinkbench --help`` should not."""
    own = ("SinkCache", "attention_sinks", "AutoTokenizer", "AttentionSinkKVCache")
    if name in own or name.endswith(("ForCausalLM", "Model", "ForQuestionAnswering", "Classification")):
        from sinkbench.api import classes as api

        value = getattr(api, name) if hasattr(api, name) else api.loader(name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sinkbench' has no attribute {name!r}")
