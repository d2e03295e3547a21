"""Many tokens a forward: a stream read in chunks, between which the cache carries what the plan keeps."""

from collections.abc import Iterator

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.attention.adapters import mask_argument, replaceable
from sinkbench.attention.redirection import attending
from sinkbench.cache.stream import StreamCache
from sinkbench.engines.head import backbone
from sinkbench.errors import UserError
from sinkbench.positions.bare import device_of
from sinkbench.positions.detection import read_positions
from sinkbench.positions.exact import exact_angles
from sinkbench.positions.families import lasting, takes_positions
from sinkbench.positions.reach import shortest_limit
from sinkbench.signals import check
from sinkbench.strategies import Plan

CHUNKS = (16384, 8192, 4096, 2048, 1024, 512, 256, 128)
STEPWISE = "use --engine stepwise"


def refuses_plan(plan: Plan) -> str | None:
    """Why ``plan`` cannot be read in chunks exactly, whatever the model; ``None`` where it can."""
    if plan.by_score and plan.positions == "cache":
        return f"what an entry scores depends on its rank among those that are left: {STEPWISE}, or --positions text"
    if plan.stateful:
        return f"some layers carry a state from token to token: {STEPWISE}"
    return None


def refuses_chunks(model: PreTrainedModel, cache: StreamCache, length: int) -> str | None:
    """Why ``length`` tokens cannot be read in chunks exactly; ``None`` where they can."""
    name = type(model).__name__
    reason = refuses_plan(cache.plan)
    if reason is not None:
        return f"{name}: {reason}"
    if not replaceable(model):
        return f"the attention of {name} cannot be fed many tokens at once under a strategy: {STEPWISE}"
    try:
        backbone(model)
    except UserError as error:
        return str(error)
    if not cache.reach.lasts(length):
        limit = cache.reach.limit
    elif cache.plan.dense and cache.reach.limit is None:
        limit = shortest_limit(read_positions(model))  # dense attention had not read them
        limit = None if limit is None or length <= limit else limit
    else:
        limit = None
    if limit is None:
        return None
    return f"{name} changes its rotary frequencies beyond {limit} tokens, token by token: {STEPWISE}, or stay below"


def hidden_states(
    model: PreTrainedModel, cache: StreamCache, tokens: Tensor, chunk: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Feed ``tokens`` through ``cache``, ``chunk`` at a time: where each chunk begins, its states ``(n, width)``.

    Raises:
        UserError: the model cannot be read in chunks under the plan of ``cache``.
    """
    reason = refuses_chunks(model, cache, len(tokens) + 1)
    if reason is not None:
        raise UserError(reason)
    chunk = cache.reach.chunk(chunk or chunk_for(model, cache.plan))
    longest = min(len(tokens) + 1, cache.reach.end(chunk) + chunk)
    with lasting(model, longest), exact_angles(model), attending(model, cache):
        for begin in range(0, len(tokens), chunk):
            check()
            yield begin, read(model, cache, tokens[begin : begin + chunk])


def read(model: PreTrainedModel, cache: StreamCache, tokens: Tensor) -> Tensor:
    """Last hidden states ``(n, width)`` of ``tokens``, fed at once; to be called within ``attending``."""
    kwargs = mask_argument(model)
    positions = cache.advance(len(tokens))
    if takes_positions(model):
        kwargs["position_ids"] = positions
    body = backbone(model)
    return body(input_ids=tokens[None], past_key_values=cache, use_cache=True, **kwargs).last_hidden_state[0]


def chunk_for(model: PreTrainedModel, plan: Plan | None = None) -> int:
    """Tokens a forward that leave three quarters of the free memory alone."""
    config = model.config.get_text_config(decoder=True)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    on_gpu = device_of(model).type == "cuda"
    most = most_at_once(plan, on_gpu)
    a_token = bytes_at_once(
        plan, config.hidden_size, inner, config.num_attention_heads, torch.finfo(model.dtype).bits // 8, most
    )
    free = torch.cuda.mem_get_info(device_of(model))[0] if on_gpu else psutil.virtual_memory().available
    return fitting(a_token, free, most)


def most_at_once(plan: Plan | None, on_gpu: bool) -> int:
    """Tokens a forward, at most: fewer where entries are scored, as every query has a row of scores."""
    if plan is not None and plan.by_score:
        return 1024 if on_gpu else 256
    return 16384 if on_gpu else 2048


def bytes_at_once(plan: Plan | None, hidden: int, inner: int, heads: int, itemsize: int, most: int) -> int:
    """Bytes that a token of a forward takes: hidden states, and where entries are scored, its rows of scores."""
    states = itemsize * (12 * hidden + 4 * inner)
    return states + (3 * 4 * heads * ((plan.window or 0) + most) if plan is not None and plan.by_score else 0)


def fitting(a_token: int, free: int, most: int) -> int:
    """The largest chunk of tokens, ``most`` at most, that leaves three quarters of ``free`` bytes alone."""
    fits = [chunk for chunk in CHUNKS if chunk <= most and chunk * a_token <= free / 4]
    return fits[0] if fits else CHUNKS[-1]
