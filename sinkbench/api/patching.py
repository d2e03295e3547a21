"""A strategy on one model: what its own ``forward`` and ``generate`` do while it is there, and how it goes.

Three attributes of the instance stand before its methods; classes are never touched, so models with different
strategies, and without any, live side by side.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin, GenerationMode
from transformers.generation.continuous_batching import PagedAttentionCache

from sinkbench.api.forward import read
from sinkbench.cache.batched import BatchedCache
from sinkbench.cache.stream import StreamCache
from sinkbench.calls import LOCK, NOTHING, held_here, here
from sinkbench.errors import UserError
from sinkbench.positions.families import signature_of, text_config
from sinkbench.positions.frequencies import frequencies_alone
from sinkbench.strategies import Plan

MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


GENERATING = ("generate", "prepare_inputs_for_generation", "init_continuous_batching", "set_attn_implementation")
PAGED = (
    "continuous batching (generate_batch, ContinuousBatchingManager, cache_implementation='paged') keeps all keys and "
    "values in pages of its own, and no strategy: use generate with a padded batch, or a model loaded with transformers"
)


class Method:
    """Stands before the method ``name`` of a model; it looks like that method to ``inspect``."""

    def __init__(self, patch: "Patch", name: str) -> None:
        self.patch, self.name = patch, name

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.patch.own(self.name)

    @property
    def __code__(self) -> CodeType:
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.patch, self.name)(*args, **kwargs)


@dataclass(eq=False)
class Wish:
    """Somebody who wants a model to keep what ``plan`` says; without one, only that caches that are passed in work."""

    plan: Plan | None = None
    name: str = ""


class Patch:
    """What stands before the methods of one model.

    Attributes:
        wishes: of all who want it to stay, in the order in which they came.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.wishes: list[Wish] = []
        self.names = ["forward", *(GENERATING if isinstance(model, GenerationMixin) else ())]
        self._before: dict[str, Any] = {}
        self._stands = False

    @classmethod
    def to(cls, model: PreTrainedModel, plan: Plan | None = None, name: str = "") -> tuple["Patch", Wish]:
        """What is attached to ``model``, made where there is nothing; to be released once (:meth:`release`)."""
        with LOCK:
            method = vars(model).get("forward")
            patch, wish = method.patch if isinstance(method, Method) else cls(model), Wish(plan, name)
            patch.wishes.append(wish)
            if not patch._stands:  # also where a cache that the collector just found was the last to want it
                patch._stand()
        return patch, wish

    def _stand(self) -> None:
        self._stands = True
        self._before = {name: vars(self.model).get(name) for name in self.names}
        for name in self.names:
            object.__setattr__(self.model, name, Method(self, name))

    def release(self, wish: Wish) -> None:
        """Leave the model as it was, unless somebody else still needs this."""
        with LOCK:
            self.wishes.remove(wish)
            if self.wishes:
                return
            self._stands = False
            for name, before in self._before.items():
                if not isinstance(vars(self.model).get(name), Method):
                    continue  # somebody stood another one before ours
                if before is None:
                    object.__delattr__(self.model, name)
                else:
                    object.__setattr__(self.model, name, before)

    @contextmanager
    def keeping(self, wish: Wish) -> Iterator[None]:
        """Within this context, ``wish`` counts in this thread or task; elsewhere, the one that came last."""
        with held_here({id(self): wish}):
            yield

    @property
    def wish(self) -> Wish | None:
        """Whose plan a cache made by the model itself keeps; ``None`` where only caches that are passed in are ours."""
        wish = here(id(self))
        plans = [x for x in tuple(self.wishes) if x.plan is not None]
        return wish if wish in plans else plans[-1] if plans else None

    def own(self, name: str) -> Callable[..., Any]:
        """The model's method as it was before."""
        return self._before.get(name) or getattr(type(self.model), name).__get__(self.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward through a cache of ours; its own where there is none."""
        own = self.own("forward")
        if kwargs.get("use_cache") is False and torch.compiler.is_compiling():
            return own(*args, **kwargs)  # nothing here that torch.export would have to follow
        if isinstance(kwargs.get("cache"), PagedAttentionCache) and self.wish is not None:
            raise UserError(PAGED)  # of a manager that was made before the model had a strategy
        given = named(own, args, kwargs)
        cache = self._cache(given)
        if cache is None:
            with frequencies_alone(self.model):
                return own(*args, **kwargs)
        with NOTHING if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled() else _reading():
            outputs = read(self.model, own, cache, given)
        return outputs if given.get("return_dict", True) is not False else outputs.to_tuple()

    def _cache(self, given: dict[str, Any]) -> BatchedCache | None:
        """The cache that a forward is to use, or ``None`` where it is no business of ours."""
        past = given.get("past_key_values")
        if isinstance(past, BatchedCache):
            if past.model is not self.model:
                past.attach(self.model)
            return past
        wish = self.wish
        if wish is None or wish.plan is None or isinstance(past, StreamCache):
            return None
        if _turned_off(self.model, given) or (self.model.training and torch.is_grad_enabled()):
            return None
        if past is None or (type(past) is DynamicCache and not past.get_seq_length()):
            return BatchedCache(self.model, wish.plan, wish.name)
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
        ours = isinstance(given.get("past_key_values"), BatchedCache)
        asked = self._uses_cache(given)
        if not ours and (self.wish is None or asked is False):
            return own(*args, **kwargs)
        self._check(given)
        if asked is not None:
            return own(*args, **kwargs)
        # the model's configuration may turn it off for want of a wish (MPT)
        settings = given.get("generation_config")
        if settings is None:
            return own(**given | {"use_cache": True})
        settings = copy.copy(settings)
        settings.use_cache = True  # there, as transformers warns of arguments beside a configuration
        return own(**given | {"generation_config": settings})

    def _uses_cache(self, given: dict[str, Any]) -> bool | None:
        """What a call of ``generate`` says of ``use_cache``, or its configuration; ``None`` where that is no wish."""
        if given.get("use_cache") is not None:
            return given["use_cache"]
        passed = getattr(given.get("generation_config"), "use_cache", None)
        if passed is not None:
            return passed
        return False if self.model.generation_config.use_cache is False and not _off_by_default(self.model) else None

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, and with it all that builds upon it: it pages keys and values by a cache of its own.

        Raises:
            UserError: always, where the model carries a strategy.
        """
        if self.wish is None:
            return self.own("init_continuous_batching")(*args, **kwargs)
        raise UserError(PAGED)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, but for attention in pages: so begins a manager of continuous batching, whoever makes it.

        Raises:
            UserError: attention in pages, where the model carries a strategy.
        """
        asked = args[0] if args else kwargs.get("attn_implementation")
        if self.wish is not None and "paged|" in str(asked):
            raise UserError(PAGED)
        return self.own("set_attn_implementation")(*args, **kwargs)

    def _check(self, given: dict[str, Any]) -> None:
        settings = given.get("generation_config") or self.model.generation_config
        merged = type(settings)(**settings.to_dict())
        merged.update(**{name: value for name, value in given.items() if hasattr(merged, name)})
        mode = merged.get_generation_mode(given.get("assistant_model"))
        if mode not in MODES:
            raise UserError(
                f"{mode.value.replace('_', ' ')} does not work with attention sinks: it takes tokens back, or reads "
                "the model in a way of its own; use greedy search, sampling or beam search, or use_cache=False"
            )
        for name in ("cache_implementation", "prefill_chunk_size"):
            value = getattr(merged, name, None)
            if value not in (None, "dynamic"):
                raise UserError(
                    f"{name}={value!r} does not go with attention sinks, which bring a cache of their own and "
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
        if not isinstance(past, BatchedCache):
            if self.wish is None or (past is not None and past.get_seq_length()):
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


@contextmanager
def _reading() -> Iterator[None]:
    """Without gradients, and not in inference mode, whose tensors could not be written to outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _turned_off(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether a forward is to have no cache: by its argument, else by the model's configuration."""
    asked = given.get("use_cache")
    config = text_config(model)
    return asked is False or (
        asked is None and getattr(config, "use_cache", None) is False and not _off_by_default(model)
    )


def _off_by_default(model: PreTrainedModel) -> bool:
    """Whether configurations of this kind turn the cache off unless they are told otherwise, as MPT's."""
    return getattr(type(text_config(model)), "use_cache", None) is False


def named(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    if not args:
        return dict(kwargs)
    signature = signature_of(method)
    if len(args) == 1 and (first := next(iter(signature.parameters))) not in kwargs:
        return {first: args[0], **kwargs}  # as nearly every call has it
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
    return bound
