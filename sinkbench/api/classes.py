"""transformers' own classes, with a cache that keeps attention sinks: ``from sinkbench import AutoModelForCausalLM``.

What ``from_pretrained`` returns is a model of transformers, whose own ``forward`` and ``generate`` keep the first
``attention_sink_size`` tokens and the last ``attention_sink_window_size`` ones (StreamingLLM, arXiv 2309.17453).
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import transformers
from transformers import PreTrainedModel

from sinkbench.api.patching import PAGED, Patch
from sinkbench.cache.batched import BatchedCache
from sinkbench.config import MODEL, ModelSource
from sinkbench.errors import UserError
from sinkbench.models.checkpoints import check_complete
from sinkbench.models.embedded import SPECIAL
from sinkbench.models.loading import load_tokenizer, locate
from sinkbench.models.sizes import layer_sizes
from sinkbench.positions.bare import device_of
from sinkbench.strategies import Chosen, Plan, choose

SINKS, WINDOW = 4, 1020
OTHER_TASKS = ("ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification")


class OfTransformers(type):
    """A class whose instances are those of transformers' class :attr:`of`."""

    of: Any

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.of)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(getattr(subclass, "of", subclass), cls.of)


class Loader(metaclass=OfTransformers):
    """Makes models of the class :attr:`of`; instances of this class do not exist.

    Raises:
        UserError: a class is derived from it.
    """

    of: ClassVar[Any] = PreTrainedModel

    def __init_subclass__(cls) -> None:
        if "of" not in vars(cls):
            name = cls.of.__name__
            raise UserError(
                f"derive from transformers.{name} and not from sinkbench.{name}, which only loads; then "
                "`with sinkbench.attention_sinks(model)` gives the model the strategy"
            )

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A model from its configuration, with random weights."""
        chosen = _taken(kwargs)
        return _given(cls.of(*args, **kwargs), chosen)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does; every other argument is transformers' own.

        Args:
            attention_sink_size: how many of the first tokens are kept, 0 or more (4).
            attention_sink_window_size: how many of the most recent tokens are kept, 1 or more (1020).
            strategy: another strategy, by name or as ``path/file.py:ClassName``, which holds as many entries as both
                of these together.
            strategy_parameters: its parameters, by name.
            positions: ``cache`` or ``text``.
            kv_format: in which format keys and values are held.

        Raises:
            UserError: sizes or a strategy that cannot be, a model whose positions cannot stream, or missing weights,
                which would be random. With ``output_loading_info=True`` those are listed there, and not refused.
        """
        chosen = _taken(kwargs)
        told = kwargs.pop("output_loading_info", False)
        args, kwargs, tokenizer = _located(args, kwargs)
        model, info = cls.of.from_pretrained(*args, output_loading_info=True, **kwargs)
        if tokenizer is not None and model.can_generate():
            _end_as(model, tokenizer)
        if told:
            return _given(model, chosen), info
        _refuse_random(args[0] if args else kwargs.get("pretrained_model_name_or_path"), info)
        return _given(model, chosen)

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As ``from_config`` of transformers' auto classes: random weights."""
        chosen = _taken(kwargs)
        make = getattr(cls.of, "from_config", None) or cls.of._from_config
        return _given(make(*args, **kwargs), chosen)


def loader(name: str) -> type[Loader]:
    """The class that makes transformers' ``name`` with attention sinks.

    Raises:
        AttributeError: transformers has no causal language model or base model of that name.
    """
    if not name.endswith(("ForCausalLM", "Model", *OTHER_TASKS)) or not hasattr(transformers, name):
        raise AttributeError(f"module 'sinkbench' has no attribute {name!r}")
    if name.endswith(OTHER_TASKS):
        return _refusing(name, f"its text is read once and whole, without a cache to cut: use transformers.{name}")
    return type(name, (Loader,), {"of": getattr(transformers, name), "__doc__": f"{name} with attention sinks."})


def _refusing(name: str, reason: str) -> type:
    """A class that can be imported, and says why it cannot be used."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UserError(f"sinkbench has no {name}: {reason}")

    return type(name, (), {"__new__": refuse, "from_pretrained": refuse, "from_config": refuse})


class AutoTokenizer(transformers.AutoTokenizer):
    """transformers' own, which also knows the embedded model's."""

    def __init__(self) -> None:
        transformers.AutoTokenizer()  # says that it is to be loaded

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, tokenizer = _located(args, kwargs)
        return tokenizer or transformers.AutoTokenizer.from_pretrained(*args, **kwargs)


AttentionSinkKVCache = _refusing("AttentionSinkKVCache", "a cache is made for a model, by sinkbench.SinkCache(model)")


def _located(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The arguments of ``from_pretrained``; for the embedded model, those of its files, and its tokenizer."""
    name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    if name != MODEL:
        return args, kwargs, None
    checkpoint = locate(ModelSource(name=MODEL))
    tokenizer = load_tokenizer(checkpoint)
    for token, index in SPECIAL.items():
        setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(index))
    return args[1:], kwargs | checkpoint.arguments, tokenizer


