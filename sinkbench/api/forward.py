"""One forward of a model under a strategy: any number of tokens, any batch, padded or not.

The tokens of each group of rows are cut into stretches that are exact, fed, and their outputs put together as the one
forward would have answered.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from sinkbench.attention.adapters import mask_argument, replaceable
from sinkbench.attention.redirection import attending
from sinkbench.cache.batched import BatchedCache
from sinkbench.cache.stream import StreamCache
from sinkbench.calls import NOTHING
from sinkbench.engines.chunks import chunk_for
from sinkbench.errors import UserError
from sinkbench.positions.families import lasting, takes_positions
from sinkbench.positions.frequencies import frequencies_alone

Forward = Callable[..., Any]
Place = tuple[Tensor, Tensor]  # rows ``(r, 1)`` and columns ``(r, n)`` of a batch
OURS = frozenset(
    ("past_key_values", "use_cache", "attention_mask", "position_ids", "cache_position", "labels", "return_dict")
)


@dataclass(frozen=True)
class Call:
    """The arguments of a forward.

    Attributes:
        shape: rows and columns of the input.
        along: tensors that go with the tokens, shape ``(rows, columns, ...)``.
        rest: the others.
        last: of how many columns, from the right, logits are wanted.
        narrows: whether the model can be told to compute no more logits than those.
    """

    shape: tuple[int, int]
    along: dict[str, Tensor]
    rest: dict[str, Any]
    last: int
    narrows: bool


@dataclass(frozen=True)
class Part:
    """What some rows answered: ``logits`` of the last tokens, ``states`` of all.

    Attributes:
        place: rows and columns of their tokens; ``None`` where that is everywhere.
        outputs: as of one forward over their tokens.
    """

    place: Place | None
    outputs: ModelOutput


def read(model: PreTrainedModel, forward: Forward, cache: BatchedCache, given: dict[str, Any]) -> ModelOutput:
    """Feed the tokens of ``given``, the arguments of ``forward`` by name; answer as that forward would.

    Outputs at padding are zeros.

    Raises:
        UserError: no tokens, a mask that is not ``(B, at least n)``, or attention weights of a cut prompt.
    """
    tokens = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
    if tokens is None:
        raise UserError("a forward needs input_ids or inputs_embeds")
    batch, n = tokens.shape[:2]
    real = _real(given.get("attention_mask"), batch, n)
    call = _call(given, batch, n, "logits_to_keep" in given)
    parts = []
    for group, count in cache.take_in([n] * batch if real is None else real.sum(-1).tolist()):
        if count:
            everywhere = real is None and len(group.rows) == batch
            place = None if everywhere else _place(real, torch.tensor(group.rows, device=tokens.device), n)
            parts.append(Part(place, _part(model, forward, group.cache, call, place)))
    cache.columns += n
    outputs = _put_together(parts, call)
    outputs["past_key_values"] = cache
    if isinstance(given.get("logits_to_keep"), Tensor):
        outputs["logits"] = outputs["logits"][:, given["logits_to_keep"]]
    if given.get("labels") is not None:
        outputs = _with_loss(model, outputs, given["labels"])
    return outputs


def _real(mask: Tensor | None, batch: int, n: int) -> Tensor | None:
    """Which of the new columns hold tokens, shape ``(B, n)``; ``None`` where all do."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < n:
        raise UserError(
            f"an attention_mask of shape {tuple(mask.shape)} does not go with {batch} rows of {n} tokens: it must be "
            "(rows, tokens), with or without the columns that were fed before"
        )
    real = mask[:, mask.shape[1] - n :].bool()
    return None if bool(real.all()) else real


def _call(given: dict[str, Any], batch: int, n: int, narrows: bool) -> Call:
    left = {name: value for name, value in given.items() if name not in OURS and name != "logits_to_keep"}
    along = {k: v for k, v in left.items() if isinstance(v, Tensor) and v.shape[:2] == (batch, n)}
    rest = {name: value for name, value in left.items() if name not in along}
    wanted = given.get("logits_to_keep", 0)
    whole = given.get("labels") is not None or not isinstance(wanted, int) or not wanted
    return Call((batch, n), along, rest, n if whole else min(wanted, n), narrows)


def _place(real: Tensor | None, rows: Tensor, n: int) -> Place:
    """Where the tokens of ``rows`` are, which all have the same number."""
    if real is None:
        return rows[:, None], torch.arange(n, device=rows.device).expand(len(rows), n)
    return rows[:, None], real[rows].nonzero()[:, 1].view(len(rows), -1)


def _part(model: PreTrainedModel, forward: Forward, cache: StreamCache, call: Call, place: Place | None) -> ModelOutput:
    """Feed the tokens at ``place``."""
    if place is not None:
        last = int((place[1] >= call.shape[1] - call.last).sum(-1).max())
        along = {name: x[place] for name, x in call.along.items()}
        call = Call((place[1].shape[0], place[1].shape[1]), along, call.rest, last, call.narrows)
    outputs = []
    for size, after, fed in _feed(model, forward, cache, call):
        keep = min(size, max(0, call.last - after))
        logits = fed.get("logits")
        if logits is not None and logits.shape[1] > keep:
            fed["logits"] = logits[:, logits.shape[1] - keep :]
        outputs.append(fed)
    return outputs[0] if len(outputs) == 1 else _joined(outputs)


