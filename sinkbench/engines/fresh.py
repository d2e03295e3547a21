"""Hidden states without a cache: each from a forward over the last tokens, many of these at once."""

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.engines.chunks import chunk_for
from sinkbench.engines.head import backbone
from sinkbench.engines.states import States
from sinkbench.errors import UserError
from sinkbench.positions.detection import read_positions
from sinkbench.positions.reach import shortest_limit


def fresh_states(
    model: PreTrainedModel, width: int, tokens: Tensor, start: int = 0, chunk: int | None = None
) -> States[int]:
    """States of ``tokens`` behind the first ``start``, each from the last ``width`` tokens; to be read as others are.

    Args:
        chunk: half the tokens of a batch of windows; by default chosen from the free memory.
    """
    return States(width, _read(model, width, tokens, start, chunk or chunk_for(model)))


def _read(model: PreTrainedModel, width: int, tokens: Tensor, start: int, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """Windows that start with the text share a forward, unless frequencies follow the length of each."""
    last, body, fed = len(tokens), backbone(model), start
    limit = _limit(model)
    while fed < min(width, last):
        end = min(width, last) if limit is None or width <= limit else max(fed + 1, min(limit, last))
        yield fed, body(input_ids=tokens[None, :end], use_cache=False).last_hidden_state[0, fed:]
        fed = end
    if fed >= last:
        return
    windows = tokens[fed + 1 - width :].unfold(0, width, 1)
    for batch in windows.split(max(1, 2 * chunk // width)):
        yield fed, body(input_ids=batch, use_cache=False).last_hidden_state[:, -1]
        fed += len(batch)


def _limit(model: PreTrainedModel) -> int | None:
    """The length beyond which frequencies change, of a model with rotary positions."""
    try:
        return shortest_limit(read_positions(model))
    except UserError:
        return None