def _end_as(model: PreTrainedModel, tokenizer: Any) -> None:
    """Texts of ``model`` begin, end and are padded with the tokens of ``tokenizer``."""
    for settings in (model.generation_config, model.config):
        for token in SPECIAL:
            setattr(settings, f"{token}_id", getattr(tokenizer, f"{token}_id"))


class SinkCache(BatchedCache):
    """A cache for an already loaded ``model``; pass it as ``past_key_values`` to its ``forward`` or ``generate``.

    As long as the cache exists, the model knows what to do with it; other calls of the model are not touched. When
    the cache is gone (``del``, or out of scope), nothing is left on the model.

    Raises:
        UserError: sizes that cannot be, or a model whose positions cannot stream.
    """

    def __init__(
        self, model: PreTrainedModel, attention_sink_size: int = SINKS, attention_sink_window_size: int = WINDOW
    ) -> None:
        chosen = _chosen(attention_sink_size, attention_sink_window_size)
        self._hold(model)
        super().__init__(model, _plan(model, chosen), chosen.name)

    def _hold(self, model: PreTrainedModel) -> None:
        patch, wish = Patch.to(model)
        weakref.finalize(self, patch.release, wish)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = super().__deepcopy__(memo)
        if twin.model is not None:
            twin._hold(twin.model)
        return twin

    def attach(self, model: PreTrainedModel) -> None:
        held = self.model is model
        super().attach(model)
        if not held:
            self._hold(model)


@contextmanager
def attention_sinks(
    model: PreTrainedModel, *, attention_sink_size: int = SINKS, attention_sink_window_size: int = WINDOW
) -> Iterator[PreTrainedModel]:
    """Within this context ``model`` keeps attention sinks; afterwards it is exactly as before.

    Raises:
        UserError: sizes that cannot be, or a model whose positions cannot stream.
    """
    chosen = _chosen(attention_sink_size, attention_sink_window_size)
    plan = _plan(model, chosen)
    BatchedCache(model, plan)  # refuses what cannot stream
    patch, wish = Patch.to(model, plan, chosen.name)
    try:
        with patch.keeping(wish):
            yield model
    finally:
        patch.release(wish)


def _refuse_random(name: Any, info: dict[str, Any]) -> None:
    # Shapes that differ are refused by transformers unless the caller allows them, and what a base model leaves unread
    # of a checkpoint is no fault: only missing weights count here.
    chosen = {key for key, *_ in info["mismatched_keys"]}
    missing = set(info["missing_keys"]) - chosen
    check_complete(str(name), {"missing_keys": missing, "mismatched_keys": (), "unexpected_keys": ()})


def _plan(model: PreTrainedModel, chosen: Chosen) -> Plan:
    if "paged|" in str(model.config._attn_implementation):
        raise UserError(PAGED)
    return chosen.plan(layer_sizes(model.config))


def _given(model: PreTrainedModel, chosen: Chosen) -> PreTrainedModel:
    plan = _plan(model, chosen)
    if device_of(model).type != "meta":
        BatchedCache(model, plan)  # refuses what cannot stream
    Patch.to(model, plan, chosen.name)
    return model


def _taken(kwargs: dict[str, Any]) -> Chosen:
    """The strategy that the arguments of a call ask for; its own are taken out of them."""
    names = ("attention_sink_size", "attention_sink_window_size", "strategy", "strategy_parameters")
    given = {name: kwargs.pop(name) for name in (*names, "positions", "kv_format") if name in kwargs}
    sinks, recent = given.get("attention_sink_size", SINKS), given.get("attention_sink_window_size", WINDOW)
    alone = _chosen(sinks, recent)
    if not given.keys() - set(names[:2]):
        return alone
    return choose(
        given.get("strategy") or "attention_sinks",
        alone.window,
        given.get("attention_sink_size"),
        given.get("strategy_parameters"),
        given.get("positions"),
        given.get("kv_format") or "model",
    )


def _chosen(sinks: int, recent: int) -> Chosen:
    for name, value, least in (("attention_sink_size", sinks, 0), ("attention_sink_window_size", recent, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} must be a whole number of at least {least} (got {value!r})")
    return choose("attention_sinks", sinks + recent, sinks)