def _feed(
    model: PreTrainedModel, forward: Forward, cache: StreamCache, call: Call
) -> Iterator[tuple[int, int, ModelOutput]]:
    """The outputs of each stretch, after its size and the number of tokens that follow it."""
    rows, n = call.shape
    sizes, apart = stretches(model, cache, n, rows)
    if apart and not cache.needs_attention and not replaceable(model):
        sizes, apart = [1] * n, False  # token by token is as exact
    if call.rest.get("output_attentions") and (apart or len(sizes) > 1):
        raise UserError("output_attentions is not to be had of several tokens that do not fit an empty cache")
    longest = min(cache.reach.end(max(sizes)) + max(sizes), cache.seen + n)
    as_they_came = len(sizes) == 1 and not (cache.seen or apart or cache.reach.anew)
    attention = attending(model, cache) if apart else NOTHING
    with frequencies_alone(model, fresh=True), lasting(model, longest), attention:
        begin = 0
        for size in sizes:
            after = n - begin - size
            along = call.along if size == n else {name: x[:, begin : begin + size] for name, x in call.along.items()}
            given: dict[str, Any] = along | call.rest | (mask_argument(model) if apart else {})
            if call.narrows:
                given["logits_to_keep"] = max(1, min(size, call.last - after))
            positions = cache.advance(size)
            if takes_positions(model):
                given["position_ids"] = positions
            yield size, after, forward(**given, past_key_values=cache, use_cache=True, return_dict=True)
            begin += size
    for layer in () if as_they_came or max(sizes) == 1 else cache.kept:
        layer.settle()


def stretches(model: PreTrainedModel, cache: StreamCache, n: int, rows: int) -> tuple[list[int], bool]:
    """How ``n`` new tokens are cut into forwards of ``model``, and whether those need attention of our own.

    What fits an empty cache is one plain forward. Anything else goes through
    :func:`~sinkbench.attention.redirection.attending`, in chunks chosen from the free memory. Models with a state
    that passes from token to token, and those whose frequencies change within the window, are fed token by token
    where a chunk would not be exact.
    """
    plan, reach, ours = cache.plan, cache.reach, cache.needs_attention
    fits = not (cache.seen or plan.by_score) and (plan.narrowest is None or n <= plan.narrowest + 1)
    ranked = plan.by_score and plan.positions == "cache"
    if n == 1 or ranked or plan.recoded:
        return [1] * n, ours
    if not reach.lasts(cache.seen + n):
        whole = min(n, reach.limit or n) if fits and not plan.stateful else 1
        return [whole] + [1] * (n - whole), ours
    if fits:
        return [n], False
    if plan.stateful:
        return [1] * n, ours
    chunk = reach.chunk(max(chunk_for(model, plan) // rows, 1))
    return [chunk] * (n // chunk) + ([n % chunk] if n % chunk else []), True


def _joined(outputs: list[ModelOutput]) -> ModelOutput:
    """Outputs of consecutive stretches as those of one forward."""
    merged: dict[str, Any] = {}
    for name in ("last_hidden_state", "logits"):
        if outputs[-1].get(name) is not None:
            merged[name] = torch.cat([x[name] for x in outputs], dim=1)
    if outputs[-1].get("hidden_states") is not None:
        layers = zip(*(x["hidden_states"] for x in outputs), strict=True)
        merged["hidden_states"] = tuple(torch.cat(layer, dim=1) for layer in layers)
    return type(outputs[-1])(**merged)


def _put_together(parts: list[Part], call: Call) -> ModelOutput:
    """The rows of all parts where they belong."""
    if len(parts) == 1 and parts[0].place is None:
        return parts[0].outputs
    if not parts:
        raise UserError("a batch of nothing but padding")
    if call.rest.get("output_attentions"):
        raise UserError("output_attentions is not to be had of a padded batch")
    first = parts[0].outputs
    merged: dict[str, Any] = {}
    for name, width in (("last_hidden_state", call.shape[1]), ("logits", call.last)):
        if first.get(name) is not None:
            merged[name] = _spread([(p, p.outputs[name]) for p in parts], call.shape, width)
    if first.get("hidden_states") is not None:
        layers = range(len(first["hidden_states"]))
        merged["hidden_states"] = tuple(
            _spread([(p, p.outputs["hidden_states"][i]) for p in parts], call.shape, call.shape[1]) for i in layers
        )
    return type(first)(**merged)


def _spread(values: list[tuple[Part, Tensor]], shape: tuple[int, int], width: int) -> Tensor:
    """The last ``width`` columns of the batch, zeros where no token was."""
    batch, n = shape
    like = values[0][1]
    out = like.new_zeros(batch, width, *like.shape[2:])
    for part, value in values:
        assert part.place is not None
        columns = part.place[1][:, part.place[1].shape[1] - value.shape[1] :] - (n - width)
        there = columns >= 0
        rows = part.place[0].expand_as(columns)
        out[rows[there], columns[there]] = value[there]
    return out


def _with_loss(model: PreTrainedModel, outputs: ModelOutput, labels: Tensor) -> ModelOutput:
    """The outputs with the loss that the model's own forward adds."""
    size = model.config.get_text_config(decoder=True).vocab_size
    loss = model.loss_function(logits=outputs["logits"], labels=labels, vocab_size=size)
    return type(outputs)(**{**outputs, "loss": loss})
