"""Token by token, as a streaming deployment runs: one forward of the unmodified model a token."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sinkbench.engines.forward import feed
from sinkbench.engines.prefill import prefilled
from sinkbench.engines.step import Steps, synchronize, vram_allocated
from sinkbench.positions.detection import check_reach
from sinkbench.positions.exact import exact_angles
from sinkbench.positions.families import lasting
from sinkbench.strategies import Keep


@torch.inference_mode()
def stepwise(model: PreTrainedModel, keep: Keep, tokens: Tensor, start: int = 0) -> Iterator[Steps]:
    """Feed ``tokens`` (int64, shape ``(n,)``) one at a time; yield the NLL of each next one, ``n - 1`` steps.

    The latency of a step spans the forward and the loss, from token to number. With ``start``, that many steps are
    made up for in one go and not yielded.
    """
    if keep.window is None:
        check_reach(model, len(tokens) - 1)
    cache = None if keep.fresh else prefilled(model, keep, tokens[:start])
    tokens = tokens.to(model.device)
    longest = len(tokens) if keep.window is None else keep.window if cache is None else cache.reach(1)
    with lasting(model, longest), exact_angles(model):
        for t in range(start, len(tokens) - 1):
            synchronize()
            begin = time.perf_counter()
            if cache is None:
                assert keep.recent is not None
                window = tokens[max(0, t + 1 - keep.recent) : t + 1]
                logits = model(input_ids=window[None], use_cache=False, logits_to_keep=1).logits[0, -1]
            else:
                logits = feed(model, cache, tokens[t : t + 1]).logits[0, -1]
            nll = cross_entropy(logits.float(), tokens[t + 1].to(logits.device)).item()
            synchronize()
            latency = time.perf_counter() - begin
            yield Steps(t + 1, [nll], latency, vram_allocated(), [cache.nbytes if cache else 0])
