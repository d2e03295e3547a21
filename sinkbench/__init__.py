"""sinkbench: what does a language model lose, and what does it cost, when its KV cache is cut?"""

__version__ = "0.1.0"
