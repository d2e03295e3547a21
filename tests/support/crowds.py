"""Many threads on one model, and what a lone call answers."""

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import tiny
import torch
from dropin import GREEDY, SIZES
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkbench import SinkCache, attention_sinks
from sinkbench.errors import UserError


def state(model: PreTrainedModel) -> list:
    """All that a call could leave behind: attributes of every module, configurations, names of attentions."""
    modules = [
        (type(m), {k: v for k, v in vars(m).items() if k[:1] != "_"}, {k: id(v) for k, v in m._buffers.items()})
        for m in model.modules()
        if "dynamic" not in str(getattr(m, "rope_type", "")) and getattr(m, "rope_type", "") != "longrope"
    ]
    configs = [(type(m.config), dict(vars(m.config))) for m in model.modules() if hasattr(m, "config")]
    return [modules, configs, sorted(ALL_ATTENTION_FUNCTIONS._global_mapping)]


def call(model: PreTrainedModel, number: int) -> torch.Tensor | str:
    """One call of a kind and a length that follow from ``number``; every seventh fails."""
    chance = random.Random(number)
    prompt = tiny.tokens(chance.randrange(1, 70), seed=number)[None].to(model.device)
    with torch.no_grad():
        match number % 7:
            case 0:
                try:
                    model(prompt, attention_mask=torch.ones(2, 3))
                except UserError as error:
                    return str(error)[:20]
            case 1 | 2:
                return model(prompt).logits
            case 3:
                return model(prompt, use_cache=False).logits
            case 4:
                cache = SinkCache(model, attention_sink_size=2, attention_sink_window_size=9)
                return model(prompt, past_key_values=cache).logits
            case 5:
                return model.generate(prompt, num_beams=2, max_new_tokens=4, **GREEDY)
        return model.generate(prompt, max_new_tokens=chance.randrange(1, 12), **GREEDY)


def crowd(model: PreTrainedModel, calls: int, threads: int = 8) -> None:
    """``calls`` calls on ``threads`` threads answer as each does alone, and nothing stays."""
    switch, before = sys.getswitchinterval(), state(model)
    try:
        with attention_sinks(model, **SIZES):
            alone = [call(model, number) for number in range(calls)]
            sys.setswitchinterval(1e-5)
            with ThreadPoolExecutor(threads, initializer=threading.Barrier(threads).wait) as pool:
                together = list(pool.map(lambda number: call(model, number), range(calls)))
    finally:
        sys.setswitchinterval(switch)
    assert state(model) == before
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        if isinstance(one, str):
            assert one == other
        else:
            assert one.shape == other.shape, number
            assert (one - other).abs().max() <= (1e-4 if one.is_floating_point() else 0), number


if __name__ == "__main__":
    torch.set_num_threads(1)
    families, calls = sys.argv[2:], int(sys.argv[1])
    for family in families:
        crowd(tiny.STREAMABLE[family](), calls)
