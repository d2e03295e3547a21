"""Many tokens a forward, with the NLLs of the stepwise engine.

The stream is read in chunks; between chunks the cache carries what the strategy keeps, so memory does not depend
on the length of the stream (for ``transformers`` it grows by the cache alone).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.attention.adapters import mask_argument
from sinkbench.attention.bands import attending
from sinkbench.cache.stream import StreamCache
from sinkbench.engines.head import backbone, nll_of
from sinkbench.engines.step import Steps, vram_allocated
from sinkbench.errors import UserError
from sinkbench.positions.detection import check_reach, read_positions
from sinkbench.positions.exact import exact_angles
from sinkbench.positions.families import lasting, takes_positions
from sinkbench.strategies import Keep

ROTATE = "apply_rotary_pos_emb"  # what transformers' models call their rotary function
COMPILE_FROM = 50_000  # tokens: shorter streams end before compilation pays
CHUNKS = (16384, 8192, 4096, 2048, 1024, 512, 256, 128)


@torch.inference_mode()
def parallel(
    model: PreTrainedModel,
    keep: Keep,
    tokens: Tensor,
    chunk: int | None = None,
    start: int = 0,
    compiled: bool | None = None,
) -> Iterator[Steps]:
    """Feed ``tokens`` (int64, shape ``(n,)``) in chunks; yield the NLLs of all next ones, ``n - 1`` in all.

    Args:
        chunk: tokens a forward; by default chosen from the free memory.
        start: predictions not to yield: the first is that of ``tokens[start + 1]``. Chunks lie as without it.
        compiled: whether parts of the model run compiled, on CUDA; by default where the stream is long enough.

    Raises:
        UserError: the model cannot be read in chunks under this strategy.
    """
    chunk = chunk or chunk_for(model)
    tokens = tokens.to(model.device)
    last = len(tokens) - 1
    if keep.fresh:
        yield from _fresh_windows(model, keep, tokens, chunk, start)
        return
    if keep.window is None:
        check_reach(model, last)
    cache = StreamCache(model, keep)
    with compiled_parts(model, last >= COMPILE_FROM if compiled is None else compiled):
        waiting: Pending | None = None
        for begin, hidden in hidden_states(model, cache, tokens[:last], chunk):
            first, end = max(begin, start), begin + len(hidden)
            if end <= start:
                continue
            nll = nll_of(model, hidden[first - begin :], tokens[first + 1 : end + 1])
            begun = Pending(first + 1, nll, cache.nbytes_after(first + 1, end))
            if waiting:  # the device is busy with the next chunk while this one is written down
                yield waiting.steps()
            waiting = begun
        if waiting:
            yield waiting.steps()


def hidden_states(
    model: PreTrainedModel, cache: StreamCache, tokens: Tensor, chunk: int
) -> Iterator[tuple[int, Tensor]]:
    """Feed ``tokens`` through ``cache``, ``chunk`` at a time: where each chunk begins, its states ``(n, width)``.

    Raises:
        UserError: the model cannot be read in chunks under the strategy of ``cache``.
    """
    window = cache.keep.window
    chunk = _fitting(model, cache, chunk, len(tokens) + 1)
    longest = len(tokens) + 1 if window is None else 2 * window + chunk + 512
    with lasting(model, longest), exact_angles(model), attending(model, cache):
        for begin in range(0, len(tokens), chunk):
            yield begin, read(model, cache, tokens[begin : begin + chunk])


class Pending:
    """NLLs on their way from the device."""

    def __init__(self, first: int, nll: Tensor, kv_cache_bytes: list[int]) -> None:
        self.first, self.kv_cache_bytes, self.vram = first, kv_cache_bytes, vram_allocated()
        self.event = torch.cuda.Event() if nll.is_cuda else None
        self.nll = nll.to("cpu", non_blocking=True) if not self.event else self._copied(nll)

    def _copied(self, nll: Tensor) -> Tensor:
        here = torch.empty(nll.shape, dtype=nll.dtype, pin_memory=True).copy_(nll, non_blocking=True)
        assert self.event is not None
        self.event.record()
        return here

    def steps(self) -> Steps:
        """Wait until they are here."""
        if self.event:
            self.event.synchronize()
        return Steps(self.first, self.nll.tolist(), None, self.vram, self.kv_cache_bytes)


@contextmanager
def compiled_parts(model: PreTrainedModel, worth_it: bool) -> Iterator[None]:
    """On CUDA, within this context, norms, feed-forward blocks and the rotary function of ``model`` run compiled."""
    parts, rotary = [], []
    if worth_it and model.device.type == "cuda":
        parts = [m for m in model.modules() if type(m).__name__.endswith(("Norm", "MLP"))]
        sources = {type(m).__module__ for m in model.modules()}
        rotary = [sys.modules[name] for name in sources if hasattr(sys.modules[name], ROTATE)]
    before = [getattr(source, ROTATE) for source in rotary]
    # one compiled function a class: a wrapper for each module would cost a short stream more than its layers
    forwards = {kind: torch.compile(kind.forward, dynamic=False) for kind in {type(m) for m in parts}}
    for module in parts:
        object.__setattr__(module, "forward", MethodType(forwards[type(module)], module))
    for source, rotate in zip(rotary, before, strict=True):
        setattr(source, ROTATE, torch.compile(rotate, dynamic=False))
    try:
        yield
    finally:
        for module in parts:
            object.__delattr__(module, "forward")
        for source, rotate in zip(rotary, before, strict=True):
            setattr(source, ROTATE, rotate)


def read(model: PreTrainedModel, cache: StreamCache, tokens: Tensor) -> Tensor:
    """Last hidden states ``(n, width)`` of ``tokens``, fed at once; to be called within ``attending``."""
    kwargs = mask_argument(model)
    positions = cache.advance(len(tokens))
    if takes_positions(model):
        kwargs["position_ids"] = positions
    body = backbone(model)
    return body(input_ids=tokens[None], past_key_values=cache, use_cache=True, **kwargs).last_hidden_state[0]


def _fresh_windows(model: PreTrainedModel, keep: Keep, tokens: Tensor, chunk: int, start: int) -> Iterator[Steps]:
    """Each prediction from a forward over the last ``keep.recent`` tokens, several windows a batch."""
    assert keep.recent is not None
    width, last = keep.recent, len(tokens) - 1
    body = backbone(model)
    with lasting(model, width), exact_angles(model):
        if start < width:
            first = tokens[: min(width, last) + 1]
            hidden = body(input_ids=first[None, :-1], use_cache=False).last_hidden_state[0, start:]
            yield _nothing_held(start + 1, nll_of(model, hidden, first[start + 1 :]))
        fed = max(width, start)
        windows = tokens[fed + 1 - width : last].unfold(0, width, 1) if last > fed else tokens.new_empty(0, width)
        for batch in windows.split(max(1, 2 * chunk // width)):
            hidden = body(input_ids=batch, use_cache=False).last_hidden_state[:, -1]
            nll = nll_of(model, hidden, tokens[fed + 1 : fed + 1 + len(batch)])
            yield _nothing_held(fed + 1, nll)
            fed += len(batch)


def _nothing_held(first: int, nll: Tensor) -> Steps:
    return Steps(first, nll.tolist(), None, vram_allocated(), [0] * len(nll))


def chunk_for(model: PreTrainedModel) -> int:
    """Tokens a forward that leave three quarters of the free memory alone."""
    config = model.config.get_text_config(decoder=True)
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    size = torch.finfo(model.dtype).bits // 8
    per_token = size * (12 * width + 4 * inner)
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    fits = [c for c in CHUNKS[0 if on_gpu else 3 :] if c * per_token <= free / 4]
    return fits[0] if fits else CHUNKS[-1]


def _fitting(model: PreTrainedModel, cache: StreamCache, chunk: int, length: int) -> int:
    """A chunk within which the model's frequencies hold."""
    if any(layer not in cache.kept for layer in cache.layers):
        raise UserError(
            f"{type(model).__name__} has layers that carry a state from token to token: use --engine stepwise"
        )
    limits = [limit for limit in _limits(model, cache) if limit is not None]
    window = cache.keep.window
    if not limits or (window is None and length <= min(limits)):
        return chunk
    if window is None or any(layer.keys_unrotated for layer in cache.kept):
        raise UserError(
            f"{type(model).__name__} changes its rotary frequencies beyond {min(limits)} tokens, token by token: "
            "use --engine stepwise, or stay below"
        )
    return min(chunk, min(limits) - window)


def _limits(model: PreTrainedModel, cache: StreamCache) -> list[int | None]:
    ropes = read_positions(model) if cache.keep.window is None else [layer.rope for layer in cache.kept]
    return [rope.limit for rope in ropes if rope]
