"""Many tokens a forward: streams read in chunks, between which the cache carries what the plan keeps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.attention.adapters import mask_argument, replaceable
from sinkbench.attention.redirection import attending
from sinkbench.cache.held import bytes_a_token
from sinkbench.cache.stream import StreamCache
from sinkbench.engines.batches import Piece, pieces
from sinkbench.engines.head import backbone
from sinkbench.engines.lanes import lanes_for
from sinkbench.engines.states import States
from sinkbench.errors import UserError
from sinkbench.positions.bare import device_of
from sinkbench.positions.detection import read_positions
from sinkbench.positions.exact import exact_angles
from sinkbench.positions.families import lasting, takes_positions
from sinkbench.positions.reach import shortest_limit
from sinkbench.signals import check
from sinkbench.strategies import Plan

CHUNKS = (16384, 8192, 4096, 2048, 1024, 512, 256, 128)
AT_ONCE = {True: CHUNKS[0], False: 2048}  # tokens of a stream a forward, on a GPU or not
TOGETHER = {True: 4 * CHUNKS[0], False: 2048}  # tokens of all streams a forward
SCORED = {True: 1024, False: 256}  # where entries are scored, as every query has a row of scores
ROWS_BYTES = 768 * 2**20  # of rows of scores; with fewer a GPU takes more tokens, so that it need not wait for launches
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


def states_of(
    model: PreTrainedModel, cache: StreamCache, streams: Sequence[Tensor], chunk: int | None = None, scans: int = 1
) -> States[Piece]:
    """``streams``, the longest first, fed through ``cache``, at most ``chunk`` tokens of each at a time.

    Behind the end of a stream, up to that of the piece, states are of no token. So many caches whose entries go by a
    score are read in turns, this among them.

    Raises:
        UserError: the model cannot be read in chunks under the plan of ``cache``.
    """
    lengths = [len(stream) for stream in streams]
    reason = refuses_chunks(model, cache, lengths[0] + 1)
    if reason is not None:
        raise UserError(reason)
    size = cache.reach.chunk(chunk or chunk_for(model, cache.plan))
    room = Room.of(model, cache.plan).tokens // (len(streams) * max(1, min(size, lengths[0])))
    lanes = lanes_for(model, cache, len(streams), room, scans)

    def each() -> Iterator[tuple[Piece, Tensor]]:
        tokens, rows = side_by_side(streams, device_of(model)), len(streams)
        for piece in pieces(lengths, size):
            check()
            fewer = piece.rows < rows
            if fewer:
                rows = piece.rows
                cache.batch_select_indices(torch.arange(rows, device=device_of(model)))
            alone = piece.begin == 0 or fewer or piece.end - piece.begin == 1  # a single token passes as a step does
            with attending(model, cache), lanes.lane(alone):
                hidden = read(model, cache, tokens[:rows, piece.begin : piece.end])
            yield piece, lanes.handed(hidden)

    return States(min(lengths[0] + 1, cache.reach.end(size) + size), each(), lanes.count)


def hidden_states(
    model: PreTrainedModel, cache: StreamCache, streams: Sequence[Tensor], chunk: int | None = None
) -> Iterator[tuple[Piece, Tensor]]:
    """As :func:`states_of`, with no others in between: what was fed at once, and its states, ``(rows, n, width)``."""
    states = states_of(model, cache, streams, chunk)
    with lasting(model, states.longest), exact_angles(model):
        yield from states.read


def side_by_side(streams: Sequence[Tensor], device: torch.device) -> Tensor:
    """``(rows, n)``: streams, the longest first, on ``device``, each filled up with its last token.

    A token of the stream's own does nothing that those before it could not do; what is answered for it is left out.
    """
    if len(streams) == 1:
        return streams[0][None].to(device)
    filled = [torch.cat((x, x[-1:].expand(len(streams[0]) - len(x)))) for x in streams]
    return torch.stack(filled).to(device)


def read(model: PreTrainedModel, cache: StreamCache, tokens: Tensor) -> Tensor:
    """Last hidden states ``(rows, n, width)`` of ``tokens``, ``(rows, n)``, fed at once; within ``attending``."""
    kwargs = mask_argument(model)
    positions = cache.advance(tokens.shape[1])
    if takes_positions(model):
        kwargs["position_ids"] = positions
    body = backbone(model)
    return body(input_ids=tokens, past_key_values=cache, use_cache=True, **kwargs).last_hidden_state


@dataclass(frozen=True)
class Room:
    """What the free memory has room for; found once, so that a run is cut the same way from its beginning to its end.

    In powers of two: what is cut differently rounds differently, and some more or less memory in use by others should
    seldom show.

    Attributes:
        chunk: tokens of a stream that pass at once.
        tokens: tokens of all streams that pass at once.
        cache: bytes for the caches of all streams.
    """

    chunk: int
    tokens: int
    cache: int

    @classmethod
    def of(cls, model: PreTrainedModel, plan: Plan) -> "Room":
        """That of the device of ``model``: for hidden states and for caches a quarter of what is free each."""
        a_token, free = _bytes_of_a_token(model, plan), _free(model)
        most = TOGETHER[device_of(model).type == "cuda"]
        return cls(chunk_for(model, plan), min(most, _rounded(int(free / 4) // a_token)), int(free / 4))

    def streams(self, plan: Plan, itemsize: int, chunk: int, length: int, caches: int = 1) -> int:
        """How many streams of at most ``length`` tokens are read side by side, ``chunk`` tokens of each at a time.

        With so many ``caches``, of which one is read after the other.
        """
        n = min(chunk, length)
        held = sum(
            bytes_a_token(layer, itemsize) * (min(length, layer.policy.window or length) + n) for layer in plan.kept
        )
        return max(1, min(self.tokens // n, _rounded(int(self.cache // max(1, held * caches)))))


def chunk_for(model: PreTrainedModel, plan: Plan | None = None) -> int:
    """Tokens a forward that leave three quarters of the free memory alone."""
    return fitting(_bytes_of_a_token(model, plan), _free(model), _most(model, plan))


def _bytes_of_a_token(model: PreTrainedModel, plan: Plan | None) -> int:
    config = model.config.get_text_config(decoder=True)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    itemsize = torch.finfo(model.dtype).bits // 8
    sizes = config.hidden_size, inner, config.num_attention_heads, itemsize
    return bytes_at_once(plan, *sizes, _most(model, plan))


def _most(model: PreTrainedModel, plan: Plan | None) -> int:
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    return most_at_once(plan, device_of(model).type == "cuda", heads)


def _free(model: PreTrainedModel) -> int:
    """Bytes of memory that are free where ``model`` is, what torch keeps of earlier runs among them."""
    device = device_of(model)
    if device.type != "cuda":
        return psutil.virtual_memory().available
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _rounded(count: int) -> int:
    """The largest power of two that is no larger; 0 for 0."""
    return 1 << count.bit_length() - 1 if count else 0


def most_at_once(plan: Plan | None, on_gpu: bool, heads: int) -> int:
    """Tokens a forward, at most."""
    if plan is None or not plan.by_score:
        return AT_ONCE[on_gpu]
    few, window = SCORED[on_gpu], plan.longest or 0
    more = (n for n in CHUNKS if few < n <= 4 * few and 4 * heads * n * (window + n) < ROWS_BYTES)
    return next(more, few) if on_gpu else few


def bytes_at_once(plan: Plan | None, hidden: int, inner: int, heads: int, itemsize: int, most: int) -> int:
    """Bytes that a token of a forward takes: hidden states, and where entries are scored, its rows of scores."""
    states = itemsize * (12 * hidden + 4 * inner)
    return states + (3 * 4 * heads * ((plan.window or 0) + most) if plan is not None and plan.by_score else 0)


def fitting(a_token: int, free: int, most: int) -> int:
    """The largest chunk of tokens, ``most`` at most, that leaves three quarters of ``free`` bytes alone."""
    fits = [chunk for chunk in CHUNKS if chunk <= most and chunk * a_token <= free / 4]
    return fits[0] if fits else CHUNKS[-1]
