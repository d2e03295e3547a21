"""What a user waits for, of models of many shapes with random weights in bfloat16, window 1,024, on one GPU.

    python results/h200/shapes.py llama-2-7b falcon-7b

prints for each: the floor (weights and cache read once), seconds from the loaded model to the first row of
``attention_sinks``, a step past a full window (median of 150), and what 8,192 tokens take: the first row, and 8,191
times what one of these 150 rows takes, with everything between two steps.

    python results/h200/shapes.py --parallel llama-2-7b mpt-7b

prints microseconds a token of whole streams of 65,536 and 8,192 tokens, in parallel, behind one that warms up.
"""

import gc
import sys
import time
from itertools import islice
from statistics import median

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from sinkbench.diagnostics.speed import bytes_a_token, copy_seconds
from sinkbench.engines.captured import Captured
from sinkbench.engines.parallel import Parallel
from sinkbench.models.sizes import layer_sizes
from sinkbench.strategies import choose

WINDOW, TOKENS, LONG, TIMED = 1024, 8192, 65536, 150
SEVEN = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES = {
    "llama-2-7b": ("llama", {**SEVEN, "intermediate_size": 11008, "vocab_size": 32000}),
    "llama-3.1-8b": (
        "llama",
        {**SEVEN, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "falcon-7b": (
        "falcon",
        {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65024},
    ),
    "qwen3-8b": (
        "qwen3",
        {
            **{**SEVEN, "num_hidden_layers": 36, "intermediate_size": 12288},
            **{"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
        },
    ),
    "pythia-6.9b": ("gpt_neox", {**SEVEN, "intermediate_size": 16384, "vocab_size": 50432}),
    "gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "vocab_size": 50400}),
    "mpt-7b": ("mpt", {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432}),
    "gemma-2-9b": (
        "gemma2",
        {
            **{"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16},
            **{"num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000, "sliding_window": 4096},
        },
    ),
    "olmo-2-7b": ("olmo2", {**SEVEN, "intermediate_size": 11008, "vocab_size": 100352}),
    "gpt-oss-20b": (
        "gpt_oss",
        {
            **{"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64},
            **{"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "sliding_window": 128},
            **{"num_local_experts": 32, "num_experts_per_tok": 4},
        },
    ),
    "stablelm-3b": ("stablelm", {**SEVEN, "hidden_size": 2560, "intermediate_size": 6912, "vocab_size": 50304}),
}
EAGER = {"gemma2", "gpt_oss"}  # whose caps and sinks only this implementation computes


def build(kind: str, sizes: dict) -> PreTrainedModel:
    """A model on the GPU in bfloat16, with random weights."""
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("cuda"), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager" if kind in EAGER else None
        )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
        model.tie_weights()
    return model.eval()


def steps(model: PreTrainedModel) -> str:
    """Floor, first row, step, ratio and wall."""
    plan = choose("attention_sinks", WINDOW).plan(layer_sizes(model.config))
    tokens = torch.randint(3, 1000, (TOKENS + 1,), generator=torch.Generator().manual_seed(0))
    floor = bytes_a_token(model, WINDOW) * median(copy_seconds(model))
    begin = time.perf_counter()
    next(Captured(model, note=print).run(plan, tokens))
    first = time.perf_counter() - begin
    rows = Captured(model, note=print).run(plan, tokens, WINDOW + 76)
    next(rows)
    begin = time.perf_counter()
    step = median([row.latency for row in islice(rows, TIMED)])
    wall = first + (TOKENS - 1) * (time.perf_counter() - begin) / TIMED
    return f"{1e3 * floor:.2f} | {first:.1f} | {1e3 * step:.2f} | {step / floor:.2f} | {wall:.1f}"


def parallel(model: PreTrainedModel) -> str:
    """Microseconds a token of two lengths, the median of three."""
    plan = choose("attention_sinks", WINDOW).plan(layer_sizes(model.config))
    tokens = torch.randint(3, 1000, (LONG + 1,), generator=torch.Generator().manual_seed(0))
    engine = Parallel(model)

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        rows = sum(len(some.nll) for some in engine.run(plan, tokens[: count + 1]))
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / rows

    return " | ".join(f"{1e6 * sorted(seconds(n) for _ in range(4))[1]:.1f}" for n in (LONG, TOKENS))


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if name != "--parallel"] or list(SHAPES)
    measured = parallel if "--parallel" in sys.argv else steps
    for name in names:
        print(f"| {name} | {measured(build(*SHAPES[name]))} |", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
