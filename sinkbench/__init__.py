"""sinkbench: what does a language model lose, and what does it cost, when its KV cache is cut?

``from sinkbench import AutoModelForCausalLM`` loads models that keep attention sinks (:mod:`sinkbench.api`);
``sinkbench.run``, ``sweep``, ``read``, ``compare`` and ``plot`` are the command line as functions
(:mod:`sinkbench.library`).
"""

TYPE_CHECKING = False  # as of ``typing``, whose import is half of the time in which a signal finds no handler yet
if TYPE_CHECKING:
    from typing import Any

    from sinkbench.api.classes import SinkCache as SinkCache
    from sinkbench.api.classes import attention_sinks as attention_sinks
    from sinkbench.errors import UserError as UserError
    from sinkbench.library.comparing import compare as compare
    from sinkbench.library.plotting import plot as plot
    from sinkbench.library.reading import read as read
    from sinkbench.library.running import run as run
    from sinkbench.library.sweeping import sweep as sweep

__version__ = "0.2.0"

FUNCTIONS = {
    "run": "library.running",
    "sweep": "library.sweeping",
    "read": "library.reading",
    "compare": "library.comparing",
    "plot": "library.plotting",
    "UserError": "errors",
}
CLASSES = ("SinkCache", "attention_sinks", "AutoTokenizer", "AttentionSinkKVCache")


def __getattr__(name: str) -> "Any":
    """What is asked for, imported then: transformers takes seconds, ``sinkbench --help`` should not."""
    if name in FUNCTIONS:
        from importlib import import_module

        value = getattr(import_module(f"sinkbench.{FUNCTIONS[name]}"), name)
    elif name in CLASSES or name.endswith(("ForCausalLM", "Model", "ForQuestionAnswering", "Classification")):
        from sinkbench.api import classes as api

        value = getattr(api, name) if hasattr(api, name) else api.loader(name)
    else:
        raise AttributeError(f"module 'sinkbench' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *FUNCTIONS, *CLASSES})
