"""Shapes of models: the sizes that decide what a run costs, without weights."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict

from sinkbench.config import DTYPES
from sinkbench.errors import UserError
from sinkbench.positions.families import experts_in
from sinkbench.strategies import LayerSizes
from sinkbench.validation import Count, Whole, one_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sinkbench.models.loading import Checkpoint


class ModelSizes(BaseModel):
    """Facts of a model, as its ``config.json`` has them.

    Attributes:
        parameters: of the whole model, embedding tables among them; tied tables count once.
        heads: of queries in a layer.
        kv_heads: of keys and values in a layer.
        context_length: positions the model was trained for; ``None`` where its configuration does not say.
        tied: whether the head is the embedding table.
        active_parameters: those that one token meets, where that is not all (experts, a part for images); the
            embedding table counts as met.
        sliding_layers: layers with a window of their own.
        sliding_window: that window, in tokens.
        plain_attention: whether nothing is done to its scores (ALiBi, soft caps, learned sinks); a processor computes
            only such attention in one operation.
        dtype: of the checkpoint.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    parameters: Count
    layers: Count
    hidden_size: Count
    intermediate_size: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    vocab_size: Count
    context_length: Count | None = None
    tied: bool = False
    active_parameters: Count | None = None
    sliding_layers: Whole = 0
    sliding_window: Count | None = None
    plain_attention: bool = True
    dtype: Annotated[str, one_of(DTYPES[1:])] = "bfloat16"

    def layer_sizes(self) -> list[LayerSizes]:
        """What a plan has to know of each layer, sliding ones first: their order is not among the facts."""
        sliding = LayerSizes("sliding", self.kv_heads, self.head_dim, self.sliding_window)
        full = LayerSizes("full", self.kv_heads, self.head_dim)
        return [sliding] * self.sliding_layers + [full] * (self.layers - self.sliding_layers)

    @property
    def head_weights(self) -> int:
        """Weights of the language-model head."""
        return self.vocab_size * self.hidden_size

    @property
    def met_weights(self) -> int:
        """Weights that a token is multiplied with: an embedding table is only looked up."""
        return (self.active_parameters or self.parameters) - (0 if self.tied else self.head_weights)


def read_sizes(checkpoint: "Checkpoint") -> ModelSizes:
    """The shape of a model from its configuration alone; weights are neither loaded nor downloaded.

    Raises:
        UserError: the configuration cannot be had, or is not that of a causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sinkbench.models import hub
    from sinkbench.models.checkpoints import check_config
    from sinkbench.models.silence import quiet

    location, trust = checkpoint.arguments, checkpoint.source.trust_remote_code
    try:
        with hub.patient(), quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(**location, trust_remote_code=trust)
            check_config(checkpoint.source.name, config)
            return sizes_of(AutoModelForCausalLM.from_config(config, trust_remote_code=trust))
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the configuration of {checkpoint.source.name!r} cannot be read: {text[:200]}") from error


def sizes_of(model: "PreTrainedModel") -> ModelSizes:
    """The shape of ``model``, whose weights may be on the meta device."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    config = model.config.get_text_config(decoder=True)
    types, kwargs = get_layer_types_and_kwargs(config)
    sliding = types.count("sliding_attention")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    parameters = sum(p.numel() for p in model.parameters())
    active = active_parameters(model, config)
    return ModelSizes(
        parameters=parameters,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=kv_heads_of(config),
        head_dim=head_dim_of(config),
        vocab_size=table.weight.shape[0],
        context_length=context_length_of(config),
        tied=head is None or head.weight is table.weight,
        active_parameters=None if active == parameters else active,
        sliding_layers=sliding,
        sliding_window=kwargs.get("sliding_window") if sliding else None,
        plain_attention=_plain(model, config),
        dtype=_dtype(config),
    )


def layer_sizes(config: Any) -> list[LayerSizes]:
    """What a plan has to know of each layer of a model of this configuration (a PretrainedConfig).

    Raises:
        UserError: a layer of a kind that nobody here knows how to cut.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, get_layer_types_and_kwargs

    config = config.get_text_config(decoder=True)
    kinds, kwargs = get_layer_types_and_kwargs(config)
    native = DynamicCache(config=config).layers
    heads, dim = kv_heads_of(config), head_dim_of(config)
    sizes = []
    for kind, layer in zip(kinds, native, strict=True):
        if kind == "full_attention":
            sizes.append(LayerSizes("full", heads, dim))
        elif kind == "sliding_attention":
            sizes.append(LayerSizes("sliding", heads, dim, kwargs.get("sliding_window")))
        elif not isinstance(layer, DynamicLayer):
            sizes.append(LayerSizes("state", heads, dim))
        else:
            raise UserError(f"a {config.model_type} has {kind} layers, which sinkbench does not know how to cut")
    return sizes


def head_dim_of(config: Any) -> int:
    """Features of a key in a model of this configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_length_of(config: Any) -> int | None:
    """Positions that a model of this configuration was trained for; ``None`` where it does not say."""
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def kv_heads_of(config: Any) -> int:
    """Heads of keys and values in a layer of a model of this configuration."""
    if config.model_type == "falcon":
        if config.new_decoder_architecture:
            return config.num_kv_heads
        return 1 if config.multi_query else config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def copies_of(config: Any) -> int:
    """How often the attention of such a model hands each of its keys to the cache, in heads that follow one another.

    Falcon's grouped attention copies a group's key and value for each of its queries before a cache sees them.
    """
    config = config.get_text_config(decoder=True)
    grouped = config.model_type == "falcon" and config.new_decoder_architecture
    return config.num_attention_heads // config.num_kv_heads if grouped else 1


def active_parameters(model: "PreTrainedModel", config: Any) -> int:
    """Weights that one token meets, the embedding table among them.

    Of several experts those it is sent to; of a model that also sees, the part that reads.
    """
    decoder = model.get_decoder()
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    total = sum(p.numel() for p in decoder.parameters())
    total += 0 if head is None or head.weight is table.weight else sum(p.numel() for p in head.parameters())
    count = experts_in(config)
    chosen = getattr(config, "num_experts_per_tok", None)
    if not count or not chosen:
        return total
    experts = sum(p.numel() for name, p in decoder.named_parameters() if ".experts." in name)
    return total - experts * (count - chosen) // count


def _plain(model: "PreTrainedModel", config: Any) -> bool:
    from sinkbench.positions.families import family_of

    special = getattr(config, "attn_logit_softcapping", None) or config.model_type == "gpt_oss"
    return not special and not family_of(model).alibi


def _dtype(config: Any) -> str:
    name = str(config.dtype).removeprefix("torch.")
    return name if name in DTYPES else "bfloat16"
