"""What a reference costs, and how fast protocols are, on the embedded model.

    python docs/measures.py [TOKENS [WINDOW]]

prints the figures that ``docs/measures.md`` quotes. Of a processor the time is that of this process alone.
"""

import sys
import time
from collections.abc import Callable

import torch

from sinkbench.config import ModelSource, Source
from sinkbench.data.protocols import windows_of
from sinkbench.data.stream import read_stream
from sinkbench.engines.chunks import chunk_for
from sinkbench.engines.loss import loss
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.windows import read_windows
from sinkbench.models.loading import load_model, load_tokenizer, locate
from sinkbench.models.sizes import layer_sizes
from sinkbench.strategies import choose


def seconds(work: Callable[[], object], cuda: bool) -> float:
    """The shorter of two times."""
    clock, found = (time.perf_counter if cuda else time.process_time), []
    for _ in range(2):
        begin = clock()
        work()
        if cuda:
            torch.cuda.synchronize()
        found.append(clock() - begin)
    return min(found)


def main(n: int = 2048, window: int = 512) -> None:
    """Measure and print."""
    checkpoint = locate(ModelSource("smollm2-135m"))
    model = load_model(checkpoint)
    cuda = model.device.type == "cuda"
    text = read_stream(Source("kjv"), n + 1, lambda: load_tokenizer(checkpoint)).tokens
    sizes = layer_sizes(model.config)
    plan, dense = (choose(name, window // 2).plan(sizes) for name in ("attention_sinks", "transformers"))
    alone = seconds(lambda: list(Parallel(model).run(plan, text)), cuda)
    beside = seconds(lambda: list(Parallel(model, reference=dense).run(plan, text)), cuda)
    print(f"attention_sinks {1e3 * alone / n:.3f} ms a token, with a reference {beside / alone:.2f} times as long")

    @torch.inference_mode()
    def plain() -> None:
        windows = text[: n // window * window].view(-1, window).to(model.device)
        for part in windows.split(max(1, chunk_for(model) // window)):
            logits = model(input_ids=part, use_cache=False).logits
            loss(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()).cpu()

    a_token = seconds(plain, cuda) / (n // window * window)
    for protocol in ("windows", "strided", "llamacpp", "rolling"):
        cut = windows_of(protocol, n, window, window // 2)
        fed = sum(one.fed for one in cut)
        took = seconds(lambda cut=cut: list(read_windows(model, text[:n], cut, 1)), cuda)
        print(f"{protocol}: {a_token * fed / took:.2f} times the throughput of plain dense forwards")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
