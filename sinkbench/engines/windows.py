"""Windows of dense attention, many of them a forward: no cache, no strategy, the model as it is (``--protocol``)."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.data.protocols import Window
from sinkbench.engines.chunks import chunk_for
from sinkbench.engines.head import backbone, measured
from sinkbench.engines.parallel import Part, Pending
from sinkbench.engines.step import Steps
from sinkbench.positions.bare import device_of
from sinkbench.positions.detection import check_reach
from sinkbench.positions.families import lasting
from sinkbench.signals import check


@torch.inference_mode()
def read_windows(
    model: PreTrainedModel, text: Tensor, windows: Sequence[Window], lead: int | None, chunk: int | None = None
) -> Iterator[Steps]:
    """The predictions that count of ``windows`` over ``text`` (int64, shape ``(n,)``), in their order.

    ``first`` of what is yielded is the index of the token that is predicted, and so how much of the text is before it.

    Args:
        lead: the token that stands first where a window says so; ``None`` for the one that is there.
        chunk: tokens a forward; by default chosen from the free memory.

    Raises:
        UserError: windows are longer than the model's table of positions.
    """
    text, longest = text.to(device_of(model)), max(window.fed for window in windows)
    check_reach(model, longest)
    at_once, body = chunk or chunk_for(model), backbone(model)
    waiting: Pending | None = None
    with lasting(model, longest):
        for batch in _batches(windows, at_once):
            check()
            hidden = body(input_ids=_fed(text, batch, lead), use_cache=False).last_hidden_state
            counted = [of_one[window.scored - 1 - window.begin :] for of_one, window in zip(hidden, batch, strict=True)]
            labels = torch.cat([text[window.scored : window.end + 1] for window in batch])
            found = measured(model, torch.cat(counted), labels)
            begun = Pending(found, [Part(0, window.scored, [0] * window.predictions) for window in batch])
            if waiting:  # the device is busy with the next windows while these are written down
                yield from (steps for _, steps in waiting.steps())
            waiting = begun
        if waiting:
            yield from (steps for _, steps in waiting.steps())


def _batches(windows: Sequence[Window], at_once: int) -> Iterator[Sequence[Window]]:
    """Consecutive ones of one length, of about ``at_once`` tokens together."""
    for fed, alike in groupby(windows, key=lambda window: window.fed):
        group, count = list(alike), max(1, at_once // fed)
        for begin in range(0, len(group), count):
            yield group[begin : begin + count]


def _fed(text: Tensor, windows: Sequence[Window], lead: int | None) -> Tensor:
    """The tokens that are fed of ``windows`` of one length, ``(windows, length)``."""
    places = torch.tensor([window.begin for window in windows], device=text.device)[:, None]
    tokens = text[(places + torch.arange(windows[0].fed, device=text.device)).clamp(min=0)]
    led = [row for row, window in enumerate(windows) if window.lead]
    if lead is not None and led:
        tokens[led, 0] = lead
    return tokens
