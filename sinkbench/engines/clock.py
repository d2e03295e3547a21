"""How long a step takes that is launched, and waited for later."""

import time

import torch


class Clock:
    """Times what is launched on the device between :meth:`begin` and :meth:`end`, from an idle device on.

    Where the step still runs when somebody comes to wait for it, its seconds are those of the clock on the wall, from
    before its launch until its result is there. One that has ended before is timed by the device itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.began, self.late = device, 0.0, False
        # on CUDA, where the host goes on while a step runs
        self.marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []

    def begin(self) -> None:
        """To be called before the launch."""
        if self.marks:
            torch.cuda.synchronize(self.device)
            self.marks[0].record(torch.cuda.current_stream(self.device))
        self.began = time.perf_counter()

    def end(self) -> None:
        """To be called behind the launch."""
        if self.marks:
            self.marks[1].record(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        """Until what was launched has ended."""
        if self.marks:
            self.late = self.marks[1].query()
            self.marks[1].synchronize()

    def seconds(self) -> float:
        """Those of the step; to be asked once it was waited for, and its result is there."""
        seconds = time.perf_counter() - self.began
        return min(seconds, self.marks[0].elapsed_time(self.marks[1]) / 1e3) if self.late else seconds
