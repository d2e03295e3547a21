"""What the tests of the drop-in classes share."""

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sinkbench.engines.stepwise import Stepwise

SINKS, RECENT = 4, 12
SIZES = {"attention_sink_size": SINKS, "attention_sink_window_size": RECENT}
GREEDY = {"do_sample": False, "eos_token_id": None}
METHODS = (
    "forward",
    "generate",
    "prepare_inputs_for_generation",
    "init_continuous_batching",
    "set_attn_implementation",
)

every_family = pytest.mark.parametrize("family", tiny.STREAMABLE)
# of each way to read a long prompt: in chunks, by an adapter, with ALiBi, mixed layers, token by token
some_families = pytest.mark.parametrize("family", ["llama", "gptj", "mpt", "gemma3", "qwen3_next", "dynamic"])


def padded(*rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The rows with padding on their left."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat((row.new_zeros(width - len(row)), row)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


def benchmark(model: PreTrainedModel, stream: torch.Tensor, sinks: int = SINKS, recent: int = RECENT) -> torch.Tensor:
    """NLLs of the stepwise engine."""
    plan = tiny.plan(model, "attention_sinks", sinks + recent, sinks)
    return torch.tensor([step.nll[0] for step in Stepwise(model).run(plan, stream)])


def nlls(model: PreTrainedModel, stream: torch.Tensor, **kwargs) -> torch.Tensor:
    """NLLs of one forward of the model as it is."""
    logits = model(stream[None, :-1], **kwargs).logits[0]
    return cross_entropy(logits, stream[1:], reduction="none")
