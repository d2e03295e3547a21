"""A strategy on one model: what its own ``forward`` and ``generate`` do while it is there, and how it goes.

Three attributes of the instance stand before its methods; classes are never touched, so models with different
strategies, and without any, live side by side.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin, GenerationMode
from transformers.utils import ModelOutput

from sinkbench.errors import UserError
from sinkbench.sinkcache import Batch, Group, feed
from sinkbench.strategies import Keep

MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
OURS = ("past_key_values", "use_cache", "attention_mask", "position_ids", "cache_position", "labels", "return_dict")


class Method:
    """Stands before the method ``name`` of a model; it looks like that method to ``inspect``."""

    def __init__(self, attached: "Attached", name: str) -> None:
        self.attached, self.name = attached, name

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.attached.own(self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.attached, self.name)(*args, **kwargs)


class Attached:
    """What stands before the methods of one model.

    Attributes:
        keep: what a cache made by the model itself keeps; ``None`` where only caches that are passed in are ours.
        holders: how many want it to stay.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.keep: Keep | None = None
        self.holders = 0
        self._reading = False
        names = ["forward"] + (["generate", "prepare_inputs_for_generation"] if _generates(model) else [])
        self._before = {name: vars(model).get(name) for name in names}
        for name in names:
            object.__setattr__(model, name, Method(self, name))

    @classmethod
    def to(cls, model: PreTrainedModel) -> Self:
        """What is attached to ``model``, made where there is nothing; to be :meth:`release`\\ d once."""
        method = vars(model).get("forward")
        attached = method.attached if isinstance(method, Method) else cls(model)
        attached.holders += 1
        return attached

    def release(self) -> None:
        """Leave the model as it was, unless somebody else still needs this."""
        self.holders -= 1
        if self.holders:
            return
        for name, before in self._before.items():
            if not isinstance(vars(self.model).get(name), Method):
                continue  # somebody stood another one before ours
            if before is None:
                object.__delattr__(self.model, name)
            else:
                object.__setattr__(self.model, name, before)

    def own(self, name: str) -> Callable[..., Any]:
        """The model's method as it was before."""
        return self._before[name] or getattr(type(self.model), name).__get__(self.model)

    def new_cache(self, keep: Keep, kind: type[Batch] = Batch) -> Batch:
        """An empty cache for the model."""
        with self._as_it_is():
            return kind(self.model, keep)

    @contextmanager
    def _as_it_is(self) -> Iterator[None]:
        """Within this context the model's forward is its own."""
        before, self._reading = self._reading, True
        try:
            yield
        finally:
            self._reading = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward through a cache of ours; its own where there is none."""
        own = self.own("forward")
        if self._reading:
            return own(*args, **kwargs)
        given = named(own, args, kwargs)
        cache = self._cache(given)
        if cache is None:
            return own(*args, **kwargs)
        # not inference mode, whose tensors could not be written to outside of it
        with self._as_it_is(), torch.inference_mode(False), torch.no_grad():
            outputs = _read(self.model, own, cache, given)
        return outputs if given.get("return_dict", True) is not False else outputs.to_tuple()

    def _cache(self, given: dict[str, Any]) -> Batch | None:
        """The cache that a forward is to use, or ``None`` where it is no business of ours."""
        past = given.get("past_key_values")
        if isinstance(past, Batch):
            if past.model is not self.model:
                raise UserError("this cache was made for another model: make one with sinkbench.SinkCache(model)")
            return past
        if self.keep is None:
            return None
        use = given.get("use_cache")
        if use is None:
            use = getattr(self.model.config.get_text_config(decoder=True), "use_cache", True)
        if not use or (self.model.training and torch.is_grad_enabled()):
            return None
        if past is None or (type(past) is DynamicCache and not past.get_seq_length()):
            return self.new_cache(self.keep)
        raise UserError(
            f"{type(past).__name__} cannot keep what an attention-sink strategy says: leave past_key_values out, or "
            "pass the one that this model returned"
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate``, what cannot work refused.

        Raises:
            UserError: a decoding mode that has to take tokens back, a cache of another kind, padding on the right.
        """
        own = self.own("generate")
        given = named(own, args, kwargs)
        if self.keep is not None or isinstance(given.get("past_key_values"), Batch):
            self._check(given)
        return own(*args, **kwargs)

    def _check(self, given: dict[str, Any]) -> None:
        settings = given.get("generation_config") or self.model.generation_config
        asked = lambda name: given[name] if given.get(name) is not None else getattr(settings, name, None)  # noqa: E731
        if asked("use_cache") is False and not isinstance(given.get("past_key_values"), Batch):
            return
        assistant, merged = given.get("assistant_model"), type(settings)(**settings.to_dict())
        merged.update(**{name: value for name, value in given.items() if hasattr(merged, name)})
        mode = merged.get_generation_mode(assistant)
        if mode not in MODES:
            raise UserError(
                f"{mode.value.replace('_', ' ')} does not work with attention sinks: it takes tokens back, or reads "
                "the model in a way of its own; use greedy search, sampling or beam search, or use_cache=False"
            )
        for name in ("cache_implementation", "prefill_chunk_size"):
            if asked(name) not in (None, "dynamic"):
                raise UserError(
                    f"{name}={asked(name)!r} does not go with attention sinks, which bring a cache of their own and "
                    "read long prompts in chunks: leave it out"
                )
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, -1].all()):
            raise UserError("padding must be on the left: set tokenizer.padding_side = 'left'")

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The inputs of the next forward: the part of ``input_ids`` that the cache has not seen."""
        past = kwargs.get("past_key_values")
        if not isinstance(past, Batch):
            if self.keep is None or (past is not None and past.get_seq_length()):
                own = self.own("prepare_inputs_for_generation")
                return own(input_ids, next_sequence_length=next_sequence_length, **kwargs)
        elif next_sequence_length is not None and next_sequence_length < 1:
            raise UserError(
                f"the cache has seen {past.columns} tokens and input_ids hold no more than that: pass the whole "
                "conversation, or only what is new together with an attention_mask of all"
            )
        # not the model's own, which may throw a cache away that seems too short or too long (Phi-3)
        return GenerationMixin.prepare_inputs_for_generation(
            self.model, input_ids, next_sequence_length=next_sequence_length, **kwargs
        )


def _generates(model: PreTrainedModel) -> bool:
    return isinstance(model, GenerationMixin)


def named(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    if not args:
        return dict(kwargs)
    signature = inspect.signature(method)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
    return bound


def _read(model: PreTrainedModel, own: Callable[..., Any], cache: Batch, given: dict[str, Any]) -> ModelOutput:
    """Feed the tokens of one forward; answer as that forward would."""
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if tokens is None:
        raise UserError("input_ids or inputs_embeds are needed")
    batch, n = tokens.shape[:2]
    real = _real(given.get("attention_mask"), batch, n)
    along = {k: v for k, v in given.items() if k not in OURS and isinstance(v, Tensor) and v.shape[:2] == (batch, n)}
    rest = {k: v for k, v in given.items() if k not in OURS and k not in along and k != "logits_to_keep"}
    wanted = given.get("logits_to_keep", 0)
    last = n if given.get("labels") is not None or not isinstance(wanted, int) or not wanted else min(wanted, n)
    parts = []
    for group, count in cache.take_in([n] * batch if real is None else real.sum(-1).tolist()):
        if not count:
            continue
        rows = torch.tensor(group.rows, device=tokens.device)
        mine = along
        columns = None
        if len(group.rows) < batch or real is not None:
            columns = torch.arange(n, device=tokens.device)
            columns = columns.expand(batch, n)[rows] if real is None else _columns(real[rows], count)
            mine = {name: x[rows[:, None], columns] for name, x in along.items()}
        outputs = _group(model, own, group, mine, rest, count, last)
        parts.append((rows, columns, outputs))
    cache.columns += n
    outputs = _put_together(parts, batch, n, last)
    if given.get("labels") is not None:
        size = model.config.get_text_config(decoder=True).vocab_size
        outputs["loss"] = model.loss_function(logits=outputs.logits, labels=given["labels"], vocab_size=size)
        outputs.move_to_end("loss", last=False)
    if isinstance(wanted, Tensor):
        outputs["logits"] = outputs["logits"][:, wanted]
    outputs["past_key_values"] = cache
    return outputs
